"""Files with pairs: sound, as exact as 8 bits are, and computed on integers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest

from deploykit.backends import backend, open_session
from deploykit.dataset import Dataset
from deploykit.environment import has_int8_dot_product
from deploykit.errors import AnswerIsNo
from deploykit.evaluation import collect
from deploykit.formats.onnx_graph import Graph
from deploykit.metrics import sqnr_db
from deploykit.stages.quantize import preset
from deploykit.stages.quantize.placement import chosen
from deploykit.stages.quantize.presets import SCOPES, Target
from deploykit.stages.quantize.workshop import Variant, Workshop
from deploykit.values import Array, Artifact, SessionOptions
from tests.formats.test_onnx_graph import CONV, normal, parsed, stored

TARGETS: tuple[Target, ...] = ("ort-cpu", "openvino", "tensorrt")
RUNTIMES = [
    pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=str(why)))
    for name in ("ort-cpu", "openvino")
    for why in [backend(name).unavailable()]
]
IMAGE = "(float[N,3,8,8] x) => (float[N,4,8,8] y)"


@dataclass(frozen=True)
class Case:
    """A small model and what ONNX Runtime must make of it."""

    text: str
    shape: tuple[int, ...]
    constants: dict[str, tuple[int, ...]]
    """Shapes of normal constants."""
    runs: dict[str, int]
    """Operators in ONNX Runtime's optimized graph; none of COMPUTE may be left in float."""
    fixed: dict[str, Array] = field(default_factory=dict)


