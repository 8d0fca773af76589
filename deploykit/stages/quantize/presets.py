"""What INT8 means on each target. A preset differs in types and symmetry, never in calibration."""

from __future__ import annotations

from typing import Literal

from deploykit.environment import has_int8_dot_product
from deploykit.values import Value

Target = Literal["ort-cpu", "openvino", "tensorrt"]

TENSORRT = (
    "Conv", "ConvTranspose", "MatMul", "Gemm", "MaxPool", "AveragePool", "GlobalAveragePool",
)  # fmt: skip
"""Q/DQ on the inputs of these; a residual add then reads one int8 and one float input."""


class Preset(Value):
    """Types and symmetry of a quantized graph."""

    name: str
    activation: Literal["uint8", "int8"]
    symmetric_activation: bool
    reduce_range: bool
    """7-bit weights: u8*s8 pairs are added in 16 bits where the CPU has no 8-bit dot product."""
    quantize_bias: bool
    """int32 bias with scale activation * weight; TensorRT's parser wants a float bias instead."""
    quantize_outputs: bool
    """Q/DQ behind compute nodes too; TensorRT fuses the bias, add and activation that follow."""
    op_types: tuple[str, ...] | None
    """Operators to quantize, None for all that ONNX Runtime can."""
    reason: str


def preset(target: Target, *, int8_dot_product: bool | None = None) -> Preset:
    """The preset of a target; on a CPU it depends on this machine unless told otherwise.

    Weights are int8, symmetric and per channel everywhere.
    """
    if target == "tensorrt":
        return Preset(
            name="tensorrt_wi8_ai8",
            activation="int8",
            symmetric_activation=True,
            reduce_range=False,
            quantize_bias=False,
            quantize_outputs=False,
            op_types=TENSORRT,
            reason="TensorRT's parser takes symmetric int8 with zero point 0 and a float bias only",
        )
    wide = has_int8_dot_product() if int8_dot_product is None else int8_dot_product
    return Preset(
        name=f"{target}_wi{8 if wide else 7}_au8",
        activation="uint8",
        symmetric_activation=False,
        reduce_range=not wide,
        quantize_bias=target == "ort-cpu",
        quantize_outputs=True,
        op_types=None,
        reason="8-bit dot product (VNNI or the like)"
        if wide
        else "no 8-bit dot product on this CPU: 7-bit weights keep 16-bit sums from saturating",
    )
