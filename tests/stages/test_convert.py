"""`convert` on a trained model, and on graphs that a 16-bit type breaks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.backends import open_session
from deploykit.dataset import Dataset, open_dataset
from deploykit.errors import AnswerIsNo, InputError
from deploykit.evaluation import collect
from deploykit.formats import onnx_file, open_model
from deploykit.stages.build import BuildOptions, build, unavailable
from deploykit.stages.convert import ConvertOptions, convert
from deploykit.stages.quantize import QuantizeOptions, quantize
from deploykit.values import Artifact
from tests.fixtures_core import refused

RNG = np.random.default_rng(0)


def constant(values: object, name: str, kind: type = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, kind), name)


def stored(
    folder: Path, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], opset: int = 17
) -> tuple[Artifact, Dataset]:
    """A model from x[batch, 8] to y[batch, 4], and 16 samples for it."""
    opsets = [helper.make_opsetid("", opset)]
    least = helper.find_min_ir_version_for(opsets)
    listed = [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in constants]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])], constants,
    )  # fmt: skip
    if least < 4:  # weights are inputs too there
        graph.input.extend(listed)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=least), folder / "m.onnx")
    np.savez(folder / "d.npz", x=RNG.normal(size=(16, 8)).astype(np.float32))
    return open_model(folder / "m.onnx"), open_dataset(folder / "d.npz")


WEIGHTS = constant(RNG.normal(size=(8, 4)), "w")
MATMUL = helper.make_node("MatMul", ["x", "w"], ["m"], "product")


def reasons(artifact: Artifact) -> dict[str, str]:
    return {row["node"]: row["reason"] for row in artifact.facts["float_nodes"]}


@pytest.mark.parametrize(("precision", "near"), [("fp16", 2e-3), ("bf16", 3e-2)])
def test_a_trained_model(
    teacher_onnx: Artifact, evaluation: Dataset, tmp_path: Path, precision: str, near: float
) -> None:
    out = tmp_path / "half.onnx"
    options = ConvertOptions.model_validate({"precision": precision})
    made = convert(teacher_onnx, options, data=evaluation, out=out)
    facts = made.facts
    assert (made.precision, made.inputs, made.outputs) == (
        precision, teacher_onnx.inputs, teacher_onnx.outputs,
    )  # fmt: skip
    assert onnx_file.precision(onnx_file.read(out)) == precision
    assert facts["multiply_accumulates_lowered"] == facts["multiply_accumulates"] > 0
    assert not facts["float_nodes"]
    assert 0 < facts["largest_relative_difference"] < near
    assert out.stat().st_size < 0.6 * teacher_onnx.path.stat().st_size
    if precision == "fp16":
        assert facts["verified_by"] == "ort-cpu"
        with open_session(teacher_onnx, "ort-cpu") as one, open_session(made, "ort-cpu") as other:
            want, have = (collect(s, evaluation.first(100))[0]["logits"] for s in (one, other))
        assert (want.argmax(1) == have.argmax(1)).mean() > 0.98
    else:
        assert facts["verified_by"].startswith("simulation")


def test_what_overflows_stays_in_float32(tmp_path: Path) -> None:
    nodes = [
        MATMUL,
        helper.make_node("Mul", ["m", "huge"], ["big"], "grow"),
        helper.make_node("Div", ["big", "huge"], ["y"], "shrink"),
    ]
    source, data = stored(tmp_path, nodes, [WEIGHTS, constant(1e5, "huge")])
    options = ConvertOptions(precision="fp16", simplify=False)
    made = convert(source, options, data=data, out=tmp_path / "h.onnx")
    assert set(reasons(made)) == {"grow", "shrink"}
    assert "overflow: the constant 'huge' holds 1e+05" in reasons(made)["grow"]
    options = ConvertOptions(precision="bf16", simplify=False)  # its largest number is float32's
    assert not reasons(convert(source, options, data=data, out=tmp_path / "b.onnx"))


def test_an_activation_that_overflows_on_the_data(tmp_path: Path) -> None:
    nodes = [MATMUL, helper.make_node("Exp", ["m"], ["e"], "exp"),
             helper.make_node("Log", ["e"], ["y"], "log")]  # fmt: skip
    steep = numpy_helper.from_array(numpy_helper.to_array(WEIGHTS) * 5, "w")
    source, data = stored(tmp_path, nodes, [steep])
    options = ConvertOptions(precision="fp16", simplify=False)
    made = convert(source, options, data=data, out=tmp_path / "h.onnx")
    assert set(reasons(made)) == {"exp", "log"}
    assert reasons(made)["exp"].startswith("overflow: magnitudes up to")


def test_the_node_that_loses_too_much_is_found(tmp_path: Path) -> None:
    """A difference of near numbers: they are equal once they are rounded."""
    nodes = [
        helper.make_node("Add", ["x", "shift"], ["far"], "far"),
        helper.make_node("Sub", ["far", "shift"], ["near"], "near"),
        helper.make_node("MatMul", ["near", "w"], ["y"], "product"),
    ]
    source, data = stored(tmp_path, nodes, [WEIGHTS, constant(3000.0, "shift")])
    options = ConvertOptions(precision="fp16", simplify=False)
    made = convert(source, options, data=data, out=tmp_path / "h.onnx")
    assert set(reasons(made)) == {"far", "near"}
    assert "loses too much" in reasons(made)["far"]
    assert made.facts["largest_relative_difference"] < 0.01


def test_scales_of_pairs_are_of_16_bits_unless_they_vanish(tmp_path: Path) -> None:
    def pair(name: str, source: str, scale: str, target: str) -> list[onnx.NodeProto]:
        ints = f"{target}_q"
        return [
            helper.make_node("QuantizeLinear", [source, scale, "z"], [ints], f"q_{name}"),
            helper.make_node("DequantizeLinear", [ints, scale, "z"], [target], f"d_{name}"),
        ]

    nodes = [
        *pair("in", "x", "s", "xd"),
        helper.make_node("MatMul", ["xd", "w"], ["m"], "product"),
        helper.make_node("Mul", ["m", "tiny"], ["t"], "shrink"),
        *pair("tiny", "t", "small", "td"),
        helper.make_node("Div", ["td", "tiny"], ["y"], "grow"),
    ]
    constants = [WEIGHTS, constant(0.03, "s"), constant(0, "z", np.int8), constant(1e-6, "tiny"),
                 constant(1e-7, "small")]  # fmt: skip
    source, data = stored(tmp_path, nodes, constants, opset=13)
    options = ConvertOptions(precision="fp16", tolerance=0.2)  # rounding moves some by a level
    made = convert(source, options, data=data, out=tmp_path / "h.onnx")
    assert made.precision == source.precision == "int8"
    assert made.facts["opset"] >= 19
    proto = onnx_file.read(tmp_path / "h.onnx")
    types = {t.name: t.data_type for t in proto.graph.initializer}
    scales = {n.name: types[n.input[1]] for n in proto.graph.node if n.name[:2] in ("q_", "d_")}
    assert scales["q_in"] == scales["d_in"] == TensorProto.FLOAT16
    assert scales["q_tiny"] == scales["d_tiny"] == TensorProto.FLOAT
    assert reasons(made)["q_tiny"] == "underflow: the scale 'small' is 1e-07"


def test_nodes_are_left_by_request(tmp_path: Path) -> None:
    source, data = stored(
        tmp_path, [MATMUL, helper.make_node("Relu", ["m"], ["y"], "relu")], [WEIGHTS]
    )
    options = ConvertOptions(precision="fp16", keep_float=("rel*",), simplify=False)
    made = convert(source, options, data=data, out=tmp_path / "h.onnx")
    assert reasons(made) == {"relu": "left in float32 by request"}
    options = ConvertOptions(precision="fp16", keep_float=("*",), simplify=False)
    with refused(AnswerIsNo, "0 of 32 multiply-accumulates", hint="stays in float32"):
        convert(source, options, data=data, out=tmp_path / "no.onnx")
    assert not (tmp_path / "no.onnx").exists()


@pytest.mark.parametrize("opset", [7, 9, 11])
def test_an_old_model_is_lifted(tmp_path: Path, opset: int) -> None:
    nodes = [MATMUL, helper.make_node("Softmax", ["m"], ["y"], axis=1)]
    source, data = stored(tmp_path, nodes, [WEIGHTS], opset)
    options = ConvertOptions(precision="fp32", simplify=False)
    made = convert(source, options, data=data, out=tmp_path / "new.onnx")
    assert made.facts["opset"] == 17
    assert f"opset lifted from {opset} to 17" in made.facts["prepared"]
    assert made.facts["largest_relative_difference"] < 1e-5


def test_nan_outputs_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    nodes = [MATMUL, helper.make_node("Log", ["m"], ["y"])]
    source, data = stored(tmp_path, nodes, [WEIGHTS])
    with refused(InputError, "output 'y' is NaN", hint="preprocessing"):
        convert(source, ConvertOptions(precision="fp16"), data=data, out=tmp_path / "h.onnx")
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "d.npz"}


def test_a_promise_that_cannot_be_kept_is_a_no(tmp_path: Path) -> None:
    source, data = stored(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [WEIGHTS])
    options = ConvertOptions(precision="fp16", tolerance=1e-9)
    with refused(AnswerIsNo, "allowed", hint="--tolerance"):
        convert(source, options, data=data, out=tmp_path / "h.onnx")


def test_a_16_bit_model_is_not_converted_again(tmp_path: Path) -> None:
    source, data = stored(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [WEIGHTS])
    half = convert(source, ConvertOptions(precision="fp16"), data=data, out=tmp_path / "h.onnx")
    with refused(InputError, "is fp16 already", hint="float32 model"):
        convert(half, ConvertOptions(precision="bf16"), data=data, out=tmp_path / "b.onnx")


def test_integers_of_tensorrt_are_judged_without_this_cpu_s_kernels(tmp_path: Path) -> None:
    """8-bit weights overflow the 16-bit sums of a CPU without VNNI: that is no loss of FP16."""
    hidden = constant(RNG.normal(size=(8, 64)), "u")
    last = constant(RNG.normal(size=(64, 4)), "v")
    nodes = [
        helper.make_node("MatMul", ["x", "u"], ["h"], "one"),
        helper.make_node("Relu", ["h"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "v"], ["y"], "two"),
    ]
    source, data = stored(tmp_path, nodes, [hidden, last])
    options = QuantizeOptions(
        target="tensorrt", calibration_method="minmax", corrections=("none",), scope="compute"
    )
    int8 = quantize(source, options, data=data, out=tmp_path / "q.onnx")
    made = convert(int8, ConvertOptions(precision="fp16"), data=data, out=tmp_path / "h.onnx")
    assert made.precision == "int8"
    kinds = {t.data_type for t in onnx.load(made.path).graph.initializer if "scale" in t.name}
    assert kinds == {TensorProto.FLOAT16}
    if not unavailable():
        shapes = {
            f"{kind}_shapes": (f"x:{n}x8",) for kind, n in (("min", 1), ("opt", 4), ("max", 8))
        }
        engine = build(made, BuildOptions.model_validate(shapes), out=tmp_path / "h.engine")
        assert engine.facts["compute_layers_quantized"] == 2