BOUNDS = {"lo": np.array(0, np.float32), "hi": np.array(6, np.float32)}
TWO = {"w": (4, 3, 3, 3), "b": (4,), "v": (4, 4, 3, 3)}
CASES = {
    "conv_relu": Case(
        f"{IMAGE} {{ h = {CONV}(x, w, b) r = Relu(h) y = {CONV}(r, v) }}",
        (3, 8, 8), TWO, {"QLinearConv": 2},
    ),
    "conv_clip": Case(
        f"{IMAGE} {{ h = {CONV}(x, w, b) r = Clip(h, lo, hi) y = {CONV}(r, v) }}",
        (3, 8, 8), TWO, {"QLinearConv": 2}, BOUNDS,
    ),
    "residual": Case(
        f"{IMAGE} {{ s = {CONV}(x, w, b) h = {CONV}(s, v) a = Add(h, s) r = Relu(a) "
        f"y = {CONV}(r, u) }}",
        (3, 8, 8), {**TWO, "u": (4, 4, 3, 3)}, {"QLinearConv": 3, "QLinearAdd": 1},
    ),
    "max_pool": Case(
        f"(float[N,3,8,8] x) => (float[N,4,4,4] y) {{ h = {CONV}(x, w, b) "
        f"p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(h) y = {CONV}(p, v) }}",
        (3, 8, 8), TWO, {"QLinearConv": 2},
    ),
    "concat": Case(
        f"{IMAGE} {{ s = {CONV}(x, w, b) h = {CONV}(s, v) c = Concat<axis=1>(s, h) "
        f"y = {CONV}(c, u) }}",
        (3, 8, 8), {**TWO, "u": (4, 8, 3, 3)}, {"QLinearConv": 3, "QLinearConcat": 1},
    ),
    "depthwise": Case(
        "(float[N,3,8,8] x) => (float[N,6,8,8] y) { y = Conv<pads=[1,1,1,1], group=3>(x, w, b) }",
        (3, 8, 8), {"w": (6, 1, 3, 3), "b": (6,)}, {"QLinearConv": 1},
    ),
    "classifier": Case(
        f"(float[N,3,8,8] x) => (float[N,5] y) {{ h = {CONV}(x, w, b) r = Relu(h) "
        "p = GlobalAveragePool(r) f = Flatten(p) y = Gemm(f, v, c) }",
        (3, 8, 8), {"w": (4, 3, 3, 3), "b": (4,), "v": (4, 5), "c": (5,)},
        {"QLinearConv": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    ),
    "gemm": Case(
        "(float[N,6] x) => (float[N,5] y) { y = Gemm(x, w, b) }",
        (6,), {"w": (6, 5), "b": (5,)}, {"QGemm": 1},
    ),
    "gemm_turned": Case(
        "(float[N,6] x) => (float[N,5] y) { y = Gemm<transB=1>(x, w, b) }",
        (6,), {"w": (5, 6), "b": (5,)}, {"QGemm": 1},
    ),
    "matmul": Case(
        "(float[N,4,6] x) => (float[N,4,5] y) { y = MatMul(x, w) }",
        (4, 6), {"w": (6, 5)}, {"MatMulIntegerToFloat": 1},
    ),
    "attention": Case(
        "(float[N,4,6] x) => (float[N,4,6] y) { q = MatMul(x, w) k = MatMul(x, v) "
        "t = Transpose<perm=[0,2,1]>(k) s = MatMul(q, t) p = Softmax(s) y = MatMul(p, q) }",
        (4, 6), {"w": (6, 6), "v": (6, 6)}, {"QLinearMatMul": 2, "MatMulIntegerToFloat": 2},
    ),
    # ONNX Runtime has no integer kernel for this one.
    "conv_transpose": Case(
        "(float[N,3,4,4] x) => (float[N,5,5,5] y) { y = ConvTranspose(x, w, b) }",
        (3, 4, 4), {"w": (3, 5, 2, 2), "b": (5,)}, {"ConvTranspose": 1},
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def quantized(
    source: Artifact,
    data: Dataset,
    folder: Path,
    target: Target = "ort-cpu",
    *,
    wide: bool | None = True,
) -> tuple[Workshop, Artifact]:
    """The workshop, and a file with all that is in scope quantized by minimum and maximum."""
    shop = Workshop.open(
        source,
        preset(target, int8_dot_product=wide),
        data,
        op_types=SCOPES["residual"],
        binned=False,
    )
    variant = Variant(chosen(shop.graph, SCOPES["residual"]), "minmax")
    return shop, shop.write(variant, folder / f"{target}.onnx")


def made(
    folder: Path, text: str, shape: tuple[int, ...], target: Target = "ort-cpu", **constants: Array
) -> onnx.ModelProto:
    """The quantized graph of a model in text form, calibrated on normal data."""
    source, data = stored(parsed(text, **constants), folder, x=normal(12, *shape, seed=1))
    written = onnx.load(quantized(source, data, folder, target)[1].path)
    onnx.checker.check_model(written, full_check=True)
    return written


def follow(source: Artifact, artifact: Artifact, data: Dataset, runtime: str) -> float:
    """Signal to noise of the output y in dB."""
    options = SessionOptions(simulate=runtime == "simulated")
    name = "ort-cpu" if options.simulate else runtime
    with open_session(source, "ort-cpu") as one, open_session(artifact, name, options) as other:
        return sqnr_db(collect(one, data)[0]["y"], collect(other, data)[0]["y"])


def optimized(path: Path) -> Counter[str]:
    """Operator types of the graph that ONNX Runtime really runs."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    settings.log_severity_level = 3
    ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    graph = onnx.load(path.with_suffix(".optimized.onnx")).graph
    return Counter(node.op_type for node in graph.node)


def values(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def dequantized(model: onnx.ModelProto, tensor: str) -> tuple[Array, Array, int | None]:
    """The integers, the scale and the axis of a constant that a node reads by this name."""
    constants = values(model)
    node = Graph(model).producers[tensor]
    assert node.op_type == "DequantizeLinear"
    axis = next((a.i for a in node.attribute if a.name == "axis"), None)
    integers, scale, zero = (constants[name] for name in node.input)
    assert zero.dtype == integers.dtype
    assert zero.shape == scale.shape
    assert not zero.any()
    return integers, scale, axis


def compute(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type in SCOPES["compute"]]


@EACH
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("target", TARGETS)
def test_the_file_is_sound_and_close_to_the_float_model(
    case: Case, target: Target, runtime: str, tmp_path: Path
) -> None:
    constants = {name: normal(*shape) for name, shape in case.constants.items()} | case.fixed
    model = parsed(case.text, **constants)
    source, data = stored(model, tmp_path, x=normal(12, *case.shape, seed=1))
    if target == "tensorrt" and case is CASES["depthwise"]:
        with pytest.raises(AnswerIsNo, match="0 of 1 compute nodes"):
            quantized(source, data, tmp_path, target, wide=None)
        return
    _, artifact = quantized(source, data, tmp_path, target, wide=None)
    onnx.checker.check_model(onnx.load(artifact.path), full_check=True)
    if target == "tensorrt" and not has_int8_dot_product():
        runtime = "simulated"  # its 8-bit weights overflow the sums of this CPU
    assert 20 < follow(source, artifact, data, runtime) < 60  # more would not be 8 bits


@EACH
def test_onnx_runtime_computes_on_integers(case: Case, tmp_path: Path) -> None:
    constants = {name: normal(*shape) for name, shape in case.constants.items()} | case.fixed
    source, data = stored(
        parsed(case.text, **constants), tmp_path, x=normal(12, *case.shape, seed=1)
    )
    found = optimized(quantized(source, data, tmp_path)[1].path)
    left = {*SCOPES["residual"], "Relu", "Clip"} - set(case.runs)
    assert {name: found[name] for name in case.runs} == case.runs
    assert not left & set(found)


def test_a_simulation_runs_the_operators_of_the_file(tmp_path: Path) -> None:
    case = CASES["conv_relu"]
    constants = {name: normal(*shape) for name, shape in case.constants.items()}
    model = parsed(case.text, **constants)
    source, data = stored(model, tmp_path, x=normal(12, *case.shape))
    _, artifact = quantized(source, data, tmp_path)
    feed, _ = next(data.batches(1))
    ran = []
    for options in (SessionOptions(simulate=True), SessionOptions()):
        with open_session(artifact, "ort-cpu", options) as session:
            ran.append(session.placement(feed).detail["operators"])
    simulated, real = ran
    assert simulated == Counter(node.op_type for node in onnx.load(artifact.path).graph.node)
    assert (simulated["Conv"], real["QLinearConv"]) == (2, 2)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("text", "shape", "weights", "axis"),
    [
        (f"{IMAGE} {{ y = {CONV}(x, w, b) }}", (3, 8, 8), (4, 3, 3, 3), 0),
        (
            "(float[N,3,4,4] x) => (float[N,4,5,5] y) { y = ConvTranspose(x, w, b) }",
            (3, 4, 4),
            (3, 4, 2, 2),
            1,
        ),
        ("(float[N,6] x) => (float[N,4] y) { y = Gemm(x, w, b) }", (6,), (6, 4), 1),
        ("(float[N,6] x) => (float[N,4] y) { y = Gemm<transB=1>(x, w, b) }", (6,), (4, 6), 0),
        (
            "(float[N,6] x) => (float[N,4] y) { h = MatMul(x, w) y = Mul(h, b) }",
            (6,),
            (6, 4),
            1,
        ),
    ],
    ids=["Conv", "ConvTranspose", "Gemm", "Gemm_turned", "MatMul"],
)
def test_weights_and_bias_are_those_of_the_float_model(
    target: Target,
    text: str,
    shape: tuple[int, ...],
    weights: tuple[int, ...],
    axis: int,
    tmp_path: Path,
) -> None:
    turned = [1] * len(weights)
    turned[axis] = 4
    w = normal(*weights) * np.float32([1, 10, 100, 0.1]).reshape(turned)
    b = normal(4)
    written = made(tmp_path, text, shape, target, w=w, b=b)
    (node,) = compute(written)
    integers, scale, where = dequantized(written, node.input[1])
    assert where == axis
    assert integers.dtype == np.int8
    others = tuple(i for i in range(len(weights)) if i != axis)
    np.testing.assert_allclose(scale, np.abs(w).max(others) / 127, rtol=1e-6)
    assert (np.abs(integers).max(others) == 127).all()
    error = np.abs(integers * scale.reshape(turned) - w)
    assert (error <= scale.reshape(turned) * 0.501).all()
    if len(node.input) < 3:
        return
    if target != "ort-cpu":
        np.testing.assert_array_equal(values(written)[node.input[2]], b)
        return
    integer, wide, place = dequantized(written, node.input[2])
    assert integer.dtype == np.int32
    assert place == 0
    activation = values(written)[Graph(written).producers[node.input[0]].input[1]]
    np.testing.assert_allclose(wide, activation * scale, rtol=1e-6)
    np.testing.assert_allclose(integer * wide, b, atol=float(wide.max()))


def test_int8_activations_have_zero_point_zero(tmp_path: Path) -> None:
    case = CASES["residual"]
    constants = {name: normal(*shape) for name, shape in case.constants.items()}
    written = made(tmp_path, case.text, case.shape, "tensorrt", **constants)
    points = [values(written)[n.input[2]] for n in written.graph.node if "Quantize" in n.op_type]
    assert points
    assert all(point.dtype == np.int8 and not point.any() for point in points)


def test_a_weight_that_two_nodes_share_is_stored_once(tmp_path: Path) -> None:
    text = "(float[N,4] x) => (float[N,4] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, w) }"
    written = made(tmp_path, text, (4,), w=normal(4, 4))
    one, two = compute(written)
    assert one.input[1] == two.input[1]
    assert sum(value.shape == (4, 4) for value in values(written).values()) == 1


def test_a_weight_that_two_nodes_read_along_other_axes_is_stored_twice(tmp_path: Path) -> None:
    text = "(float[N,4] x) => (float[N,4] y) { h = Gemm(x, w) y = Gemm<transB=1>(h, w) }"
    written = made(tmp_path, text, (4,), w=np.ones((4, 4), np.float32))
    axes = [dequantized(written, node.input[1])[2] for node in compute(written)]
    assert axes == [1, 0]


def test_a_bias_too_large_for_int32_widens_the_scale(tmp_path: Path) -> None:
    w = np.full((2, 2), 1e-6, np.float32)
    b = np.array([1e3, 1e-3], np.float32)
    text = "(float[N,2] x) => (float[N,2] y) { y = Gemm<transB=1>(x, w, b) }"
    written = made(tmp_path, text, (2,), w=w, b=b)
    (node,) = compute(written)
    _, scale, _ = dequantized(written, node.input[1])
    integers, wide, _ = dequantized(written, node.input[2])
    assert scale[0] > 10 * scale[1]
    assert scale[1] == pytest.approx(1e-6 / 127, rel=1e-6)
    np.testing.assert_allclose(integers * wide.astype(np.float64), b, rtol=1e-4)


def test_a_shared_weight_that_one_bias_widens_is_stored_for_each(tmp_path: Path) -> None:
    w = np.full((2, 2), 1e-6, np.float32)
    text = """(float[N,2] x) => (float[N,2] y) {
        h = Gemm<transB=1>(x, w, b) y = Gemm<transB=1>(h, w, c)
    }"""
    written = made(tmp_path, text, (2,), w=w, b=np.array([1e3, 1], np.float32), c=w[0])
    one, two = (dequantized(written, node.input[1])[1] for node in compute(written))
    assert one[0] > 10 * two[0]


def test_a_channel_of_zeros_gives_its_bias(tmp_path: Path) -> None:
    w = normal(4, 3, 3, 3)
    w[2] = 0
    model = parsed(f"{IMAGE} {{ y = {CONV}(x, w, b) }}", w=w, b=normal(4))
    source, data = stored(model, tmp_path, x=normal(12, 3, 8, 8))
    _, artifact = quantized(source, data, tmp_path, wide=None)
    with open_session(source, "ort-cpu") as one, open_session(artifact, "ort-cpu") as other:
        want, have = (collect(s, data)[0]["y"] for s in (one, other))
    assert np.isfinite(have).all()
    step = (want.max() - want.min()) / 255
    assert np.abs(have[:, 2] - want[:, 2]).max() <= step
    assert sqnr_db(want, have) > 20


def test_weights_of_zeros_do_no_harm(tmp_path: Path) -> None:
    model = parsed(f"{IMAGE} {{ y = {CONV}(x, w, b) }}", w=0 * normal(4, 3, 3, 3), b=normal(4))
    source, data = stored(model, tmp_path, x=normal(12, 3, 8, 8))
    assert follow(source, quantized(source, data, tmp_path, wide=None)[1], data, "ort-cpu") > 20


def test_a_move_has_the_same_grid_before_and_behind(tmp_path: Path) -> None:
    case = CASES["max_pool"]
    constants = {name: normal(*shape) for name, shape in case.constants.items()}
    graph = Graph(made(tmp_path, case.text, case.shape, **constants))
    (pool,) = (n for n in graph.nodes.values() if n.op_type == "MaxPool")
    before = graph.producers[pool.input[0]]
    (behind,) = graph.consumers[pool.output[0]]
    assert (before.op_type, behind.op_type) == ("DequantizeLinear", "QuantizeLinear")
    assert before.input[1:] == behind.input[1:]


def test_names_of_inputs_and_outputs_stay_and_float_weights_go(tmp_path: Path) -> None:
    case = CASES["conv_relu"]
    constants = {name: normal(*shape) for name, shape in case.constants.items()}
    written = made(tmp_path, case.text, case.shape, **constants)
    assert [v.name for v in written.graph.input] == ["x"]
    assert [v.name for v in written.graph.output] == ["y"]
    assert {"w", "v", "b"}.isdisjoint(values(written))


def test_a_constant_that_a_branch_reads_stays(tmp_path: Path) -> None:
    text = """(float[N,4] x) => (float[N,4] y) {
        h = Gemm(x, w, b)
        s = ReduceMax<keepdims=0>(h)
        c = Greater(s, zero)
        y = If(c) <
            then_branch = t () => (float[N,4] p) { p = Gemm(h, w, b) },
            else_branch = e () => (float[N,4] q) { q = Neg(h) }
        >
    }"""
    constants = {"w": normal(4, 4), "b": normal(4), "zero": np.array(0, np.float32)}
    source, data = stored(parsed(text, **constants), tmp_path, x=normal(12, 4))
    _, artifact = quantized(source, data, tmp_path, wide=None)
    assert follow(source, artifact, data, "simulated") > 20


@pytest.mark.parametrize("shape", [(1, 5), (1, 1), (12, 5)])
def test_a_bias_that_is_no_vector(shape: tuple[int, ...], tmp_path: Path) -> None:
    batch = "N" if shape[0] == 1 else 12
    text = f"(float[{batch},6] x) => (float[{batch},5] y) {{ y = Gemm(x, w, b) }}"
    model = parsed(text, w=normal(6, 5), b=normal(*shape))
    source, data = stored(model, tmp_path, x=normal(12, 6))
    assert follow(source, quantized(source, data, tmp_path, wide=None)[1], data, "ort-cpu") > 20


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_bias_that_is_one_number(shape: tuple[int, ...], tmp_path: Path) -> None:
    text = "(float[N,6] x) => (float[N,5] y) { y = Gemm(x, w, b) }"
    model = parsed(text, w=normal(6, 5), b=np.full(shape, 0.7, np.float32))
    source, data = stored(model, tmp_path, x=normal(12, 6))
    assert follow(source, quantized(source, data, tmp_path, wide=None)[1], data, "ort-cpu") > 20


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("(float[6,6] x) => (float[6,6] y) { k = MatMul(x, w) y = Gemm(x, k, b) }", (6, 6)),
        ("(float[6,6] x) => (float[6,6] y) { y = Gemm(w, x, b) }", (6, 6)),
    ],
    ids=["two_activations", "constant_first"],
)
def test_a_constant_bias_without_constant_weights(
    text: str, weights: tuple[int, ...], tmp_path: Path
) -> None:
    model = parsed(text, w=normal(*weights), b=normal(6))
    source, data = stored(model, tmp_path, x=normal(12, 6))
    assert follow(source, quantized(source, data, tmp_path, wide=None)[1], data, "ort-cpu") > 20


@pytest.mark.parametrize("name", ["h_scale", "h_zero_point"])
def test_an_initializer_named_like_an_added_one(name: str, tmp_path: Path) -> None:
    text = f"{IMAGE} {{ h = {CONV}(x, w) m = Max(h, {name}) y = {CONV}(m, v) }}"
    constants = {"w": normal(4, 3, 3, 3), "v": normal(4, 4, 3, 3), name: normal(4, 1, 1)}
    model = parsed(text, **constants)
    source, data = stored(model, tmp_path, x=normal(12, 3, 8, 8))
    assert follow(source, quantized(source, data, tmp_path, wide=None)[1], data, "ort-cpu") > 20


@pytest.mark.parametrize("name", ["h_float", "h_quantized"])
def test_a_tensor_named_like_an_added_one(name: str, tmp_path: Path) -> None:
    text = f"{IMAGE} {{ h = {CONV}(x, w) {name} = {CONV}(h, v) y = Neg({name}) }}"
    model = parsed(text, w=normal(4, 3, 3, 3), v=normal(4, 4, 3, 3))
    source, data = stored(model, tmp_path, x=normal(12, 3, 8, 8))
    assert follow(source, quantized(source, data, tmp_path, wide=None)[1], data, "ort-cpu") > 20


def test_the_standard_domain_by_its_long_name(tmp_path: Path) -> None:
    model = parsed("(float[N,6] x) => (float[N,5] y) { y = MatMul(x, w) }", w=normal(6, 5))
    model.opset_import[0].domain = "ai.onnx"
    source, data = stored(model, tmp_path, x=normal(12, 6))
    assert follow(source, quantized(source, data, tmp_path, wide=None)[1], data, "ort-cpu") > 20


@pytest.mark.parametrize("target", TARGETS)
def test_weights_of_seven_bits_stay_within_them(target: Target, tmp_path: Path) -> None:
    if target == "tensorrt":
        assert preset(target, int8_dot_product=False).weight_bits == 8
        return
    model = parsed("(float[N,6] x) => (float[N,5] y) { y = MatMul(x, w) }", w=normal(6, 5))
    source, data = stored(model, tmp_path, x=normal(12, 6))
    narrow = preset(target, int8_dot_product=False)
    shop = Workshop.open(source, narrow, data, op_types=("MatMul",), binned=False)
    artifact = shop.write(Variant(tuple(shop.graph.nodes), "minmax"), tmp_path / "q.onnx")
    written = onnx.load(artifact.path)
    integers, _, _ = dequantized(written, compute(written)[0].input[1])
    assert np.abs(integers).max() == 63
    assert follow(source, artifact, data, "simulated") > 20
