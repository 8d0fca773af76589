"""Single weights that become zero: unstructured by magnitude, or two of each four."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploykit.errors import StageError
from deploykit.stages.prune.options import PruneOptions
from deploykit.stages.prune.patterns import matches
from deploykit.values import Json

if TYPE_CHECKING:
    import torch
    from torch import nn

DENSE = (
    "zeros make no dense engine faster and no file smaller: ONNX Runtime and OpenVINO multiply by "
    "them all the same"
)
SPARSE = (
    "TensorRT may run 2:4 weights on sparse tensor cores where it is built with sparsity on; what "
    "ran sparse is not known here. ONNX Runtime and OpenVINO are no faster"
)


@dataclass(frozen=True, slots=True)
class Masked:
    """What became of the weights."""

    parameters: tuple[str, ...]
    """Names of the parameters whose zeros are to stay."""
    account: Json


def mask(module: nn.Module, options: PruneOptions) -> Masked:
    """Set weights of convolutions and linear layers to zero, in place.

    Raises StageError: no layer can be masked.
    """
    weights = dict(_weights(module, options))
    left = {}
    if options.method == "2:4":
        left = {name: why for name, w in weights.items() if (why := _not_in_fours(w))}
        weights = {name: w for name, w in weights.items() if name not in left}
    if not weights:
        raise StageError(
            f"no weights can be set to zero: {left or 'no convolution or linear layer is left'}",
            hint="loosen --keep, or leave the model unpruned",
        )
    for name, gone in _chosen(weights, options).items():
        weights[name].data.masked_fill_(gone, 0.0)
    return Masked(tuple(f"{name}.weight" for name in weights), _account(weights, left, options))


def _weights(module: nn.Module, options: PruneOptions) -> Iterator[tuple[str, torch.Tensor]]:
    from torch import nn

    for name, layer in module.named_modules():
        kept = any(matches(name, pattern) for pattern in options.keep)
        if not kept and isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):  # noqa: SLF001
            yield name, layer.weight


def _chosen(weights: dict[str, torch.Tensor], options: PruneOptions) -> dict[str, torch.Tensor]:
    """Which weights go: bool tensors of the weights' shapes."""
    import torch

    if options.method == "2:4":
        return {name: weakest_of_four(w.detach()) for name, w in weights.items()}
    sizes = {name: w.detach().abs() for name, w in weights.items()}
    ratios = {name: _ratio(name, options) for name in weights}
    free = [n for n in sizes if options.scope == "global" and ratios[n] == options.ratio]
    together = torch.cat([sizes[n].flatten() for n in free]) if free else torch.zeros(0)
    count = int(len(together) * (options.ratio or 0.0))
    threshold = float(together.kthvalue(count).values) if count else -1.0
    return {
        name: size <= threshold if name in free else _weakest(size, ratios[name])
        for name, size in sizes.items()
    }


def _ratio(name: str, options: PruneOptions) -> float:
    found = [ratio for pattern, ratio in options.ratios.items() if matches(name, pattern)]
    return found[-1] if found else options.ratio or 0.0


def _weakest(size: torch.Tensor, ratio: float) -> torch.Tensor:
    """The share of least magnitude."""
    import torch

    gone = torch.zeros(size.numel(), dtype=torch.bool)
    gone[size.flatten().argsort(stable=True)[: int(ratio * size.numel())]] = True
    return gone.reshape(size.shape)


def weakest_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The two of least magnitude of each four weights along the input channels (axis 1).

    That is the pattern of sparse tensor cores (Mishra et al. 2021, arXiv:2104.08378, section 3).
    """
    import torch

    rows = weight.abs().movedim(1, -1)
    fours = rows.reshape(*rows.shape[:-1], -1, 4)
    order = fours.argsort(dim=-1, stable=True)
    gone = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, order[..., :2], value=True)
    return gone.reshape(rows.shape).movedim(-1, 1)


def _not_in_fours(weight: torch.Tensor) -> str | None:
    inputs = weight.shape[1]
    return f"{inputs} input channels are no multiple of 4" if inputs % 4 else None


def _account(weights: dict[str, torch.Tensor], left: dict[str, str], options: PruneOptions) -> Json:
    zeros = {name: int((w == 0).sum()) for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    return {
        "masked": [
            {"layer": name, "zeros": zeros[name], "weights": w.numel()}
            for name, w in weights.items()
        ],
        "left_alone": [{"layers": [name], "reason": why} for name, why in left.items()],
        "sparsity_reached": sum(zeros.values()) / total,
        "speed": SPARSE if options.method == "2:4" else DENSE,
    }
