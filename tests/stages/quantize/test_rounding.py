"""Weights rounded so that the layer's output changes least."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.formats.onnx_graph import Graph, channel_axis, with_constants
from deploykit.stages.quantize import rounding
from deploykit.stages.quantize.levels import INT7, INT8, Levels
from deploykit.stages.quantize.qdq import integer_weights, weight_scales
from deploykit.stages.quantize.rounding import adaptive
from deploykit.values import Array
from tests.formats.test_onnx_graph import graph_of, normal, outputs, parsed
from tests.stages.quantize.test_channels import in_memory

INT4 = Levels(-8, 7, symmetric=True)
"""Coarse, so that rounding counts."""
CASES = {
    "conv": ("y = Conv(x, w, b)", (4, 8, 8), (6, 4, 3, 3)),
    "padded": ("y = Conv<pads=[2,1,0,1]>(x, w)", (4, 8, 8), (6, 4, 3, 2)),
    "strided": ("y = Conv<strides=[2,3]>(x, w)", (4, 9, 9), (6, 4, 3, 2)),
    "dilated": ("y = Conv<dilations=[2,3]>(x, w)", (4, 9, 9), (6, 4, 3, 2)),
    "all_three": (
        "y = Conv<dilations=[1,2], strides=[2,1], pads=[1,2,2,1], group=2>(x, w)",
        (4, 9, 9), (6, 2, 2, 3),
    ),
    "valid": ('y = Conv<auto_pad="VALID">(x, w)', (4, 8, 8), (6, 4, 3, 3)),
    "grouped": ("y = Conv<group=2>(x, w, b)", (4, 8, 8), (6, 2, 3, 3)),
    "depthwise": ("y = Conv<group=4>(x, w)", (4, 8, 8), (8, 1, 3, 3)),
    "pointwise": ("y = Conv(x, w)", (16, 4, 4), (6, 16, 1, 1)),
    "gemm": ("y = Gemm(x, w, b)", (24,), (24, 6)),
    "gemm_turned": ("y = Gemm<transB=1>(x, w, b)", (24,), (6, 24)),
    "gemm_square_turned": ("y = Gemm<transB=1>(x, w)", (12,), (12, 12)),
    "matmul": ("y = MatMul(x, w)", (5, 24), (24, 6)),
    "matmul_square": ("y = MatMul(x, w)", (5, 12), (12, 12)),
    "more_than_a_block": ("y = MatMul(x, w)", (5, 150), (150, 6)),
}  # fmt: skip
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def layer(case: tuple[str, tuple[int, ...], tuple[int, ...]]) -> tuple[Graph, Array]:
    """One layer on inputs whose channels go together, as those of real layers do."""
    body, shape, weights = case
    named = ",".join(map(str, shape))
    result = ",".join(f"d{i}" for i in range(len(shape)))
    text = f"(float[N,{named}] x) => (float[N,{result}] y) {{ {body} }}"
    graph = graph_of(text, w=normal(*weights), b=normal(6))
    axis = 1 if "Conv" in body else -1
    mixing = normal(shape[axis - 1 if axis == 1 else -1], shape[axis - 1 if axis == 1 else -1])
    mixed = np.moveaxis(np.moveaxis(normal(24, *shape, seed=1), axis, -1) @ mixing, -1, axis)
    return graph, mixed + np.float32(1)


def scales(graph: Graph, levels: Levels) -> dict[str, Array]:
    found = {}
    for name, node in graph.nodes.items():
        weights = graph.constant(node.input[1])
        assert weights is not None
        found[name] = weight_scales(weights, channel_axis(node), levels).astype(np.float32)
    return found


def error(graph: Graph, integers: dict[str, Array], x: Array) -> float:
    """Squared, of the output y with these weights."""
    values = {}
    for name, levels in integers.items():
        node = graph.nodes[name]
        weights = graph.constant(node.input[1])
        assert weights is not None
        shape = [1] * weights.ndim
        shape[channel_axis(node)] = -1
        values[name, 1] = levels * scales(graph, INT4)[name].reshape(shape)
    want, have = (outputs(g.model, x=x)["y"] for g in (graph, with_constants(graph, values)))
    return float(((have.astype(np.float64) - want) ** 2).sum())


def to_nearest(graph: Graph, levels: Levels) -> dict[str, Array]:
    found = {}
    for name, node in graph.nodes.items():
        weights = graph.constant(node.input[1])
        assert weights is not None
        scale = scales(graph, levels)[name]
        found[name] = integer_weights(weights, scale, channel_axis(node), levels)
    return found


@EACH
def test_the_output_changes_less_than_with_rounding_to_nearest(
    case: tuple[str, tuple[int, ...], tuple[int, ...]],
) -> None:
    graph, x = layer(case)
    made = adaptive(graph, scales(graph, INT4), INT4, in_memory(x=x))
    nearest = to_nearest(graph, INT4)
    ((name, integers),) = made.items()
    assert integers.shape == case[2]
    assert (integers == np.rint(integers)).all()
    assert integers.min() >= INT4.lowest
    assert integers.max() <= INT4.highest
    assert (integers != nearest[name]).any()
    assert np.abs(integers - nearest[name]).max() <= 4  # it is rounding still
    assert error(graph, made, x) < 0.95 * error(graph, nearest, x)


@EACH
def test_input_vectors_are_those_that_the_weights_multiply(
    case: tuple[str, tuple[int, ...], tuple[int, ...]],
) -> None:
    """The squared output without bias is the moment between the weights: y^T y = w^T (x x^T) w."""
    graph, x = layer((case[0].replace(", b)", ")"), *case[1:]))
    (node,) = graph.nodes.values()
    moment = rounding._moments(graph, [node], in_memory(x=x))[node.name]
    rows = rounding._rows(node, normal(*case[2]))
    y = outputs(graph.model, x=x)["y"]
    channel = 1 if node.op_type == "Conv" else y.ndim - 1
    want = (y.astype(np.float64) ** 2).sum(tuple(i for i in range(y.ndim) if i != channel))
    have = np.einsum("goi,gij,goj->go", rows, moment, rows, dtype=np.float64).reshape(-1)
    np.testing.assert_allclose(have, want, rtol=1e-3)


def test_inputs_that_do_not_go_together_are_rounded_to_nearest() -> None:
    """Where the moment is diagonal nothing can make an error good."""
    x = np.eye(12, dtype=np.float32)
    graph = graph_of("(float[N,12] x) => (float[N,6] y) { y = MatMul(x, w) }", w=normal(12, 6))
    made = adaptive(graph, scales(graph, INT8), INT8, in_memory(x=x))
    (integers,), (nearest,) = made.values(), to_nearest(graph, INT8).values()
    np.testing.assert_array_equal(integers, nearest)


def test_errors_are_handed_on_from_block_to_block(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x = layer(CASES["gemm"])
    found: list[Array] = []
    for size in (1000, 5):
        monkeypatch.setattr(rounding, "BLOCK", size)
        found += adaptive(graph, scales(graph, INT4), INT4, in_memory(x=x)).values()
    assert (found[0] == found[1]).mean() > 0.97  # but for what lies at the middle of two levels


def test_two_inputs_that_are_equal_share_their_error() -> None:
    """0.4 + 0.4 steps are 1 step in all, where rounding to nearest makes 0 of it."""
    w = np.array([[7.0, 0.4, 0.4]], np.float32)
    text = "(float[N,3] x) => (float[N,1] y) { y = Gemm<transB=1>(x, w) }"
    x = np.stack([normal(20), *[normal(20, seed=1)] * 2], 1)
    graph = graph_of(text, w=w)
    (made,) = adaptive(graph, scales(graph, INT4), INT4, in_memory(x=x)).values()
    assert made[0, 0] == 7
    assert sorted(made[0, 1:]) == [0, 1]


@pytest.mark.parametrize("levels", [INT8, INT7, INT4])
def test_integers_stay_within_the_levels(levels: Levels) -> None:
    graph, x = layer(CASES["gemm"])
    narrow = {name: scale / 2 for name, scale in scales(graph, levels).items()}
    (made,) = adaptive(graph, narrow, levels, in_memory(x=x)).values()
    assert (made.min(), made.max()) == (levels.lowest, levels.highest)


def test_one_scale_for_all_channels() -> None:
    graph, x = layer(CASES["grouped"])
    (name,) = graph.nodes
    scale = np.asarray(np.abs(normal(6, 2, 3, 3)).max() / 127, np.float32)
    one = adaptive(graph, {name: scale}, INT8, in_memory(x=x))[name]
    many = adaptive(graph, {name: np.full(6, scale)}, INT8, in_memory(x=x))[name]
    np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize("size", [0.0, 1e-6, 1e6])
def test_inputs_of_any_size(size: float) -> None:
    graph, x = layer(CASES["gemm"])
    x[:, 3] *= size
    (made,) = adaptive(graph, scales(graph, INT8), INT8, in_memory(x=x)).values()
    assert np.isfinite(made).all()
    (nothing,) = adaptive(graph, scales(graph, INT8), INT8, in_memory(x=0 * x)).values()
    (nearest,) = to_nearest(graph, INT8).values()
    np.testing.assert_array_equal(nothing, nearest)


@pytest.mark.parametrize(
    "text",
    [
        "(float[N,3,4,4] x) => (float[N,4,5,5] y) { y = ConvTranspose(x, w) }",
        "(float[N,4,9] x) => (float[N,3,8] y) { y = Conv(x, u) }",
        '(float[N,4,4,4] x) => (float[N,3,4,4] y) { y = Conv<auto_pad="SAME_UPPER">(x, w) }',
    ],
)
def test_what_is_not_known_is_left_out(text: str) -> None:
    graph = graph_of(text, w=normal(3, 4, 2, 2), u=normal(3, 4, 2))
    shape = [int(n) for n in text.partition("]")[0].partition("[N,")[2].split(",")]
    scale = {name: np.ones((), np.float32) for name in graph.nodes}
    assert adaptive(graph, scale, INT8, in_memory(x=normal(4, *shape))) == {}


def test_layers_with_too_many_inputs_and_those_without_scales_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = """(float[N,6] x) => (float[N,5] y) {
        [one] h = MatMul(x, u) [two] k = MatMul(h, v) [three] y = MatMul(k, w)
    }"""
    graph = graph_of(text, u=normal(6, 8), v=normal(8, 5), w=normal(5, 5))
    monkeypatch.setattr(rounding, "LARGEST", 7)
    some = {name: scale for name, scale in scales(graph, INT8).items() if name != "three"}
    assert list(adaptive(graph, some, INT8, in_memory(x=normal(9, 6)))) == ["one"]


def test_layers_that_do_not_fit_together_are_done_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """(float[N,6] x) => (float[N,5] y) {
        h = MatMul(x, u) k = MatMul(h, v) y = MatMul(k, w)
    }"""
    graph = graph_of(text, u=normal(6, 8), v=normal(8, 5), w=normal(5, 5))
    data = in_memory(x=normal(9, 6))
    want = adaptive(graph, scales(graph, INT8), INT8, data)
    monkeypatch.setattr(rounding, "AT_ONCE", 80)
    have = adaptive(graph, scales(graph, INT8), INT8, data)
    assert list(have) == list(want) == list(graph.nodes)
    for name, integers in have.items():
        np.testing.assert_array_equal(integers, want[name])


def test_vectors_are_not_all_of_one_column_of_a_wide_image() -> None:
    """Every n-th position of a row-major image of width n would be."""
    (node,) = parsed(
        "(float[N,1,128,128] x) => (float[N,1,128,128] y) "
        "{ y = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w) }",
        w=normal(1, 1, 3, 3),
    ).graph.node
    columns = np.broadcast_to(np.arange(1, 129, dtype=np.float32), (1, 1, 128, 128))
    vectors = rounding._vectors(node, columns, (1, 1, 3, 3), 128)
    assert vectors.shape == (1, 9, 128)
    assert len(np.unique(vectors[0, 4])) > 64  # of the middle tap


def test_the_root_is_of_the_damped_inverse() -> None:
    moment = np.cov(normal(5, 40)).astype(np.float32)
    root = rounding._root_of_inverse(moment)
    damped = moment + 0.01 * np.diag(moment).mean() * np.eye(5)
    np.testing.assert_allclose(root.T @ root, np.linalg.inv(damped), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(np.tril(root, -1), 0)
