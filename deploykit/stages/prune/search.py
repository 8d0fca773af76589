"""Widths for a speed-up: what is lost least for the time that it gives, by a measured table.

The greedy of NetAdapt (Yang et al. 2018, arXiv:1804.03230) over a latency table: of all ways to
make one group narrower, the one that loses the least importance for a microsecond saved, until the
time is reached; then what costs no time is given back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploykit.dataset import Dataset
from deploykit.formats.onnx_layer import LayerShape
from deploykit.stages.prune import channels, widths
from deploykit.stages.prune.channels import Account
from deploykit.stages.prune.groups import Group, readers
from deploykit.stages.prune.importance import scores
from deploykit.stages.prune.options import PruneOptions
from deploykit.stages.prune.surgeon import Surgeon
from deploykit.stages.prune.table import Table, shapes

if TYPE_CHECKING:
    import torch

PROBE = 128
"""Samples of the data on which the damage of a width is measured."""
MOST_WIDTHS = 12
"""Widths that are tried of a group; more channels go in wider steps."""
GRAIN = {"fp32": 8, "int8": 4}
"""Multiples of channels among which a width is sought: kernels pad the rest."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A group, with the layers that get faster when it gets narrower."""

    group: Group
    choices: tuple[int, ...]
    """Widths, falling; the first is all channels."""
    lost: dict[int, float]
    """What goes with each width: by how much the outputs change on data, or, where there is none,
    the share of the group's importance."""
    reads: dict[str, int]
    """Layers that read the group, and how many of their inputs are of one channel."""


def prune_for_speed(surgeon: Surgeon, options: PruneOptions, data: Dataset | None) -> Account:
    """Find widths by the table, and remove the rest; the narrowest ones where none is enough."""
    account = Account({group.root: group for group in surgeon.groups()})
    table = Table(options)
    groups = channels.free_groups(surgeon, options, account)
    found = scores(surgeon, groups, options, data)
    layers = shapes(surgeon.module, surgeon.inputs)
    probe = data.matching(surgeon.inputs).first(PROBE) if data else None
    ranked = [group for group in groups if group.root in found]
    parts = [_part(surgeon, group, found[group.root], options, probe) for group in ranked]
    plan = _Plan(parts, layers, table)
    before = plan.time({})
    kept = plan.reach(before / (options.speedup or 1.0))
    after = plan.time(kept)
    channels.carry_out(surgeon, groups, found, kept, account)
    account.more["layers_us_before"] = round(before, 1)
    account.more["layers_us_after"] = round(after, 1)
    account.more["speedup_by_table"] = round(before / after, 3)
    account.more["layers_measured"] = len(table)
    return account


def _part(
    surgeon: Surgeon,
    group: Group,
    score: torch.Tensor,
    options: PruneOptions,
    probe: Dataset | None,
) -> _Part:
    items = surgeon.items(group.root, range(group.channels))
    names = {layer: name for name, layer in surgeon.module.named_modules()}
    order = widths.ranked(score, group.unit)
    gone = {n: order[: group.channels - n] for n in _choices(group, options)}
    if probe is None:
        total = float(score.sum()) or 1.0
        lost = {width: float(score[which].sum()) / total for width, which in gone.items()}
    else:
        lost = dict(zip(gone, surgeon.damage(group, list(gone.values()), probe), strict=True))
    reads = {names[layer]: len(index) // group.channels for layer, index, _ in readers(items)}
    return _Part(group, tuple(gone), lost, reads)


def _choices(group: Group, options: PruneOptions) -> tuple[int, ...]:
    given = "round_to" in options.model_fields_set
    grain = options.round_to if given else GRAIN[options.precision]
    grain = group.unit if group.unit > 1 else grain
    step = grain * -(-group.channels // (grain * MOST_WIDTHS))
    multiples = range(step, group.channels, step)
    return (group.channels, *reversed(multiples))


class _Plan:
    def __init__(self, parts: Sequence[_Part], layers: dict[str, LayerShape], table: Table) -> None:
        self._parts, self._layers, self._table = parts, layers, table

    def time(self, kept: dict[str, int]) -> float:
        """Microseconds of all layers at these widths (by root; the others are as they are)."""
        writes: dict[str, int] = {}
        reads: dict[str, int] = {}
        for part in self._parts:
            gone = part.group.channels - kept.get(part.group.root, part.group.channels)
            writes.update(dict.fromkeys(part.group.layers, gone))
            for name, each in part.reads.items():
                reads[name] = reads.get(name, 0) + gone * each
        return sum(
            self._table.microseconds(_narrowed(layer, reads.get(name, 0), writes.get(name, 0)))
            for name, layer in self._layers.items()
        )

    def reach(self, target_us: float) -> dict[str, int]:
        """Narrow group after group until the time is reached, or nothing is left to narrow."""
        kept = {part.group.root: part.group.channels for part in self._parts}
        now = self.time(kept)
        while now > target_us:
            moves = [
                (self._price(part, kept, width, now), part.group.root, width)
                for part in self._parts
                for width in part.choices
                if width < kept[part.group.root]
            ]
            possible = [m for m in moves if m[0] is not None]
            if not possible:
                return kept
            _, root, width = min(possible)
            kept[root] = width
            now = self.time(kept)
        return self._widened(kept, target_us)

    def _price(self, part: _Part, kept: dict[str, int], width: int, now: float) -> float | None:
        """Importance lost for a microsecond saved; None where none is saved."""
        root = part.group.root
        saved = now - self.time({**kept, root: width})
        lost = part.lost[width] - part.lost[kept[root]]
        return max(lost, 1e-9) / saved if saved > 0.002 * now else None

    def _widened(self, kept: dict[str, int], target_us: float) -> dict[str, int]:
        """Give back the channels that cost nothing: kernels come in steps."""
        for part in sorted(self._parts, key=lambda p: -p.lost[kept[p.group.root]]):
            for width in part.choices:
                if width <= kept[part.group.root]:
                    break
                wider = {**kept, part.group.root: width}
                if self.time(wider) <= target_us:
                    kept = wider
                    break
        return kept


def _narrowed(layer: LayerShape, inputs: int, outputs: int) -> LayerShape:
    """A layer without so many inputs and outputs; a depthwise convolution follows its channels."""
    depthwise = layer.groups > 1
    change = {
        "inputs": layer.inputs - (outputs if depthwise else inputs),
        "outputs": layer.outputs - outputs,
        "groups": layer.outputs - outputs if depthwise else 1,
    }
    return layer.model_copy(update=change)
