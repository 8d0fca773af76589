"""One layer as an ONNX file of its own, to be timed: a convolution or a matrix product.

The weights are random: the time of a dense kernel does not depend on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from deploykit._lazy import needs
from deploykit.values import Artifact, TensorSpec, Value

OPSET, IR_VERSION = 20, 10
SCALE = 0.02


class LayerShape(Value):
    """What decides the time of a layer: sizes, and nothing of its weights."""

    operator: Literal["Conv", "MatMul"]
    inputs: int
    outputs: int
    around: tuple[int, ...]
    """Sizes of the axes that are no channels: height and width, or the rows of a product."""
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample, with its axis of one."""
        if self.operator == "Conv":
            return (1, self.inputs, *self.around)
        return (1, *self.around, self.inputs)


def write(layer: LayerShape, precision: Literal["fp32", "int8"], path: Path) -> Artifact:
    """Write the layer with a ReLU behind it; int8: uint8 in and out, with Q/DQ pairs.

    Inside a network the tensors between integer layers are integers: so are the ends here.
    """
    with needs("onnx"):
        import onnx
        from onnx import TensorProto, helper
    builder = _Builder(layer, integer=precision == "int8")
    builder.fill()
    kind = TensorProto.UINT8 if builder.integer else TensorProto.FLOAT
    graph = helper.make_graph(
        builder.nodes,
        "layer",
        [helper.make_tensor_value_info("x", kind, layer.input_shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        builder.constants,
    )
    opset = [helper.make_opsetid("", OPSET)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION), path)
    dtype = "uint8" if builder.integer else "float32"
    return Artifact(
        path=path,
        format="onnx",
        precision=precision,
        inputs=(TensorSpec(name="x", dtype=dtype, shape=layer.input_shape),),
        outputs=(TensorSpec(name="y", dtype=dtype, shape=()),),
        sha256="",
    )


class _Builder:
    def __init__(self, layer: LayerShape, *, integer: bool) -> None:
        self.layer, self.integer = layer, integer
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._rng = np.random.default_rng(0)

    def fill(self) -> None:
        """Add the nodes from `x` to `y`."""
        weight, bias = self._weight()
        x = self._pair_end("x") if self.integer else "x"
        if self.layer.operator == "Conv":
            self._node("Conv", [x, weight, bias], "made", **self._attributes())
        else:
            self._node("MatMul", [x, weight], "product")
            self._node("Add", ["product", bias], "made")
        self._node("Relu", ["made"], "positive" if self.integer else "y")
        if self.integer:
            self._node("QuantizeLinear", ["positive", *self._grid()], "y")

    def _weight(self) -> tuple[str, str]:
        layer = self.layer
        conv = layer.operator == "Conv"
        shape = (
            (layer.outputs, layer.inputs // layer.groups, *layer.kernel)
            if conv
            else (layer.inputs, layer.outputs)
        )
        bias = self._rng.normal(size=layer.outputs)
        if not self.integer:
            weight = self._constant("w", self._rng.normal(size=shape).astype(np.float32))
            return weight, self._constant("b", bias.astype(np.float32))
        axis = 0 if conv else 1
        integers = self._rng.integers(-127, 128, shape).astype(np.int8)
        return (
            self._dequantized("w", integers, SCALE, axis),
            self._dequantized("b", (bias * 100).astype(np.int32), SCALE**2, 0)
            if conv
            else self._constant("b", bias.astype(np.float32)),
        )

    def _dequantized(self, name: str, integers: Any, scale: float, axis: int) -> str:
        scales = self._constant(f"{name}_scale", np.full(self.layer.outputs, scale, np.float32))
        zeros = self._constant(f"{name}_zero", np.zeros(self.layer.outputs, integers.dtype))
        raw = self._constant(f"{name}_integers", integers)
        self._node("DequantizeLinear", [raw, scales, zeros], name, axis=axis)
        return name

    def _pair_end(self, name: str) -> str:
        self._node("DequantizeLinear", [name, *self._grid()], f"{name}_float")
        return f"{name}_float"

    def _grid(self) -> tuple[str, str]:
        if not any(constant.name == "scale" for constant in self.constants):
            self._constant("scale", np.float32(SCALE))
            self._constant("zero", np.uint8(0))
        return "scale", "zero"

    def _attributes(self) -> dict[str, Any]:
        layer = self.layer
        return {
            "kernel_shape": list(layer.kernel),
            "strides": list(layer.stride),
            "pads": [*layer.padding, *layer.padding],
            "dilations": list(layer.dilation),
            "group": layer.groups,
        }

    def _constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
