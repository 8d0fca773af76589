"""What can be asked of pruning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from deploykit.values import Value

Method = Literal["channels", "weights", "2:4"]
Importance = Literal[
    "l1", "l2", "batch-norm", "taylor", "activation-mean", "activation-variance", "apoz",
    "reconstruction",
]  # fmt: skip
OBSERVED: tuple[Importance, ...] = (
    "taylor", "activation-mean", "activation-variance", "apoz", "reconstruction",
)  # fmt: skip
"""Importances that are seen on data."""


def _times(value: Any) -> Any:
    """`2x` is 2."""
    return value.removesuffix("x") if isinstance(value, str) else value


Speedup = Annotated[float, BeforeValidator(_times), Field(gt=1)]


class PruneOptions(Value):
    """How much to remove, of what, and where."""

    ratio: float | None = Field(
        default=None, gt=0, lt=1, description="share of the channels, or weights, to remove"
    )
    method: Method = Field(
        default="channels",
        description="channels: whole ones, so that every runtime gets a smaller model; weights: "
        "single weights become zero; 2:4: two of each four, for TensorRT on GPUs with sparse "
        "tensor cores. Dense engines do not run faster for zeros",
    )
    importance: Importance = Field(
        default="l2",
        description="how channels are ranked: by weights (l1, l2, batch-norm), or on data (taylor, "
        "activation-mean, activation-variance, apoz: the share of zeros, reconstruction: the error "
        "of what reads them)",
    )
    scope: Literal["layer", "global"] = Field(
        default="layer", description="the ratio holds in each layer, or over all of them"
    )
    round_to: int = Field(
        default=8, ge=1, description="keep the multiple of this that is nearest, and at least one"
    )
    steps: int = Field(
        default=1, ge=1, le=100, description="remove in so many steps, ranked anew before each"
    )
    schedule: Literal["linear", "cubic"] = Field(
        default="cubic", description="how much has gone after each step; cubic: most of it early"
    )
    keep: tuple[str, ...] = Field(
        default=(), description="pattern of module names to leave as they are, such as 'stem.*'"
    )
    ratios: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default={}, description="ratios by pattern of module names; the last that matches counts"
    )
    samples: int = Field(
        default=2048, ge=1, description="samples of the data on which importance is seen"
    )
    speedup: Speedup | None = Field(
        default=None,
        description="in place of a ratio: how many times as fast the model shall be on the target, "
        "such as 2x; widths follow from measured times of its layers",
    )
    target: Literal["ort-cpu", "openvino"] = Field(
        default="ort-cpu", description="the runtime that the speed-up is for"
    )
    precision: Literal["fp32", "int8"] = Field(
        default="fp32", description="the precision that will be deployed"
    )
    threads: int = Field(default=1, ge=1, description="threads of the runtime, for the speed-up")

    @model_validator(mode="after")
    def _one_aim(self) -> PruneOptions:
        if self.method == "2:4":
            if self.ratio is not None or self.speedup is not None:
                raise ValueError("2:4 removes half of the weights: leave ratio and speedup out")
        elif (self.ratio is None) == (self.speedup is None):
            raise ValueError("give either a ratio or a speedup")
        if self.method == "weights" and self.speedup is not None:
            raise ValueError("zeros make no dense engine faster: a speedup needs channels")
        if self.speedup is not None and self.steps > 1:
            raise ValueError("a speedup is reached in one step: leave steps out")
        if self.method != "channels" and self.importance not in ("l1", "l2"):
            raise ValueError(f"single weights are ranked by magnitude, not by {self.importance}")
        return self
