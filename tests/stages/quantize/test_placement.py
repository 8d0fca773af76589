from __future__ import annotations

import numpy as np
import pytest

from deploykit.errors import UsageError
from deploykit.stages.quantize import preset
from deploykit.stages.quantize.account import account
from deploykit.stages.quantize.placement import Plan, chosen, plan, unfit
from deploykit.stages.quantize.presets import SCOPES, Preset, Target
from tests.formats.test_onnx_graph import CONV, graph_of, normal

ORT = preset("ort-cpu", int8_dot_product=True)
OPENVINO = preset("openvino", int8_dot_product=True)
TENSORRT = preset("tensorrt")
IMAGE = "(float[N,3,8,8] x) => (float[N,4,8,8] y)"
W3, W4, BIAS = normal(4, 3, 3, 3), normal(4, 4, 3, 3), normal(4)
fusing = pytest.mark.parametrize("target", [OPENVINO, TENSORRT], ids=["openvino", "tensorrt"])


def placed(
    text: str, target: Preset = ORT, barred: tuple[str, ...] = (), **constants: np.ndarray
) -> Plan:
    """The plan for all nodes that any scope takes in."""
    graph = graph_of(text, **constants)
    return plan(graph, chosen(graph, SCOPES["all"]), target, barred=barred)


def test_conv_relu_is_one_integer_node_with_its_pair_behind_the_relu() -> None:
    made = placed(f"{IMAGE} {{ [c] h = {CONV}(x, w, b) [r] y = Relu(h) }}", w=W3, b=BIAS)
    assert made.nodes == {"c": "integer", "r": "fused"}
    assert made.written == {"y"}
    assert made.read == {"x": {"c"}}
    assert made.weights == {("c", 1): 0}
    assert made.biases == {"c"}
    assert made.tensors == {"x", "y"}


def test_conv_clip_too() -> None:
    made = placed(
        f"{IMAGE} {{ [c] h = {CONV}(x, w) [r] y = Clip(h, lo, hi) }}",
        w=W3,
        lo=np.array(0, np.float32),
        hi=np.array(6, np.float32),
    )
    assert made.nodes == {"c": "integer", "r": "fused"}
    assert made.written == {"y"}
    assert not made.biases
    assert ("r", 1) not in made.weights


def test_a_relu_that_shares_its_input_is_not_fused() -> None:
    made = placed(
        f"(float[N,3,8,8] x) => (float[N,4,8,8] y, float[N,4,8,8] z)"
        f"{{ [c] h = {CONV}(x, w) [r] y = Relu(h) [s] z = Neg(h) }}",
        w=W3,
    )
    assert made.nodes == {"c": "integer"}
    assert made.written == {"h"}


RESIDUAL = f"""{IMAGE} {{
    [stem] s = {CONV}(x, w)
    [body] h = {CONV}(s, v, b)
    [add] a = Add(h, s)
    [relu] r = Relu(a)
    [tail] y = {CONV}(r, u)
}}"""
RESIDUAL_WEIGHTS = {"w": W3, "v": W4, "b": BIAS, "u": W4 + 1}


def test_a_residual_add_reads_two_integers_and_writes_behind_its_relu() -> None:
    made = placed(RESIDUAL, **RESIDUAL_WEIGHTS)
    assert made.nodes["add"] == "integer"
    assert made.nodes["relu"] == "fused"
    assert made.written == {"s", "h", "r", "y"}
    assert made.read == {"x": {"stem"}}


def test_max_pool_between_convolutions_moves_integers_on_one_grid() -> None:
    made = placed(
        f"""(float[N,3,8,8] x) => (float[N,4,4,4] y) {{
            [one] h = {CONV}(x, w)
            [pool] p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(h)
            [two] y = {CONV}(p, v)
        }}""",
        w=W3,
        v=W4,
    )
    assert made.nodes["pool"] == "moves"
    assert made.written == {"h", "p", "y"}
    assert made.same == {"p": "h"}
    assert made.root("p") == "h"
    assert made.tensors == {"x", "h", "y"}


def test_a_move_that_no_integer_node_reads_stays_in_float() -> None:
    made = placed(
        f"""(float[N,3,8,8] x) => (float[N,4,4,4] y) {{
            [one] h = {CONV}(x, w)
            [pool] y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(h)
        }}""",
        w=W3,
    )
    assert made.nodes == {"one": "integer"}
    assert not made.same


