"""How important each channel of a group is, by the weights or by what is seen on data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deploykit.dataset import Dataset
from deploykit.errors import InputError, StageError, UsageError
from deploykit.formats import torch_module
from deploykit.stages.prune.groups import Group, Items, gates, readers
from deploykit.stages.prune.options import OBSERVED, Importance, PruneOptions
from deploykit.stages.prune.surgeon import Surgeon

if TYPE_CHECKING:
    import torch
    from torch import nn

BATCH = 128
POWERS: dict[Importance, int] = {"l1": 1, "l2": 2}


def scores(
    surgeon: Surgeon, groups: Sequence[Group], options: PruneOptions, data: Dataset | None
) -> dict[str, torch.Tensor]:
    """The importance of each channel, float32 [channel], by the root of its group.

    Raises UsageError: data is needed and not given. StageError: no batch normalization to rank by.
    """
    items = {group.root: surgeon.items(group.root, range(group.channels)) for group in groups}
    kind = options.importance
    if kind in OBSERVED:
        if data is None:
            raise UsageError(
                f"the importance {kind} is seen on data, and there is none", hint="give --data"
            )
        seen = data.matching(surgeon.inputs).first(options.samples)
        with surgeon.differentiable():
            found = _taylor(surgeon, items, seen) if kind == "taylor" else {}
        if kind != "taylor":
            stats = _observed(surgeon.module, surgeon.inputs, seen)
            found = {r: _by_activation(kind, i, groups, r, stats) for r, i in items.items()}
    elif kind == "batch-norm":
        found = {root: s for root, i in items.items() if (s := _batch_norm(i)) is not None}
        if not found:
            raise StageError(
                "no layer that can be pruned has a batch normalization to rank it by",
                hint="take another --importance",
            )
    else:
        found = {root: _magnitude(each, POWERS[kind]) for root, each in items.items()}
    return {root: score.float() for root, score in found.items()}


def _magnitude(items: Items, power: int) -> torch.Tensor:
    """Sum |w|^power, averaged over the group's tensors.

    Fang et al. 2023 (arXiv:2301.12900), section 3.3, without sparsity learning.
    """
    import torch_pruning as tp

    return _tensor(tp.importance.GroupMagnitudeImportance(p=power)(items))


def _batch_norm(items: Items) -> torch.Tensor | None:
    """Mean |gamma| of the group's batch normalizations (Liu et al. 2017, arXiv:1708.06519)."""
    import torch_pruning as tp

    found = tp.importance.BNScaleImportance()(items)
    return None if found is None else _tensor(found)


def _tensor(value: Any) -> torch.Tensor:
    import torch

    assert isinstance(value, torch.Tensor)  # noqa: S101
    return value.detach()


@dataclass(slots=True)
class _Seen:
    """Sums over what a layer reads, per input channel, float64 [channel]."""

    count: float = 0.0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, values: torch.Tensor) -> None:
        """Add values [..., channel]."""
        flat = values.detach().flatten(0, -2).double()
        self.count += len(flat)
        parts = {
            "x": flat,
            "abs": flat.abs(),
            "square": flat.square(),
            "zero": (flat == 0).double(),
        }
        for name, part in parts.items():
            self.sums[name] = self.sums.get(name, 0) + part.sum(0)

    def mean(self, name: str) -> torch.Tensor:
        return self.sums[name] / self.count


