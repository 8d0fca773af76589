"""What a precision means on each target: types, and where its fusions want Q/DQ pairs."""

from __future__ import annotations

from typing import Literal

from deploykit.environment import has_int8_dot_product
from deploykit.errors import UsageError
from deploykit.formats.onnx_graph import COMPUTE
from deploykit.stages.quantize.blocks import BLOCK, LARGE
from deploykit.stages.quantize.levels import FP8, INT4, INT7, INT8, UINT8, Levels
from deploykit.stages.quantize.methods import METHODS, Method
from deploykit.values import Value

Target = Literal["ort-cpu", "openvino", "tensorrt"]
Scope = Literal["compute", "residual", "all"]
Quantized = Literal["int8", "fp8", "int4"]
"""Precisions that a model can be quantized to."""

JOINS = ("Add", "Concat", "AveragePool", "GlobalAveragePool")
"""What lies between them in residual networks."""
FUNCTIONS = ("Mul", "Sigmoid", "LeakyRelu", "Softmax")
"""Element-wise functions that ONNX Runtime computes on integers."""

TABLES = ("Gather",)
"""Lookups in embedding tables, which are most of the weights of a small language model."""

SCOPES: dict[Scope, tuple[str, ...]] = {
    "compute": (*COMPUTE, *TABLES),
    "residual": (*COMPUTE, *TABLES, *JOINS),
    "all": (*COMPUTE, *TABLES, *JOINS, *FUNCTIONS),
}
OPSETS: dict[Quantized, int] = {"int8": 13, "fp8": 19, "int4": 21}
"""From where on DequantizeLinear has an axis, takes float8, and takes blocks of int4."""


class Preset(Value):
    """Types and places of the Q/DQ pairs of a target. Weights are symmetric, per channel."""

    name: str
    activation: Literal["uint8", "int8", "fp8"] | None
    """uint8 with a zero point, int8 or fp8 (E4M3) around zero; None where they stay in float and
    weights alone are quantized, in blocks."""
    weight_bits: Literal[4, 7, 8]
    """7 where the CPU adds pairs of u8*s8 products in 16 bits, which 8 would overflow."""
    quantize_bias: bool
    """int32 bias with scale activation * weight; TensorRT's parser wants a float bias instead."""
    tables: bool
    """Embedding tables may be integers: on CPUs."""
    outputs: bool
    """Pairs behind the nodes too: ONNX Runtime's kernels write integers. The others fuse the bias,
    add and activation that follow into a node that reads integers."""
    depthwise: bool
    """Convolutions of one channel a group may be integers: TensorRT's engines are larger for it."""
    scope: Scope
    """The operators to quantize where there is no way to choose."""
    scopes: tuple[Scope, ...]
    """The sets of operators to choose from."""
    reason: str

    @property
    def precision(self) -> Quantized:
        """Of the model that is written."""
        if self.activation is None:
            return "int4"
        return "fp8" if self.activation == "fp8" else "int8"

    @property
    def levels(self) -> Levels:
        """Of activations."""
        return {"uint8": UINT8, "fp8": FP8}.get(self.activation or "", INT8)

    @property
    def weight_levels(self) -> Levels:
        """Of weights."""
        return FP8 if self.activation == "fp8" else {4: INT4, 7: INT7, 8: INT8}[self.weight_bits]

    @property
    def methods(self) -> tuple[Method, ...]:
        """Calibration methods that fit.

        Entropy takes levels for evenly spaced, those of fp8 are not; where activations stay in
        float there is nothing to choose.
        """
        fitting = {"int8": METHODS, "int4": METHODS[:1]}
        return fitting.get(self.precision, tuple(m for m in METHODS if m != "entropy"))


def preset(
    target: Target, precision: Quantized = "int8", *, int8_dot_product: bool | None = None
) -> Preset:
    """The preset of a target; INT8 on a CPU depends on this machine unless told otherwise.

    Raises UsageError: the target does not compute in this precision.
    """
    if precision == "int4":
        return _weights_only(target)
    if target == "tensorrt":
        return _tensorrt(precision)
    if precision == "fp8":
        raise UsageError(
            f"{target} has no FP8 kernels: it would compute in float, with rounding in between",
            hint="take --target tensorrt, or --precision int8",
        )
    wide = has_int8_dot_product() if int8_dot_product is None else int8_dot_product
    return Preset(
        name=f"{target}_wi{8 if wide else 7}_au8",
        activation="uint8",
        weight_bits=8 if wide else 7,
        quantize_bias=target == "ort-cpu",
        tables=True,
        outputs=target == "ort-cpu",
        depthwise=True,
        scope="residual",
        scopes=("compute", "residual", "all") if target == "ort-cpu" else ("compute", "residual"),
        reason="8-bit dot product (VNNI or the like)"
        if wide
        else "no 8-bit dot product on this CPU: 7-bit weights keep 16-bit sums from saturating",
    )


def _tensorrt(precision: Literal["int8", "fp8"]) -> Preset:
    return Preset(
        name="tensorrt_wi8_ai8" if precision == "int8" else "tensorrt_wf8_af8",
        activation=precision,
        weight_bits=8,
        quantize_bias=False,
        tables=False,
        outputs=False,
        depthwise=False,
        scope="residual",
        scopes=("residual",),
        reason="TensorRT's parser takes symmetric int8 with zero point 0 and a float bias only"
        if precision == "int8"
        else "FP8 (E4M3) for GPUs of compute capability 8.9 and newer, with a float bias",
    )


def _weights_only(target: Target) -> Preset:
    return Preset(
        name=f"{target}_wi4",
        activation=None,
        weight_bits=4,
        quantize_bias=False,
        tables=target != "tensorrt",
        outputs=False,
        depthwise=False,
        scope="compute",
        scopes=("compute",),
        reason=f"4 bits, a scale for {BLOCK} weights of an output, for MatMul and Gemm with "
        f"{LARGE:,} constant weights or more; activations stay in float",
    )
