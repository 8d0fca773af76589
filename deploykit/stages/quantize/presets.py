"""What INT8 means on each target: types, and where its fusions want Q/DQ pairs."""

from __future__ import annotations

from typing import Literal

from deploykit.environment import has_int8_dot_product
from deploykit.stages.quantize.levels import INT7, INT8, UINT8, Levels
from deploykit.values import Value

Target = Literal["ort-cpu", "openvino", "tensorrt"]
Scope = Literal["compute", "residual", "all"]

COMPUTE = ("Conv", "ConvTranspose", "MatMul", "Gemm")
"""Operators that hold nearly all multiply-accumulates."""
JOINS = ("Add", "Concat", "AveragePool", "GlobalAveragePool")
"""What lies between them in residual networks."""
FUNCTIONS = ("Mul", "Sigmoid", "LeakyRelu", "Softmax")
"""Element-wise functions that ONNX Runtime computes on integers."""

SCOPES: dict[Scope, tuple[str, ...]] = {
    "compute": COMPUTE,
    "residual": (*COMPUTE, *JOINS),
    "all": (*COMPUTE, *JOINS, *FUNCTIONS),
}


class Preset(Value):
    """Types and places of the Q/DQ pairs of a target. Weights are symmetric, per channel."""

    name: str
    activation: Literal["uint8", "int8"]
    """uint8 with a zero point, or int8 around zero."""
    weight_bits: Literal[7, 8]
    """7 where the CPU adds pairs of u8*s8 products in 16 bits, which 8 would overflow."""
    quantize_bias: bool
    """int32 bias with scale activation * weight; TensorRT's parser wants a float bias instead."""
    outputs: bool
    """Pairs behind the nodes too: ONNX Runtime's kernels write integers. The others fuse the bias,
    add and activation that follow into a node that reads integers."""
    scope: Scope
    """The operators to quantize where there is no way to choose."""
    scopes: tuple[Scope, ...]
    """The sets of operators to choose from."""
    reason: str

    @property
    def levels(self) -> Levels:
        """Of activations."""
        return UINT8 if self.activation == "uint8" else INT8

    @property
    def weight_levels(self) -> Levels:
        """Of weights."""
        return INT8 if self.weight_bits == 8 else INT7


def preset(target: Target, *, int8_dot_product: bool | None = None) -> Preset:
    """The preset of a target; on a CPU it depends on this machine unless told otherwise."""
    if target == "tensorrt":
        return Preset(
            name="tensorrt_wi8_ai8",
            activation="int8",
            weight_bits=8,
            quantize_bias=False,
            outputs=False,
            scope="residual",
            scopes=("residual",),
            reason="TensorRT's parser takes symmetric int8 with zero point 0 and a float bias only",
        )
    wide = has_int8_dot_product() if int8_dot_product is None else int8_dot_product
    return Preset(
        name=f"{target}_wi{8 if wide else 7}_au8",
        activation="uint8",
        weight_bits=8 if wide else 7,
        quantize_bias=target == "ort-cpu",
        outputs=target == "ort-cpu",
        scope="residual",
        scopes=("compute", "residual", "all") if target == "ort-cpu" else ("compute", "residual"),
        reason="8-bit dot product (VNNI or the like)"
        if wide
        else "no 8-bit dot product on this CPU: 7-bit weights keep 16-bit sums from saturating",
    )
