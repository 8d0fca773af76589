"""Removes channels, and checks each removal by the law of structured pruning.

The law: a model without some channels gives what it gives when all layers that read these channels
have weights of zero for them. torch-pruning does not notice where it breaks the law (heads of
attention, reshapes, a concatenation that is flattened); what breaks it is undone here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deploykit.dataset import Dataset
from deploykit.formats import torch_edits, torch_module
from deploykit.stages.prune.groups import Group, Items, find_groups, head_attributes, readers
from deploykit.values import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

TOLERANCE = 1e-4
"""Largest difference that is rounding (float32), relative to the largest output."""

DYNAMIC_SIZE = 8
"""Size of dynamic dimensions in the check: among one token, attention does not show its heads."""


class Surgeon:
    """Owns a module and removes channels from it."""

    def __init__(self, module: nn.Module, inputs: tuple[TensorSpec, ...]) -> None:
        self.module, self.inputs = module, inputs
        self.attributes: dict[str, int] = {}
        """What was changed beside parameters, by `module.attribute`."""
        self._inputs = tuple(_sized(spec) for spec in inputs)
        self._graph = torch_edits.dependency_graph(module, self._inputs)

    def groups(self) -> tuple[Group, ...]:
        """The groups of the module as it is now. Raises StageError."""
        return find_groups(self._graph, self.module, self._inputs)

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Gradients reach every layer, also in a caller's inference mode."""
        import torch

        with torch.inference_mode(mode=False), torch.enable_grad():
            yield

    def remove(self, group: Group, channels: Sequence[int]) -> str | None:
        """Remove output channels of the group and all that depends on them.

        Returns None, or why the law is broken; the module is then as it was.
        """
        reason = None
        for changes in self._changes(group, len(channels)):
            before = copy.deepcopy(self.module)
            reason = self._try(group.root, channels, changes)
            if reason is None:
                self.attributes.update(changes)
                return None
            self.module = before
            self._graph = torch_edits.dependency_graph(before, self._inputs)
        return reason

    def damage(self, group: Group, removals: Sequence[Sequence[int]], data: Dataset) -> list[float]:
        """How much the first output changes without these channels: |change|^2 / |output|^2.

        Means over the data; the module is left as it is. By the law, not to read channels is as
        good as not to have them.
        """
        import torch

        reading = list(readers(self.items(group.root, range(group.channels))))
        weights = [layer.get_parameter("weight") for layer, _, _ in reading]
        before = [weight.detach().clone() for weight in weights]
        want = self._collect(data)
        found = []
        for channels in removals:
            for weight, (layer, index, roots) in zip(weights, reading, strict=True):
                axis = 0 if getattr(layer, "transposed", False) else 1
                gone = index[torch.isin(roots, torch.tensor(list(channels), dtype=torch.long))]
                weight.data.index_fill_(axis, gone, 0.0)
            change = (self._collect(data) - want).square().sum()
            found.append(float(change / want.square().sum().clamp_min(1e-30)))
            for weight, old in zip(weights, before, strict=True):
                weight.data.copy_(old)
        return found

    def _collect(self, data: Dataset) -> torch.Tensor:
        import torch

        runs = (
            torch_module.run(self.module, self.inputs, feed)[0] for feed, _ in data.batches(128)
        )
        return torch.cat([torch.from_numpy(array) for array in runs]).double()

    def _changes(self, group: Group, gone: int) -> list[dict[str, int]]:
        """Attributes to set with the removal, most likely first: heads are counted in some."""
        if group.attention is None:
            return [{}]
        heads = group.channels // group.unit
        new = {heads: heads - gone // group.unit, group.channels: group.channels - gone}
        module = self.module.get_submodule(group.attention)
        known = head_attributes(module)
        counts = {n: new[v] for n, v in known.items() if v == heads and n.endswith("s")}
        widths = {n: new[v] for n, v in known.items() if v == group.channels and "all_head" in n}
        prefix = f"{group.attention}." if group.attention else ""
        tries: tuple[dict[str, int], ...] = ({**counts, **widths}, counts, {})
        unlike = [t for n, t in enumerate(tries) if t not in tries[:n]]
        return [{prefix + name: value for name, value in each.items()} for each in unlike]

    def _try(self, root: str, channels: Sequence[int], changes: dict[str, int]) -> str | None:
        try:
            items = self.items(root, channels)
            _silence(items)
            want = self._outputs()
            items.prune()
            torch_edits.set_attributes(self.module, changes)
            have = self._outputs()
        except Exception as error:  # noqa: BLE001 - the library and the model may raise anything
            line = (str(error).splitlines() or [""])[0]
            return f"without some of its channels the model raises {type(error).__name__}: {line}"
        if all(map(_alike, want, have)):
            return None
        return (
            "removing channels changes what the others mean "
            "(heads of attention, a reshape, or a reduction over channels)"
        )

    def items(self, root: str, channels: Sequence[int]) -> Items:
        """torch-pruning's group of these output channels of the layer `root`."""
        layer = self.module.get_submodule(root)
        pruner = self._graph.get_pruner_of_module(layer)
        return self._graph.get_pruning_group(layer, pruner.prune_out_channels, list(channels))

    def _outputs(self) -> tuple[torch.Tensor, ...]:
        import torch

        with torch.inference_mode():
            probe = torch_module.examples(self._inputs, batch=2, seed=1)
            called = torch_module.call(self.module, self._inputs, probe)
            return torch_module.output_tensors(called)


def _sized(spec: TensorSpec) -> TensorSpec:
    """The batch stays dynamic; other dynamic dimensions get a size."""
    first, *rest = spec.shape
    sizes = (DYNAMIC_SIZE if isinstance(size, str) else size for size in rest)
    return spec.model_copy(update={"shape": (first, *sizes)})


def _silence(items: Items) -> None:
    """Set to zero the weights by which layers read the channels of the group."""
    import torch
    import torch_pruning as tp

    readers = (tp.prune_conv_in_channels, tp.prune_linear_in_channels)
    with torch.no_grad():
        for dependency, channels in items:
            layer = dependency.target.module
            if dependency.handler in readers:
                axis = 0 if getattr(layer, "transposed", False) else 1
                layer.weight.index_fill_(axis, torch.tensor(channels), 0.0)


def _alike(want: torch.Tensor, have: torch.Tensor) -> bool:
    if want.shape != have.shape or want.dtype != have.dtype:
        return False
    scale = float(want.abs().nan_to_num(0, 0, 0).max()) if want.numel() else 0.0
    return have.allclose(want, rtol=0, atol=TOLERANCE * scale, equal_nan=True)