def _observed(module: nn.Module, inputs: tuple[Any, ...], data: Dataset) -> dict[nn.Module, _Seen]:
    """What each convolution and linear layer reads over the data."""
    from torch import nn

    seen: dict[nn.Module, _Seen] = {}

    def note(layer: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        x = given[0] if isinstance(layer, nn.Linear) else given[0].movedim(1, -1)
        seen.setdefault(layer, _Seen()).add(x)

    layers = [m for m in module.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]  # noqa: SLF001
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        for feed, _ in data.batches(BATCH):
            torch_module.run(module, inputs, feed)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _by_activation(
    kind: Importance,
    items: Items,
    groups: Sequence[Group],
    root: str,
    stats: dict[nn.Module, _Seen],
) -> torch.Tensor:
    """One number a channel, the mean over the layers that read it.

    Mean |a|; variance (Polyak and Wolf 2015); apoz: 1 minus the share of zeros (Hu et al. 2016,
    arXiv:1607.03250); reconstruction: E[a^2] times the square of the weights that read it, as a
    share of the layer's sum: the error that removing it alone makes in the layer's outputs.
    """
    import torch

    channels = next(group.channels for group in groups if group.root == root)
    total, count = torch.zeros(channels, dtype=torch.float64), 0
    for layer, index, roots in readers(items):
        if layer not in stats:
            continue
        value = _statistic(kind, layer, stats[layer])[index]
        part = torch.zeros(channels, dtype=torch.float64).index_add_(0, roots, value)
        total, count = total + part * channels / len(index), count + 1
    if not count:
        raise StageError(f"no layer that reads {root!r} ran on the data", hint="take l2")
    return total / count


def _statistic(kind: Importance, layer: nn.Module, seen: _Seen) -> torch.Tensor:
    if kind == "activation-mean":
        return seen.mean("abs")
    if kind == "activation-variance":
        return (seen.mean("square") - seen.mean("x").square()).clamp_min(0)
    if kind == "apoz":
        return 1 - seen.mean("zero")
    axis = 0 if getattr(layer, "transposed", False) else 1
    weight = _tensor(layer.weight).double().movedim(axis, 0).flatten(1)
    error = seen.mean("square") * weight.square().sum(1)
    return error / error.sum().clamp_min(1e-30)


def _taylor(surgeon: Surgeon, items: dict[str, Items], data: Dataset) -> dict[str, torch.Tensor]:
    """The mean over samples of (sum over positions of activation * gradient)^2.

    Molchanov et al. 2019 (arXiv:1906.10771), equation 8, on gates behind the layers (behind their
    batch normalization where there is one). The loss is the cross-entropy of the labels where
    there are any, else half the square of the first output.
    """
    import torch

    gate_of = {root: gates(each) for root, each in items.items()}
    total: dict[str, torch.Tensor] = {}
    for feed, target in data.batches(BATCH):
        with _caught({g for each in gate_of.values() for g in each}) as outputs:
            tensors = [torch.from_numpy(feed[spec.name].copy()) for spec in surgeon.inputs]
            called = torch_module.call(surgeon.module, surgeon.inputs, tensors)
            made = torch_module.output_tensors(called)[0]
            _loss(made, target).backward()  # type: ignore[no-untyped-call]
        for root, layers in gate_of.items():
            moves = sum(
                (m for layer in layers for m in _moves(layer, outputs.get(layer, []))),
                start=torch.zeros(()),
            )
            total[root] = total.get(root, torch.zeros(())) + moves.square().sum(0)
        surgeon.module.zero_grad(set_to_none=True)
    return {root: value / len(data) for root, value in total.items()}


def _moves(layer: nn.Module, tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """By how much the loss moves without a channel, to first order: float [sample, channel]."""
    from torch import nn

    for tensor in tensors:
        if tensor.grad is not None:
            product = (tensor * tensor.grad).detach()
            last = isinstance(layer, (nn.Linear, nn.LayerNorm))
            product = product if last else product.movedim(1, -1)
            yield product.reshape(len(product), -1, product.shape[-1]).sum(1)


def _loss(outputs: torch.Tensor, target: Any) -> torch.Tensor:
    import torch
    from torch.nn import functional

    if target is None or target.dtype.kind not in "iu" or outputs.ndim != 2:
        return outputs.square().sum() / 2
    labels = torch.from_numpy(target.astype("int64"))
    if target.ndim != 1 or not 0 <= labels.min() <= labels.max() < outputs.shape[1]:
        raise InputError(
            f"the labels are no classes of a model with {outputs.shape[1]} outputs",
            hint="number the classes from 0, or give data without 'target'",
        )
    return functional.cross_entropy(outputs, labels, reduction="sum")


@contextmanager
def _caught(layers: set[nn.Module]) -> Iterator[dict[nn.Module, list[torch.Tensor]]]:
    """The outputs of layers, with their gradients kept."""
    found: dict[nn.Module, list[torch.Tensor]] = {}

    def note(layer: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        if output.requires_grad:
            output.retain_grad()
            found.setdefault(layer, []).append(output)
            return output.clone()  # what follows may work in place
        return output

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
