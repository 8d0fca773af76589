"""Scales that move from channels to weights: the same function, and the formulas of the papers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.formats.onnx_graph import Graph, multiply_accumulates
from deploykit.stages.quantize.channels import observe_channels
from deploykit.stages.quantize.equalize import MOST, cross_layer, smooth
from deploykit.values import Array
from tests.formats.test_onnx_graph import CONV, graph_of, normal, outputs
from tests.stages.quantize.test_channels import in_memory

IMAGE = "(float[N,3,8,8] x) => (float[N,5,8,8] y)"
W, V = (4, 3, 3, 3), (5, 4, 3, 3)
TWO: dict[str, tuple[int, ...]] = {"w": W, "b": (4,), "v": V, "c": (5,)}
ROWS = "(float[N,6] x) => (float[N,5] y)"
DENSE: dict[str, tuple[int, ...]] = {"w": (6, 4), "b": (4,), "v": (4, 5), "c": (5,)}


@dataclass(frozen=True)
class Case:
    """A graph, and which of the two equalizations finds something to do in it."""

    text: str
    constants: dict[str, tuple[int, ...]] = field(default_factory=lambda: TWO)
    shape: tuple[int, ...] = (3, 8, 8)
    cross: bool = True
    smooth: bool = True


def between(function: str) -> Case:
    """Two convolutions with something between them."""
    return Case(f"{IMAGE} {{ h = {CONV}(x, w, b) r = {function} y = {CONV}(r, v, c) }}")


def dense(body: str, *, cross: bool = True, **constants: tuple[int, ...]) -> Case:
    return Case(f"{ROWS} {{ {body} }}", DENSE | constants, (6,), cross=cross)


POOL = "kernel_shape=[3,3], pads=[1,1,1,1]"
CASES = {
    "relu": between("Relu(h)"),
    "leaky_relu": between("LeakyRelu<alpha=0.2>(h)"),
    "max_pool": between(f"MaxPool<{POOL}>(h)"),
    "average_pool": between(f"AveragePool<{POOL}>(h)"),
    "nothing_between": Case(f"{IMAGE} {{ h = {CONV}(x, w, b) y = {CONV}(h, v, c) }}"),
    "without_biases": Case(f"{IMAGE} {{ h = {CONV}(x, w) r = Relu(h) y = {CONV}(r, v) }}"),
    "mul_by_channel": Case(
        f"{IMAGE} {{ h = {CONV}(x, w, b) s = Mul(m, h) y = {CONV}(s, v, c) }}",
        TWO | {"m": (4, 1, 1)}, cross=False,
    ),
    "mul_by_one_number": Case(
        f"{IMAGE} {{ h = {CONV}(x, w, b) s = Mul(h, m) y = {CONV}(s, v, c) }}",
        TWO | {"m": ()}, cross=False,
    ),
    "add_by_channel": Case(
        f"{IMAGE} {{ h = {CONV}(x, w) s = Add(h, a) r = Relu(s) y = {CONV}(r, v, c) }}",
        TWO | {"a": (1, 4, 1, 1)},
    ),
    "add_by_position": Case(
        f"{IMAGE} {{ h = {CONV}(x, w, b) s = Add(a, h) y = {CONV}(s, v, c) }}",
        TWO | {"a": (8, 8)},
    ),
    "add_behind_mul": Case(
        f"{IMAGE} {{ h = {CONV}(x, w, b) s = Mul(h, m) t = Add(s, a) y = {CONV}(t, v, c) }}",
        TWO | {"m": (4, 1, 1), "a": (1,)}, cross=False,
    ),
    "global_pool": Case(
        f"(float[N,3,8,8] x) => (float[N,5,1,1] y) {{ h = {CONV}(x, w, b) r = Relu(h) "
        "p = GlobalAveragePool(r) y = Conv(p, v, c) }",
        TWO | {"v": (5, 4, 1, 1)},
    ),
    "two_readers": Case(
        f"(float[N,3,8,8] x) => (float[N,5,8,8] y, float[N,2,8,8] z) {{ h = {CONV}(x, w, b) "
        f"r = Relu(h) y = {CONV}(r, v, c) z = Conv(r, u) }}",
        TWO | {"u": (2, 4, 1, 1)},
    ),
    "grouped": Case(
        f"{IMAGE} {{ h = Conv<pads=[1,1,1,1], group=3>(x, w, b) r = Relu(h) "
        f"k = Conv<pads=[1,1,1,1], group=2>(r, u) y = {CONV}(k, v, c) }}",
        {"w": (6, 1, 3, 3), "b": (6,), "u": (8, 3, 3, 3), "v": (5, 8, 3, 3), "c": (5,)},
    ),
    "depthwise": Case(
        f"{IMAGE} {{ h = {CONV}(x, w, b) r = Relu(h) k = Conv<pads=[1,1,1,1], group=4>(r, u, d) "
        f"s = Relu(k) y = {CONV}(s, v, c) }}",
        TWO | {"u": (4, 1, 3, 3), "d": (4,)},
    ),
    "transposed": Case(
        "(float[N,3,4,4] x) => (float[N,5,10,10] y) { h = ConvTranspose<strides=[2,2]>(x, w, b) "
        "r = Relu(h) y = ConvTranspose(r, v, c) }",
        {"w": (3, 4, 2, 2), "b": (4,), "v": (4, 5, 3, 3), "c": (5,)}, (3, 4, 4),
    ),
    "transposed_reads_in_groups": Case(
        "(float[N,3,4,4] x) => (float[N,6,5,5] y) { h = Conv(x, w, b) "
        "y = ConvTranspose<group=2>(h, v) }",
        {"w": (4, 3, 1, 1), "b": (4,), "v": (4, 3, 2, 2)}, (3, 4, 4),
    ),
    "transposed_writes_in_groups": Case(
        "(float[N,4,4,4] x) => (float[N,5,5,5] y) { h = ConvTranspose<group=2>(x, w, b) "
        "y = Conv(h, v) }",
        {"w": (4, 3, 2, 2), "b": (6,), "v": (5, 6, 1, 1)}, (4, 4, 4), cross=False, smooth=False,
    ),
    "one_dimension": Case(
        "(float[N,3,9] x) => (float[N,5,5] y) { h = Conv(x, w, b) r = Relu(h) y = Conv(r, v) }",
        {"w": (4, 3, 3), "b": (4,), "v": (5, 4, 3)}, (3, 9),
    ),
    "three_dimensions": Case(
        "(float[N,2,4,4,4] x) => (float[N,3,4,4,4] y) { h = Conv(x, w, b) r = Relu(h) "
        "y = Conv(r, v) }",
        {"w": (4, 2, 1, 1, 1), "b": (4,), "v": (3, 4, 1, 1, 1)}, (2, 4, 4, 4),
    ),
    "sigmoid_lets_no_scale_through": Case(
        f"{IMAGE} {{ h = {CONV}(x, w, b) r = Sigmoid(h) y = {CONV}(r, v, c) }}",
        cross=False, smooth=False,
    ),
    "read_by_an_add_too": Case(
        f"{IMAGE} {{ h = {CONV}(x, w, b) r = Relu(h) k = {CONV}(r, u) s = Sigmoid(k) "
        f"t = Sigmoid(r) j = Add(s, t) y = {CONV}(j, v) }}",
        TWO | {"u": (4, 4, 3, 3)}, cross=False, smooth=False,
    ),
    "an_output_too": Case(
        f"(float[N,3,8,8] x) => (float[N,5,8,8] y, float[N,4,8,8] r) {{ h = {CONV}(x, w, b) "
        f"r = Relu(h) y = {CONV}(r, v) }}",
        cross=False, smooth=False,
    ),
    "above_is_an_output_too": Case(
        f"(float[N,3,8,8] x) => (float[N,5,8,8] y, float[N,4,8,8] h) {{ h = {CONV}(x, w, b) "
        f"r = Relu(h) y = {CONV}(r, v) }}",
        cross=False, smooth=False,
    ),
    "shared_weights": Case(
        "(float[N,4,4,4] x) => (float[N,4,4,4] y) { h = Conv(x, w, b) r = Relu(h) "
        "k = Conv(r, w, b) s = Sigmoid(k) y = Conv(s, w) }",
        {"w": (4, 4, 1, 1), "b": (4,)}, (4, 4, 4),
    ),
    "gemm": dense("h = Gemm(x, w, b) r = Relu(h) y = Gemm(r, v, c)"),
    "gemm_turned": dense(
        "h = Gemm<transB=1>(x, w, b) r = Relu(h) y = Gemm<transB=1>(r, v, c)", w=(4, 6), v=(5, 4)
    ),
    "gemm_scaled": dense("h = Gemm<alpha=0.3, beta=2.0>(x, w, b) y = Gemm<alpha=0.3>(h, v)"),
    "gemm_adds_a_row": dense("h = Gemm(x, w, b) y = Gemm(h, v, c)", b=(1, 4), c=(1, 5)),
    "gemm_adds_one_number": dense("h = Gemm(x, w, b) y = Gemm(h, v, c)", b=(), c=(1,)),
    "gemm_without_bias": dense("h = Gemm(x, w) y = Gemm(h, v)"),
    "gemm_adds_what_it_reads": Case(
        "(float[N,6] x) => (float[N,4] y) { h = Gemm(x, w, b) y = Gemm(h, v, h) }",
        DENSE | {"v": (4, 4)}, (6,), cross=False,
    ),
    "matmul_and_add": dense("h = MatMul(x, w) a = Add(h, b) r = Relu(a) y = MatMul(r, v)"),
    "matmul_reads_an_output": Case(
        "(float[N,6] x) => (float[N,5] y, float[N,4] r) { h = MatMul(x, w) r = Relu(h) "
        "y = MatMul(r, v) }",
        DENSE, (6,), cross=False,
    ),
    "products_behind_anything": Case(
        "(float[N,6] x) => (float[N,5] y, float[N,5] z) { h = MatMul(x, w) t = Tanh(h) "
        "y = MatMul(t, v) s = Relu(y) z = Gemm(t, v, s) }",
        DENSE, (6,), cross=False,
    ),
    "matmul_behind_anything": dense("h = MatMul(x, w) t = Tanh(h) y = MatMul(t, v)", cross=False),
    "layer_norm": Case(
        "(float[N,7,6] x) => (float[N,7,4] y, float[N,7,5] z) { h = LayerNormalization(x, g, a) "
        "y = MatMul(h, w) z = MatMul(h, v) }",
        {"g": (6,), "a": (6,), "w": (6, 4), "v": (6, 5)}, (7, 6), cross=False,
    ),
    "layer_norm_without_bias": Case(
        "(float[N,7,6] x) => (float[N,7,4] y) { h = LayerNormalization(x, g) y = MatMul(h, w) }",
        {"g": (6,), "w": (6, 4)}, (7, 6), cross=False,
    ),
    "layer_norm_read_by_others": Case(
        "(float[N,7,6] x) => (float[N,7,6] y) { h = LayerNormalization(x, g) k = MatMul(h, w) "
        "y = Add(k, h) }",
        {"g": (6,), "w": (6, 6)}, (7, 6), cross=False,
    ),
    "a_branch_reads_it_too": Case(
        """(float[N,6] x) => (float[N,5] y, float[N,4] z) {
            h = MatMul(x, w) r = Relu(h) y = MatMul(r, v)
            s = ReduceMax<keepdims=0>(x) t = Cast<to=9>(s)
            z = If(t) <
                then_branch = t () => (float[N,4] p) { p = Abs(r) },
                else_branch = e () => (float[N,4] q) { q = Neg(r) }
            >
        }""",
        DENSE, (6,), cross=False,
    ),
    "a_convolution_and_a_product_read_it": Case(
        "(float[N,3,8,8] x) => (float[N,5,8,8] y, float[N,3,8,2] z) { h = Conv(x, w) "
        "y = Conv(h, v) z = MatMul(h, u) }",
        {"w": (3, 3, 1, 1), "v": (5, 3, 1, 1), "u": (8, 2)}, cross=False,
    ),
    "products_of_activations": Case(
        "(float[N,6,6] x) => (float[N,6,6] y) { r = Relu(x) y = MatMul(r, r) }",
        {}, (6, 6), cross=False, smooth=False,
    ),
}  # fmt: skip
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def graph_with(case: Case, seed: int = 0, spread: float = 1.0) -> tuple[Graph, Array]:
    """The graph and its data; the constants spread over this many orders of magnitude."""
    rng = np.random.default_rng(seed)

    def wide(*shape: int) -> Array:
        sizes = 10 ** rng.uniform(-spread / 2, spread / 2, shape[:1])
        drawn = rng.standard_normal(shape) * sizes.reshape(-1, *[1] * (len(shape) - 1))
        return np.asarray(drawn, np.float32).reshape(shape)

    constants = {name: wide(*shape) for name, shape in case.constants.items() if name in case.text}
    return graph_of(case.text, **constants), normal(6, *case.shape, seed=seed)


def same_function(before: Graph, after: Graph, x: Array) -> None:
    onnx.checker.check_model(after.model, full_check=True)
    want, have = outputs(before.model, x=x), outputs(after.model, x=x)
    assert list(have) == list(want)
    for name, array in want.items():
        np.testing.assert_allclose(have[name], array, rtol=1e-3, atol=1e-5 * np.abs(array).max())


@EACH
@pytest.mark.parametrize(("seed", "spread"), [(0, 0.0), (1, 2.0)])
def test_the_function_stays(case: Case, seed: int, spread: float) -> None:
    graph, x = graph_with(case, seed, spread)
    before = graph.model.SerializeToString()
    crossed, smoothed = cross_layer(graph), smooth(graph, observe_channels(graph, in_memory(x=x)))
    assert (crossed is not None, smoothed is not None) == (case.cross, case.smooth)
    for after in (crossed, smoothed):
        if after:
            same_function(graph, after, x)
    assert graph.model.SerializeToString() == before


@EACH
def test_the_work_is_the_same(case: Case) -> None:
    graph, x = graph_with(case)
    want = multiply_accumulates(graph.model, graph)
    for after in (cross_layer(graph), smooth(graph, observe_channels(graph, in_memory(x=x)))):
        if after:
            have = multiply_accumulates(after.model, after)
            assert {name: have[name] for name in want} == want
            assert sum(have.values()) == sum(want.values())


def test_both_one_upon_the_other(tmp_path: Path) -> None:
    graph, x = graph_with(CASES["depthwise"], spread=2)
    crossed = cross_layer(graph)
    assert crossed
    both = smooth(crossed, observe_channels(crossed, in_memory(x=x)))
    assert both
    same_function(graph, both, x)


# cross-layer equalization


def inputs_of(graph: Graph, name: str) -> list[Array]:
    found = [graph.constant(tensor) for tensor in graph.producers[name].input]
    return [array for array in found if array is not None]


@given(seed=st.integers(0, 2**16))
@settings(max_examples=10)
def test_the_two_layers_of_a_pair_have_equal_ranges(seed: int) -> None:
    graph, _ = graph_with(CASES["relu"], seed, 3)
    after = cross_layer(graph)
    assert after
    w, b = inputs_of(after, "h")
    v, c = inputs_of(after, "y")
    np.testing.assert_allclose(np.abs(w).max((1, 2, 3)), np.abs(v).max((0, 2, 3)), rtol=1e-5)
    before_w, before_b = inputs_of(graph, "h")
    before_v, before_c = inputs_of(graph, "y")
    made, read = np.abs(before_w).max((1, 2, 3)), np.abs(before_v).max((0, 2, 3))
    scale = np.sqrt(made / read)  # equation 11
    np.testing.assert_allclose(w, before_w / scale[:, None, None, None], rtol=1e-5)
    np.testing.assert_allclose(b, before_b / scale, rtol=1e-5)
    np.testing.assert_allclose(v, before_v * scale[:, None, None], rtol=1e-5)
    np.testing.assert_array_equal(c, before_c)


def test_the_range_that_counts_is_that_of_all_readers() -> None:
    graph, _ = graph_with(CASES["two_readers"], spread=2)
    after = cross_layer(graph)
    assert after
    (made, _), (one, _), (other,) = (inputs_of(after, name) for name in ("h", "y", "z"))
    read = np.maximum(np.abs(one).max((0, 2, 3)), np.abs(other).max((0, 2, 3)))
    np.testing.assert_allclose(np.abs(made).max((1, 2, 3)), read, rtol=1e-5)


def test_a_chain_of_layers_comes_near_to_equal_ranges() -> None:
    """Each pair disturbs its neighbours, so it takes more than one sweep."""
    graph, _ = graph_with(CASES["depthwise"], 3, 2)
    after = cross_layer(graph)
    assert after
    (w, _), (u, _), (v, _) = (inputs_of(after, name) for name in ("h", "k", "y"))
    first, middle = np.abs(w).max((1, 2, 3)), np.abs(u).max((1, 2, 3))
    np.testing.assert_allclose(middle, np.abs(v).max((0, 2, 3)), rtol=1e-5)
    assert np.abs(np.log(first / middle)).max() < 0.5
    (w, _), (u, _) = (inputs_of(graph, name) for name in ("h", "k"))
    assert np.abs(np.log(np.abs(w).max((1, 2, 3)) / np.abs(u).max((1, 2, 3)))).max() > 1


@pytest.mark.parametrize("dead", ["w", "v", "both", "all"])
def test_channels_of_zeros_do_no_harm(dead: str) -> None:
    w, v = normal(*W), normal(*V)
    if dead in ("w", "both", "all"):
        w[1] = 0
    if dead in ("v", "both", "all"):
        v[:, 1] = 0
    if dead == "all":
        w[:] = 0
    x = normal(6, 3, 8, 8)
    graph = graph_of(CASES["relu"].text, w=w, b=normal(4), v=v, c=normal(5))
    for after in (cross_layer(graph), smooth(graph, observe_channels(graph, in_memory(x=x)))):
        if after:
            same_function(graph, after, x)
            assert all(np.isfinite(a).all() for a in inputs_of(after, "h") + inputs_of(after, "y"))
    assert (cross_layer(graph) is None) == (dead == "all")


def test_a_dead_channel_gets_the_middle_scale() -> None:
    """Its bias would grow with a smaller one, and the range of all channels with it."""
    w = normal(*W)
    w[1] = 0
    graph = graph_of(CASES["relu"].text, w=w, b=normal(4), v=normal(*V), c=normal(5))
    after = cross_layer(graph)
    assert after
    scale = normal(4) / inputs_of(after, "h")[1]
    assert scale[1] == pytest.approx(np.exp(np.log(scale[[0, 2, 3]]).mean()), rel=1e-4)


def test_no_scale_is_far_from_the_others() -> None:
    w = normal(*W)
    w[1] *= 1e-12
    graph = graph_of(CASES["relu"].text, w=w, b=normal(4), v=normal(*V), c=normal(5))
    after = cross_layer(graph)
    assert after
    scale = np.abs(inputs_of(after, "y")[0]).max((0, 2, 3)) / np.abs(normal(*V)).max((0, 2, 3))
    assert MOST / 2 < np.median(scale) / scale[1] < 1e4  # 1e6 by the formula
    assert np.isfinite(inputs_of(after, "h")[1]).all()


# SmoothQuant


def test_smoothing_by_equation_4(tmp_path: Path) -> None:
    """With alpha 0.5 the weights of each channel end up as large as the activation."""
    graph, x = graph_with(CASES["matmul_behind_anything"], spread=2)
    after = smooth(graph, observe_channels(graph, in_memory(x=x)))
    assert after
    tensor = outputs(graph.model, "t", x=x)["t"]
    (before,), (weights,) = inputs_of(graph, "y"), inputs_of(after, "y")
    scale = np.abs(tensor).max(0) ** 0.5 / np.abs(before).max(1) ** 0.5
    smoothed = after.producers["y"].input[0]
    assert smoothed != "t"
    np.testing.assert_allclose(weights, before * scale[:, None], rtol=1e-5)
    have = outputs(after.model, smoothed, x=x)[smoothed]
    np.testing.assert_allclose(have, tensor / scale, rtol=1e-4)
    np.testing.assert_allclose(np.abs(have).max(0), np.abs(weights).max(1), rtol=1e-4)


def test_smoothing_goes_into_the_norm_and_counts_all_that_read_it() -> None:
    graph, x = graph_with(CASES["layer_norm"], spread=2)
    after = smooth(graph, observe_channels(graph, in_memory(x=x)))
    assert after
    assert [n.op_type for n in after.nodes.values()] == [n.op_type for n in graph.nodes.values()]
    tensor = outputs(graph.model, "h", x=x)["h"]
    read = np.maximum(*(np.abs(inputs_of(graph, name)[0]).max(1) for name in "yz"))
    scale = np.abs(tensor).max((0, 1)) ** 0.5 / read**0.5
    for have, want in zip(inputs_of(after, "h"), inputs_of(graph, "h"), strict=True):
        np.testing.assert_allclose(have, want / scale, rtol=1e-4)


def test_other_readers_get_what_they_got() -> None:
    graph, x = graph_with(CASES["layer_norm_read_by_others"])
    after = smooth(graph, observe_channels(graph, in_memory(x=x)))
    assert after
    assert "h" in after.producers["y"].input
    assert after.producers["k"].input[0] != "h"
    np.testing.assert_array_equal(inputs_of(after, "h")[0], inputs_of(graph, "h")[0])


@pytest.mark.parametrize("name", ["x_smooth", "x_smoothing"])
def test_a_tensor_named_like_an_added_one(name: str) -> None:
    text = f"(float[N,6] x) => (float[N,5] y) {{ {name} = MatMul(x, w) y = MatMul({name}, v) }}"
    graph, x = graph_of(text, w=normal(6, 4), v=normal(4, 5)), normal(6, 6)
    after = smooth(graph, observe_channels(graph, in_memory(x=x)))
    assert after
    same_function(graph, after, x)
