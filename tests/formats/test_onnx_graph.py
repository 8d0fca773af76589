from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from deploykit.dataset import Dataset, open_dataset
from deploykit.formats import open_model
from deploykit.formats.onnx_graph import (
    Graph,
    channel_axis,
    drop_unused,
    groups_of,
    input_axis,
    multiply_accumulates,
    name_nodes,
    subgraph_nodes,
    weighed,
    with_constants,
)
from deploykit.values import Array, Artifact

CONV = "Conv<pads=[1,1,1,1]>"
"""3x3, keeps the size."""


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def parsed(text: str, *, opset: int = 17, **constants: Array) -> onnx.ModelProto:
    """A model from ONNX's own text form: `(inputs) => (outputs) { [name] out = Op(in) }`."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for name, value in constants.items()
    )
    return model


def graph_of(text: str, **constants: Array) -> Graph:
    """Its graph with shapes and names, as `prepare` would leave it, but nothing folded."""
    model = onnx.shape_inference.infer_shapes(parsed(text, **constants), strict_mode=True)
    name_nodes(model)
    return Graph(model)


def stored(model: onnx.ModelProto, folder: Path, **arrays: Array) -> tuple[Artifact, Dataset]:
    """The model and its data, on disk."""
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "data.npz", **arrays)
    return open_model(folder / "model.onnx"), open_dataset(folder / "data.npz")


def outputs(model: onnx.ModelProto, *names: str, **feed: Array) -> dict[str, Array]:
    """What a model gives, or these tensors of it, with nothing optimized."""
    import onnxruntime as ort

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if names:
        del copy.graph.output[:]
        kind = onnx.TensorProto.FLOAT
        copy.graph.output.extend(onnx.helper.make_tensor_value_info(n, kind, None) for n in names)
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.log_severity_level = 3
    session = ort.InferenceSession(
        copy.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    found = [value.name for value in session.get_outputs()]
    return dict(zip(found, session.run(found, feed), strict=True))


def test_nodes_know_their_readers_and_makers() -> None:
    graph = graph_of("(float[2] x) => (float[2] y, float[2] z) { y = Relu(x) z = Add(y, y) }")
    assert [node.op_type for node in graph.nodes.values()] == ["Relu", "Add"]
    assert graph.producers["y"].op_type == "Relu"
    assert [node.op_type for node in graph.consumers["y"]] == ["Add"]  # once, though read twice
    assert graph.outputs == {"y", "z"}
    assert graph.only_consumer("y") is None  # the caller needs it too
    assert graph.only_consumer("x") is graph.nodes[graph.producers["y"].name]


def test_a_tensor_that_a_branch_reads_has_no_only_consumer() -> None:
    graph = graph_of(
        """(float[2] x, bool c) => (float[2] y, float[2] z) {
            h = Relu(x)
            y = Neg(h)
            z = If(c) <
                then_branch = t () => (float[2] p) { p = Abs(h) },
                else_branch = e () => (float[2] q) {
                    q = If(c) <
                        then_branch = u () => (float[2] r) { r = Exp(x) },
                        else_branch = v () => (float[2] s) { s = Cos(x) }
                    >
                }
            >
        }"""
    )
    assert graph.only_consumer("h") is None
    assert {"h", "x"} <= graph.captured
    inner = [node.op_type for node in subgraph_nodes(graph.producers["z"])]
    assert sorted(inner) == ["Abs", "Cos", "Exp", "If"]


def test_constants_are_no_activations() -> None:
    graph = graph_of(
        """(float[2] x, int64[2] i) => (float[2] y, int64[2] j) {
            h = Add(x, w) y = Relu(h) j = Add(i, k)
        }""",
        w=normal(2),
        k=np.array([1, 2]),
    )
    assert graph.floats == {"x", "h", "y"}
    assert graph.constant("k") is None  # not float32
    assert graph.constant("x") is None
    np.testing.assert_array_equal(graph.constant("w"), normal(2))


def test_names_become_unique() -> None:
    model = parsed(
        "(float x) => (float y) { [a] h = Relu(x) [a] i = Relu(h) j = Abs(i) y = Abs(j) }"
    )
    name_nodes(model)
    names = [node.name for node in model.graph.node]
    assert names[0] == "a"
    assert len(set(names)) == 4
    assert all(names)
    name_nodes(model)
    assert [node.name for node in model.graph.node] == names


def test_a_name_that_is_stays() -> None:
    model = parsed("(float x) => (float y) { h = Relu(x) [Relu_0] y = Relu(h) }")
    name_nodes(model)
    assert model.graph.node[1].name == "Relu_0"


@pytest.mark.parametrize(
    ("operator", "axis"),
    [("Conv", 0), ("ConvTranspose", 1), ("Gemm", 1), ("Gemm<transB=1>", 0), ("MatMul", -1)],
)
def test_the_axis_of_output_channels(operator: str, axis: int) -> None:
    model = parsed(f"(float[a,b] x) => (float[c,d] y) {{ y = {operator}(x, w) }}")
    assert channel_axis(model.graph.node[0]) == axis


@pytest.mark.parametrize(
    ("text", "weights", "count"),
    [
        (f"(float[N,3,8,8] x) => (float[N,4,8,8] y) {{ y = {CONV}(x, w) }}", (4, 3, 3, 3), 6912),
        (
            "(float[N,4,8,8] x) => (float[N,6,6,6] y) { y = Conv<group=2>(x, w) }",
            (6, 2, 3, 3),
            6 * 6 * 6 * 2 * 9,
        ),
        (
            "(float[N,3,4,4] x) => (float[N,5,8,8] y) { y = ConvTranspose<strides=[2,2]>(x, w) }",
            (3, 5, 2, 2),
            3 * 16 * 5 * 4,
        ),
        ("(float[N,6] x) => (float[N,5] y) { y = Gemm(x, w) }", (6, 5), 30),
        ("(float[N,6] x) => (float[N,5] y) { y = Gemm<transB=1>(x, w) }", (5, 6), 30),
        ("(float[6,1] x) => (float[1,5] y) { y = Gemm<transA=1>(x, w) }", (6, 5), 30),
        ("(float[N,7,6] x) => (float[N,7,5] y) { y = MatMul(x, w) }", (6, 5), 210),
        ("(float[N,6] x) => (float[N,6] y) { y = Mul(x, w) }", (6,), 0),
    ],
)
def test_multiply_accumulates_by_hand(text: str, weights: tuple[int, ...], count: int) -> None:
    graph = graph_of(text, w=normal(*weights))
    assert list(multiply_accumulates(graph.model, graph).values()) == [count]


def test_multiply_accumulates_are_those_of_one_sample() -> None:
    graph = graph_of("(float[4,6] x) => (float[4,5] y) { y = Gemm(x, w) }", w=normal(6, 5))
    assert list(multiply_accumulates(graph.model, graph).values()) == [30]


def test_weighed_are_the_nodes_that_multiply_channels_by_float_constants() -> None:
    text = """(float[N,3,8,8] x, double[N,4] d, float[4,N] t) => (float[N,4,8,8] y) {
        [conv] h = Conv(x, c) [back] k = ConvTranspose(x, c)
        [product] m = MatMul(x, w) [stack] n = MatMul(x, s) [vector] o = MatMul(x, v)
        [constant_first] p = MatMul(w, x) [activations] q = MatMul(x, x)
        [double] r = MatMul(d, dw)
        [gemm] a = Gemm<transB=1>(e, u) [turned] b = Gemm<transA=1>(t, u)
        [add] y = Add(h, bias)
    }"""
    model = parsed(
        text.replace("(float[N,3,8,8] x,", "(float[N,3,8,8] x, float[N,4] e,"),
        c=normal(4, 3, 1, 1), w=normal(8, 8), s=normal(3, 8, 8), v=normal(8), u=normal(4, 4),
        dw=normal(4, 2).astype(np.float64), bias=normal(4, 1, 1),
    )  # fmt: skip
    nodes = weighed(Graph(model))
    assert [node.name for node in nodes] == ["conv", "back", "product", "gemm"]
    assert [input_axis(node) for node in nodes] == [1, 1, -1, -1]


def test_groups_of_a_convolution() -> None:
    graph = graph_of(
        "(float[N,4,8,8] x) => (float[N,4,8,8] y) { h = Conv<group=2>(x, w) y = Relu(h) }",
        w=normal(4, 2, 1, 1),
    )
    assert [groups_of(node) for node in graph.nodes.values()] == [2, 1]


def test_new_constants_are_those_of_one_node_alone() -> None:
    text = """(float[N,4] x) => (float[N,4] y) {
        [one] h = Gemm(x, w, b) [two] k = Gemm(h, w) [three] y = Gemm(k, w, b)
    }"""
    graph = graph_of(text, w=normal(4, 4), b=normal(4), one_constant1=normal(1))
    before = graph.model.SerializeToString()
    values = {("one", 1): normal(4, 4, seed=1), ("two", 2): normal(4, seed=2).astype(np.float64)}
    made = with_constants(graph, values)
    onnx.checker.check_model(made.model, full_check=True)
    assert graph.model.SerializeToString() == before
    np.testing.assert_array_equal(made.constant(made.nodes["one"].input[1]), normal(4, 4, seed=1))
    np.testing.assert_array_equal(made.constant(made.nodes["two"].input[2]), normal(4, seed=2))
    assert list(made.nodes["three"].input) == ["k", "w", "b"]
    assert len(made.constants) == 4  # the one that nothing reads is gone
    x = normal(3, 4)
    one = x @ normal(4, 4, seed=1) + normal(4)
    two = one @ normal(4, 4) + normal(4, seed=2)
    np.testing.assert_allclose(
        outputs(made.model, x=x)["y"], two @ normal(4, 4) + normal(4), rtol=1e-4, atol=1e-5
    )


def test_a_constant_named_like_a_new_one_stays() -> None:
    text = "(float[N,4] x) => (float[N,4] y) { [one] h = MatMul(x, w) y = Add(h, one_constant1) }"
    graph = graph_of(text, w=normal(4, 4), one_constant1=normal(4))
    made = with_constants(graph, {("one", 1): normal(4, 4, seed=1)})
    np.testing.assert_array_equal(made.constant("one_constant1"), normal(4))
    want = normal(3, 4) @ normal(4, 4, seed=1) + normal(4)
    np.testing.assert_allclose(outputs(made.model, x=normal(3, 4))["y"], want, rtol=1e-4, atol=1e-5)


def test_what_nothing_reads_is_dropped_and_nothing_else() -> None:
    model = parsed(
        """(float[2] x, bool c) => (float[2] y, float[2] out) {
            gone = Constant<value = float[2] {1, 2}>()
            kept = Constant<value = float[2] {3, 4}>()
            idle = Relu(x)
            a = Add(x, kept)
            y = If(c) <
                then_branch = t () => (float[2] p) { p = Add(a, inner) },
                else_branch = e () => (float[2] q) { q = Abs(a) }
            >
        }""",
        unread=normal(2),
        inner=normal(2),
        out=normal(2),
    )
    drop_unused(model)
    assert [t.name for t in model.graph.initializer] == ["inner", "out"]
    assert [n.output[0] for n in model.graph.node] == ["kept", "idle", "a", "y"]
    before = model.SerializeToString()
    drop_unused(model)
    assert model.SerializeToString() == before
