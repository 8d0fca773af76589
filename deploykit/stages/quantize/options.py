"""What can be asked of a quantization."""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, Field

from deploykit.errors import UsageError
from deploykit.stages.quantize.methods import Method
from deploykit.stages.quantize.presets import SCOPES, Preset, Quantized, Scope, Target, preset
from deploykit.stages.quantize.workshop import CORRECTIONS, Correction
from deploykit.values import Value


class QuantizeOptions(Value):
    """How to quantize."""

    target: Target = Field(
        default="ort-cpu", description="the runtime that the quantized file is for"
    )
    precision: Quantized = Field(
        default="int8",
        description="int8; fp8 (E4M3, tensorrt only); or int4, the large weights of MatMul and "
        "Gemm alone (embedding tables become int8). There is no 16-bit kind: no target computes "
        "with 16-bit integers",
    )
    processor: Literal["this", "vnni", "arm", "any"] = Field(
        default="this",
        description="the CPU that will serve: like this one; one that sums 8-bit products in 32 "
        "bits (vnni, arm); or any, at the price of 7-bit weights",
    )
    scope: Scope | Literal["auto"] = Field(
        default="auto",
        description="operators to quantize: compute (convolutions and matrix products), residual "
        "(and what joins them), all (and element-wise functions), or auto: by measurement",
    )
    op_types_to_quantize: tuple[str, ...] = Field(
        default=(), description="operator types to quantize, in place of a scope"
    )
    nodes_to_quantize: tuple[str, ...] = Field(
        default=(),
        description="nodes or modules to quantize, by default all in scope: names, or patterns as "
        "in a shell ('encoder.layer.0.*')",
    )
    keep_float: tuple[str, ...] = Field(
        default=(),
        validation_alias=AliasChoices("keep_float", "nodes_to_exclude"),
        description="nodes or modules to leave in float: names, or patterns as in a shell "
        "('encoder.layer.0.*', '*Softmax*'); whole types: --op-types-to-quantize",
    )
    calibration_method: Method | Literal["auto"] = Field(
        default="auto",
        description="how an activation's range follows from its values; auto: by measurement",
    )
    percentile: float = Field(
        default=99.99, gt=50, le=100, description="percent of the values kept by percentile"
    )
    calibration_samples: int = Field(
        default=0, ge=0, description="use the first N samples of the calibration data; 0 for all"
    )

    corrections: tuple[Correction | Literal["auto", "none"], ...] = Field(
        default=("auto",),
        description="what may make up for the rounding, each kept only where it helps on data held "
        "back: cross_layer_equalization, smooth_quant (or _strong), adaptive_rounding, "
        "bias_correction; auto: all of them where something else is chosen by measurement too; or "
        "none",
    )
    node_damage: bool = Field(
        default=False,
        description="measure for the record what quantizing each node alone does to the outputs, "
        "what leaving it in float gives, and its time in the runtime's own profile",
    )
    calibration_cache: str = Field(
        default="",
        description="file that keeps what was seen of the tensors, for the next time with the same "
        "model, data and versions",
    )

    @property
    def preset(self) -> Preset:
        """Types and places of the pairs. Raises UsageError: the options do not fit each other."""
        if self.processor != "this" and (self.target == "tensorrt" or self.precision != "int8"):
            raise UsageError(
                f"--processor {self.processor} is for int8 on a CPU, not for {self.precision} "
                f"on {self.target}",
                hint="leave --processor out",
            )
        wide = {"this": None, "vnni": True, "arm": True, "any": False}[self.processor]
        return preset(self.target, self.precision, int8_dot_product=wide)

    @property
    def scopes(self) -> dict[str, tuple[str, ...]]:
        """The sets of operator types to try, by name."""
        if self.op_types_to_quantize:
            return {"chosen": self.op_types_to_quantize}
        if self.scope != "auto":
            return {self.scope: SCOPES[self.scope]}
        return {name: SCOPES[name] for name in self.preset.scopes}

    @property
    def methods(self) -> tuple[Method, ...]:
        """The calibration methods to try. Raises UsageError: one that does not fit."""
        fitting = self.preset.methods
        if self.calibration_method == "auto":
            return fitting
        if self.calibration_method not in fitting:
            raise UsageError(
                f"{self.calibration_method} is no calibration method for {self.precision}",
                hint=f"take auto, or of {', '.join(fitting)}",
            )
        return (self.calibration_method,)

    @property
    def tried_corrections(self) -> tuple[Correction, ...]:
        """The corrections to try, in their order. Raises UsageError: they are for int8 alone."""
        if self.precision != "int8":
            if set(self.corrections) - {"auto", "none"}:
                raise UsageError(
                    f"corrections are for int8, not for {self.precision}",
                    hint="leave --corrections out",
                )
            return ()
        return tuple(c for c in CORRECTIONS if c in self.corrections or "auto" in self.corrections)

    @property
    def partial(self) -> bool:
        """Whether it was asked for a part of the model only."""
        return bool(self.nodes_to_quantize or self.keep_float or self.op_types_to_quantize)

    @property
    def chooses(self) -> bool:
        """Whether something is left to choose by measurement."""
        named = set(self.corrections) - {"auto", "none"}
        return bool(named) or len(self.scopes) * len(self.methods) > 1
