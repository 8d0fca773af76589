"""Removes channels: which, step by step, with an account of what went and what was left alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from deploykit.dataset import Dataset
from deploykit.errors import StageError
from deploykit.stages.prune import patterns, widths
from deploykit.stages.prune.groups import Group
from deploykit.stages.prune.importance import scores
from deploykit.stages.prune.options import PruneOptions
from deploykit.stages.prune.surgeon import Surgeon
from deploykit.stages.prune.widths import Scores
from deploykit.values import Json

Edit = tuple[str, bool, tuple[int, ...]]


@dataclass(slots=True)
class Account:
    """What happened to the groups."""

    before: dict[str, Group]
    """As they were at first, by root."""
    edits: list[Edit] = field(default_factory=list)
    gone: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Channels removed, by root."""
    left: dict[str, str] = field(default_factory=dict)
    """Why a group stays as it is, by root."""
    more: Json = field(default_factory=dict)
    """Further facts."""

    def facts(self) -> Json:
        """As plain data. Raises StageError: nothing was removed."""
        done = [self.before[root] for root, count in self.gone.items() if count]
        left = [g for g in self.before.values() if g not in done and g.root in self.left]
        if not done:
            raise self._nothing(left)
        return {
            "pruned": [
                {
                    "layers": list(group.layers),
                    "channels_before": group.channels,
                    "channels_after": group.channels - self.gone[group.root],
                }
                for group in done
            ],
            "left_alone": [
                {
                    "layers": list(group.layers),
                    "channels": group.channels,
                    "reason": self.left[group.root],
                }
                for group in left
            ],
            "ratio_reached": sum(self.gone.values()) / sum(g.channels for g in done),
            **self.more,
        }

    def _nothing(self, left: Sequence[Group]) -> StageError:
        reasons = "; ".join(f"{group.layers[0]}: {self.left[group.root]}" for group in left)
        return StageError(
            f"nothing could be pruned: {reasons or 'gradients lead from the outputs to no layer'}",
            hint="a higher ratio or a smaller --round-to removes more; else leave it unpruned",
        )


def prune_by_ratio(surgeon: Surgeon, options: PruneOptions, data: Dataset | None) -> Account:
    """Remove the share asked for, in as many steps as asked for."""
    account = Account({group.root: group for group in surgeon.groups()})
    for share in widths.shares(options):
        groups = free_groups(surgeon, options, account)
        if not groups:
            break
        found = scores(surgeon, groups, options, data)
        for group in groups:
            if group.root not in found:
                account.left[group.root] = "it has no batch normalization to rank it by"
        kept = _kept(account, groups, found, options, share)
        carry_out(surgeon, groups, found, kept, account)
    return account


def free_groups(surgeon: Surgeon, options: PruneOptions, account: Account) -> list[Group]:
    """The groups that may be pruned, as they are now; why not is noted of the others."""
    free = []
    for group in surgeon.groups():
        if reason := obstacle(group, options):
            account.left.setdefault(group.root, reason)
        else:
            free.append(group)
    return free


def obstacle(group: Group, options: PruneOptions) -> str | None:
    """Why a group may not be pruned."""
    for pattern in options.keep:
        if any(patterns.matches(name, pattern) for name in group.layers):
            return f"kept by the pattern {pattern!r}"
    return group.obstacle


def _kept(
    account: Account,
    groups: Sequence[Group],
    found: Scores,
    options: PruneOptions,
    share: float,
) -> dict[str, int]:
    """How many channels each group keeps in this step, by root."""
    ranked = [g for g in groups if g.root in found]
    if options.scope == "global":
        ratios = _global(account, ranked, found, options, share)
    else:
        ratios = {g.root: share * widths.ratio_of(g, options) for g in ranked}
    kept = {}
    for group in ranked:
        channels = account.before[group.root].channels
        multiple = group.unit if group.unit > 1 else options.round_to
        kept[group.root] = widths.kept_channels(channels, ratios[group.root], multiple)
        if kept[group.root] >= group.channels and not account.gone.get(group.root):
            what = "heads" if group.unit > 1 else f"the nearest multiple of {multiple}"
            account.left[group.root] = f"{what} is all {channels} channels"
    return kept


def _global(
    account: Account,
    groups: Sequence[Group],
    found: Scores,
    options: PruneOptions,
    share: float,
) -> dict[str, float]:
    """Ratios of the groups as they were at first, when all channels are ranked together."""
    first = sum(account.before[g.root].channels for g in groups)
    now = sum(g.channels for g in groups)
    wanted = max(0.0, 1 - first * (1 - share * (options.ratio or 0.0)) / now)
    local = widths.global_ratios(groups, found, options.model_copy(update={"ratio": wanted}))
    before = {g.root: account.before[g.root].channels for g in groups}
    return {g.root: 1 - g.channels * (1 - local[g.root]) / before[g.root] for g in groups}


def carry_out(
    surgeon: Surgeon,
    groups: Sequence[Group],
    found: Scores,
    kept: dict[str, int],
    account: Account,
) -> None:
    """Remove the least important channels down to the widths asked for."""
    for group in groups:
        count = group.channels - kept.get(group.root, group.channels)
        if count <= 0:
            continue
        gone = sorted(widths.ranked(found[group.root], group.unit)[:count])
        if reason := surgeon.remove(group, gone):
            account.left[group.root] = reason
        else:
            account.edits.append((group.root, True, tuple(gone)))
            account.gone[group.root] += count
