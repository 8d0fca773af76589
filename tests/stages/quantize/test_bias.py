"""The mean error of rounded weights is taken off each output channel."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from deploykit.formats.onnx_graph import Graph, with_constants
from deploykit.stages.quantize.bias import bias_corrected
from deploykit.stages.quantize.channels import observe_channels
from deploykit.values import Array
from tests.formats.test_onnx_graph import graph_of, normal, outputs
from tests.stages.quantize.test_channels import in_memory

IMAGE = "(float[N,4,7,7] x) => (float[N,6,5,5] y)"
ROWS = "(float[N,6] x) => (float[N,5] y)"
SEQUENCE = "(float[N,3,6] x) => (float[N,3,5] y)"
CASES = {
    "conv": (f"{IMAGE} {{ y = Conv(x, w, b) }}", {"w": (6, 4, 3, 3), "b": (6,)}),
    "conv_without_bias": (f"{IMAGE} {{ y = Conv(x, w) }}", {"w": (6, 4, 3, 3)}),
    "grouped": (f"{IMAGE} {{ y = Conv<group=2>(x, w, b) }}", {"w": (6, 2, 3, 3), "b": (6,)}),
    "depthwise": (
        "(float[N,4,7,7] x) => (float[N,8,5,5] y) { y = Conv<group=4>(x, w) }",
        {"w": (8, 1, 3, 3)},
    ),
    "one_dimension": (
        "(float[N,4,7] x) => (float[N,6,5] y) { y = Conv(x, w) }", {"w": (6, 4, 3)},
    ),
    "gemm": (f"{ROWS} {{ y = Gemm(x, w, b) }}", {"w": (6, 5), "b": (5,)}),
    "gemm_turned": (f"{ROWS} {{ y = Gemm<transB=1>(x, w, b) }}", {"w": (5, 6), "b": (5,)}),
    "gemm_square_turned": (
        "(float[N,6] x) => (float[N,6] y) { y = Gemm<transB=1>(x, w) }", {"w": (6, 6)},
    ),
    "gemm_without_bias": (f"{ROWS} {{ y = Gemm(x, w) }}", {"w": (6, 5)}),
    "gemm_scaled": (
        f"{ROWS} {{ y = Gemm<alpha=0.5, beta=4.0>(x, w, b) }}", {"w": (6, 5), "b": (5,)},
    ),
    "gemm_scaled_without_bias": (
        f"{ROWS} {{ y = Gemm<alpha=0.5, beta=4.0>(x, w) }}", {"w": (6, 5)},
    ),
    "gemm_adds_one_number": (f"{ROWS} {{ y = Gemm(x, w, b) }}", {"w": (6, 5), "b": ()}),
    "gemm_adds_a_row": (f"{ROWS} {{ y = Gemm(x, w, b) }}", {"w": (6, 5), "b": (1, 5)}),
    "matmul": (f"{SEQUENCE} {{ h = MatMul(x, w) y = Add(h, b) }}", {"w": (6, 5), "b": (5,)}),
    "matmul_square": (
        "(float[N,6] x) => (float[N,6] y) { h = MatMul(x, w) y = Add(b, h) }",
        {"w": (6, 6), "b": (6,)},
    ),
    "matmul_and_rows": (
        f"{SEQUENCE} {{ h = MatMul(x, w) y = Add(h, b) }}", {"w": (6, 5), "b": (3, 5)},
    ),
}  # fmt: skip


def data_for(text: str) -> Array:
    """Inputs whose channels have means of their own."""
    shape = [int(n) for n in text.partition("]")[0].partition("[N,")[2].split(",")]
    axis = 0 if "Conv" in text else -1
    turned = [1] * len(shape)
    turned[axis] = -1
    means: Array = 2 * normal(shape[axis], seed=3).reshape(turned)
    return np.asarray(normal(20, *shape, seed=1) + means)


def rounded(graph: Graph, step: float = 0.5) -> tuple[Graph, dict[str, Array]]:
    """The graph with coarse weights, and their errors by node."""
    coarse, errors = {}, {}
    for name, node in graph.nodes.items():
        weights = graph.constant(node.input[1]) if node.op_type in ("Conv", "Gemm", "MatMul") else 0
        if weights is not None and not isinstance(weights, int):
            coarse[name, 1] = np.rint(weights / step) * step
            errors[name] = coarse[name, 1] - weights
    return with_constants(graph, coarse), errors


def corrected(graph: Graph, x: Array) -> tuple[Graph, Graph]:
    """The graph with coarse weights, without correction and with it."""
    coarse, errors = rounded(graph)
    better = bias_corrected(graph, errors, observe_channels(graph, in_memory(x=x)))
    assert better
    onnx.checker.check_model(better.model, full_check=True)
    return coarse, rounded(better)[0]


@pytest.mark.parametrize(("text", "constants"), CASES.values(), ids=CASES)
def test_the_mean_of_each_output_channel_is_that_of_the_float_layer(
    text: str, constants: dict[str, tuple[int, ...]]
) -> None:
    graph, x = (
        graph_of(text, **{n: normal(*s, seed=2) for n, s in constants.items()}),
        data_for(text),
    )
    if "Conv" in text:  # each tap of a window sees the same mean where all positions are alike
        x = np.broadcast_to(x.mean(axis=tuple(range(2, x.ndim)), keepdims=True), x.shape)
    before = graph.model.SerializeToString()
    coarse, better = corrected(graph, x)
    axes = tuple(i for i in range(outputs(graph.model, x=x)["y"].ndim))
    channel = 1 if "Conv" in text else axes[-1]
    others = tuple(i for i in axes if i != channel)
    want, plain, have = (outputs(g.model, x=x)["y"].mean(others) for g in (graph, coarse, better))
    assert np.abs(plain - want).max() > 0.05
    np.testing.assert_allclose(have, want, atol=1e-5)
    assert graph.model.SerializeToString() == before


def test_a_convolution_with_padding_comes_near() -> None:
    text = IMAGE.replace("5,5]", "7,7]") + " { y = Conv<pads=[1,1,1,1]>(x, w, b) }"
    graph, x = graph_of(text, w=normal(6, 4, 3, 3), b=normal(6)), data_for(text)
    want, plain, have = (
        outputs(g.model, x=x)["y"].mean((0, 2, 3)) for g in (graph, *corrected(graph, x))
    )
    assert np.abs(have - want).max() < 0.5 * np.abs(plain - want).max()


def test_a_bias_that_is_shared_is_corrected_for_each() -> None:
    text = "(float[N,6] x) => (float[N,6] y) { h = Gemm(x, w, b) y = Gemm(h, v, b) }"
    graph, x = graph_of(text, w=normal(6, 6), v=normal(6, 6, seed=1), b=normal(6)), data_for(text)
    _, errors = rounded(graph)
    better = bias_corrected(graph, errors, observe_channels(graph, in_memory(x=x)))
    assert better
    h = outputs(graph.model, "h", x=x)["h"]
    for node, values in zip(better.nodes.values(), (x, h), strict=True):
        bias = better.constant(node.input[2])
        assert bias is not None
        shift = errors[node.name].T @ values.mean(0, dtype=np.float64)
        np.testing.assert_allclose(bias, normal(6) - shift, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    [
        "(float[N,6] x) => (float[N,5] y) { y = MatMul(x, w) }",
        "(float[N,6] x) => (float[N,5] y) { h = MatMul(x, w) y = Relu(h) }",
        "(float[N,6] x) => (float[N,5] y, float[N,5] h) { h = MatMul(x, w) y = Add(h, b) }",
        "(float[N,6] x) => (float[N,5] y) { h = MatMul(x, w) a = Abs(h) y = Add(h, a) }",
        "(float[N,6] x) => (float[N,5] y) { h = MatMul(x, w) y = Mul(h, b) }",
        "(float[N,6] x) => (float[N,5] y) { c = ReduceMean<axes=[1]>(x) y = Gemm(x, w, c) }",
        "(float[N,6] x) => (float[N,5] y) { y = Gemm<beta=0.0>(x, w) }",
    ],
)
def test_where_no_bias_can_take_it_there_is_none(text: str) -> None:
    graph, x = graph_of(text, w=normal(6, 5), b=normal(5)), data_for(text)
    channels = observe_channels(graph, in_memory(x=x))
    assert bias_corrected(graph, rounded(graph)[1], channels) is None


def test_a_transposed_convolution_is_left_alone() -> None:
    text = "(float[N,3,4,4] x) => (float[N,5,5,5] y) { y = ConvTranspose(x, w, b) }"
    graph, x = graph_of(text, w=normal(3, 5, 2, 2), b=normal(5)), normal(8, 3, 4, 4)
    errors = {name: normal(3, 5, 2, 2) for name in graph.nodes}
    assert bias_corrected(graph, errors, observe_channels(graph, in_memory(x=x))) is None


def test_only_nodes_with_errors_are_corrected() -> None:
    text = "(float[N,6] x) => (float[N,6] y) { h = Gemm(x, w, b) y = Gemm(h, v, b) }"
    graph, x = graph_of(text, w=normal(6, 6), v=normal(6, 6, seed=1), b=normal(6)), data_for(text)
    last = graph.producers["y"].name
    errors = {last: rounded(graph)[1][last]}
    better = bias_corrected(graph, errors, observe_channels(graph, in_memory(x=x)))
    assert better
    assert better.producers["h"].input[2] == "b"
    assert better.producers["y"].input[2] != "b"