def test_a_matrix_product_reads_integers_and_its_result_stays_float() -> None:
    made = placed("(float[N,6] x) => (float[N,5] y) { [m] y = MatMul(x, w) }", w=normal(6, 5))
    assert made.nodes == {"m": "integer"}
    assert made.read == {"x": {"m"}}
    assert made.weights == {("m", 1): -1}
    assert not made.written


def test_a_matrix_product_of_two_activations_reads_both() -> None:
    made = placed("(float[N,6,6] x) => (float[N,6,6] y) { h = Exp(x) [m] y = MatMul(x, h) }")
    assert made.read == {"x": {"m"}, "h": {"m"}}
    assert not made.weights


def test_an_output_of_the_model_is_not_rounded() -> None:
    text = "(float[N,6] x) => (float[N,5] y) { [m] h = MatMul(x, w) [s] y = Softmax(h) }"
    graph = graph_of(text, w=normal(6, 5))
    assert unfit(graph, "s", (), ORT) == "an output of the model is not worth rounding"
    made = plan(graph, ("m", "s"), ORT)
    assert made.nodes == {"m": "integer"}
    assert not made.written & graph.outputs


def test_nor_through_a_fused_relu() -> None:
    text = "(float[N,6] x) => (float[N,6] y) { [a] h = Add(x, x) [r] y = Relu(h) }"
    assert not placed(text).nodes


def test_a_tensor_with_masks_bars_the_nodes_around_it() -> None:
    text = """(float[N,6,6] x, float[N,6,6] mask) => (float[N,6,6] y) {
        [m] s = MatMul(x, x)
        [a] t = Add(s, mask)
        [f] p = Softmax(t)
        [n] y = MatMul(p, x)
    }"""
    assert set(placed(text).nodes) == {"m", "a", "f", "n"}
    made = placed(text, barred=("mask", "t"))
    assert set(made.nodes) == {"m", "n"}
    assert "mask" not in made.tensors
    assert "t" not in made.tensors
    assert unfit(graph_of(text), "a", ("mask",), ORT) == "'mask' holds masks or infinite values"
    assert unfit(graph_of(text), "a", ("t",), ORT) == "'t' holds masks or infinite values"


def test_a_barred_result_of_a_move_ends_the_way_of_integers() -> None:
    text = f"""(float[N,3,8,8] x) => (float[N,4,4,4] y) {{
        [one] h = {CONV}(x, w)
        [pool] p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(h)
        [two] y = {CONV}(p, v)
    }}"""
    made = placed(text, barred=("p",), w=W3, v=W4)
    assert made.nodes == {"one": "integer"}


def test_a_split_of_which_one_part_is_barred_moves_no_integers() -> None:
    text = f"""(float[N,3,8,8] x) => (float[N,4,8,8] y, float[N,2,8,8] z) {{
        [one] h = {CONV}(x, w)
        [split] p, q = Split<axis=1>(h)
        [two] y = {CONV}(p, v)
        z = Neg(q)
    }}"""
    weights = {"w": W3, "v": normal(4, 2, 3, 3)}
    assert placed(text, **weights).nodes["split"] == "moves"
    assert "split" not in placed(text, barred=("q",), **weights).nodes


@pytest.mark.parametrize("kind", ["int32", "double", "float16"])
def test_other_types_stay_as_they_are(kind: str) -> None:
    text = f"({kind}[N,6] x, {kind}[6,5] z) => ({kind}[N,5] y) {{ [m] y = MatMul(x, z) }}"
    graph = graph_of(text)
    assert unfit(graph, "m", (), ORT) == "'x' is not known to be float32"
    assert not plan(graph, ("m",), ORT).nodes


def test_a_constant_of_another_type_does_too() -> None:
    graph = graph_of(
        "(float[N,6] x) => (double[N,5] y) { d = Cast<to=11>(x) [m] y = MatMul(d, w) }",
        w=np.ones((6, 5)),
    )
    assert unfit(graph, "m", (), ORT) == "'d' is not known to be float32"


def test_a_node_of_constants_only_stays() -> None:
    graph = graph_of(
        "(float[2] x) => (float[2] y, float[3] z) { y = Relu(x) [m] z = MatMul(v, w) }",
        v=normal(2),
        w=normal(2, 3),
    )
    assert unfit(graph, "m", (), ORT) == "it reads constants only"
    assert not plan(graph, ("m",), ORT).nodes


def test_constants_that_are_added_become_integers_for_onnx_runtime_only() -> None:
    text = "(float[N,4] x) => (float[N,4] y) { [a] h = Add(x, c) y = Neg(h) }"
    assert placed(text, c=BIAS).weights == {("a", 1): None}
    assert not placed(text, OPENVINO, c=BIAS).weights


@fusing
def test_no_pair_lies_between_conv_and_relu(target: Preset) -> None:
    made = placed(RESIDUAL, target, **RESIDUAL_WEIGHTS)
    assert not made.written
    assert set(made.read) == {"x", "s", "r"}
    assert made.read["r"] == {"tail"}


@fusing
def test_one_operand_of_a_residual_add_stays_float(target: Preset) -> None:
    made = placed(RESIDUAL, target, **RESIDUAL_WEIGHTS)
    assert "h" not in made.read  # the sum inside the convolution that makes it
    assert made.read["s"] == {"body", "add"}


@fusing
def test_of_two_convolutions_that_meet_in_an_add_one_fuses_it(target: Preset) -> None:
    made = placed(
        f"{IMAGE} {{ [p] g = {CONV}(x, w) [q] h = {CONV}(x, v) [add] y = Add(g, h) }}",
        target,
        w=W3,
        v=W3 + 1,
    )
    assert made.read == {"x": {"p", "q"}, "h": {"add"}}


@fusing
def test_an_add_that_nothing_fuses_is_not_told_as_quantized(target: Preset) -> None:
    graph = graph_of("(float[N,4] x) => (float[N,4] y) { g = Exp(x) h = Neg(x) [a] y = Add(g, h) }")
    made = plan(graph, ("a",), target)
    assert not made.read
    assert "Add" not in account(graph, made, {})["quantized_operators"]


@pytest.mark.parametrize(
    ("target", "activation", "symmetric", "bias"),
    [
        ("ort-cpu", "uint8", False, True),
        ("openvino", "uint8", False, False),
        ("tensorrt", "int8", True, False),
    ],
)
def test_types_of_a_target(target: Target, activation: str, *, symmetric: bool, bias: bool) -> None:
    made = preset(target, int8_dot_product=True)
    assert made.activation == activation
    assert made.levels.symmetric is symmetric
    assert made.quantize_bias is bias
    assert made.levels.fitted(-1, 3).zero_point == (0 if symmetric else 64)


@pytest.mark.parametrize(
    ("operator", "shape", "axis"),
    [
        ("ConvTranspose", (3, 5, 2, 2), 1),
        ("ConvTranspose<group=3>", (3, 5, 2, 2), None),
        ("Conv<group=3>", (6, 1, 2, 2), 0),
    ],
)
def test_channels_of_convolutions_in_groups(
    operator: str, shape: tuple[int, ...], axis: int | None
) -> None:
    made = placed(
        f"(float[N,3,4,4] x) => (float[N,a,b,c] y) {{ [c] y = {operator}(x, w) }}", w=normal(*shape)
    )
    assert made.weights == {("c", 1): axis}


@pytest.mark.parametrize("shape", [(2, 6, 5), (6,)])
def test_weights_of_a_product_that_are_no_matrix_have_one_scale(shape: tuple[int, ...]) -> None:
    text = "(float[2,4,6] x) => (float y) { [m] h = MatMul(x, w) y = ReduceSum<keepdims=0>(h) }"
    assert placed(text, w=normal(*shape)).weights == {("m", 1): None}


def test_patterns_take_in_and_leave_out() -> None:
    graph = graph_of(RESIDUAL, **RESIDUAL_WEIGHTS)
    assert chosen(graph, ("Conv",)) == ("stem", "body", "tail")
    assert chosen(graph, ("Conv",), include=("[sb]*",)) == ("stem", "body")
    assert chosen(graph, ("Conv", "Add"), exclude=("s*", "tail")) == ("body", "add")
    with pytest.raises(UsageError, match="no node or module matches 'bodi'") as caught:
        chosen(graph, ("Conv",), exclude=("bodi",))
    assert "body" in caught.value.hint


def test_a_node_left_out_gets_no_pair_but_its_neighbours_keep_theirs() -> None:
    graph = graph_of(RESIDUAL, **RESIDUAL_WEIGHTS)
    made = plan(graph, ("stem", "tail"), ORT)
    assert made.nodes == {"stem": "integer", "tail": "integer"}
    assert made.written == {"s", "y"}
    assert made.read == {"x": {"stem"}, "r": {"tail"}}
