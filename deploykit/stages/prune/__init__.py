"""Prune: remove whole channels of least weight, so that every runtime gets a smaller model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from deploykit import store
from deploykit.errors import InputError, StageError, UsageError, did_you_mean
from deploykit.formats import torch_folder
from deploykit.formats.torch_folder import Description
from deploykit.stages.prune.groups import Group
from deploykit.stages.prune.surgeon import Surgeon
from deploykit.store import Job, Made
from deploykit.values import Artifact, Json, TensorSpec, Value

if TYPE_CHECKING:
    import torch
    from torch import nn

LIBRARIES = ("torch", "torch-pruning")
POWERS = {"l1": 1, "l2": 2}

Edit = tuple[str, bool, tuple[int, ...]]


class PruneOptions(Value):
    """How much to remove, and where."""

    ratio: float = Field(gt=0, lt=1, description="share of the channels to remove, in each layer")
    round_to: int = Field(
        default=8, ge=1, description="keep the multiple of this that is nearest, and at least one"
    )
    importance: Literal["l1", "l2"] = Field(
        default="l2", description="norm of the weights by which channels are ranked"
    )
    keep: tuple[str, ...] = Field(
        default=(), description="pattern of module names to leave as they are, such as 'stem.*'"
    )
    ratios: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default={}, description="ratios by pattern of module names; the last that matches counts"
    )


def kept_channels(channels: int, ratio: float, round_to: int) -> int:
    """How many of `channels` stay: the multiple of `round_to` nearest to channels * (1 - ratio).

    At least one multiple, at most all; the wider one if two are as near.
    """
    nearest = math.floor(channels * (1 - ratio) / round_to + 0.5) * round_to
    return min(max(nearest, round_to), channels)


def prune(source: Artifact, options: PruneOptions, *, out: Path, force: bool = False) -> Artifact:
    """Remove channels by the magnitude of their weights, and write the smaller model.

    Raises InputError: `source` is no torch artifact. UsageError: a pattern matches no module.
    StageError: the model cannot be traced, nothing can be removed, or the result has other outputs.
    """
    if source.format != "torch":
        raise InputError(
            f"{source.path}: pruning works on PyTorch models, this one is {source.format}",
            hint="prune before the export",
        )

    def work(folder: Path) -> Made:
        description = torch_folder.describe(source.path)
        surgeon = Surgeon(torch_folder.load(source), description.inputs)
        _check_patterns(surgeon.module, (*options.keep, *options.ratios))
        before = _size(surgeon.module, description.inputs)
        edits, account = _operate(surgeon, options)
        _check_outputs(surgeon.module, description)
        after = _size(surgeon.module, description.inputs)
        sizes = {
            f"{key}_{when}": size[key]
            for key in before
            for when, size in (("before", before), ("after", after))
        }
        torch_folder.write(
            surgeon.module,
            description.model_copy(update={"edits": (*description.edits, *edits)}),
            torch_folder.factory_file(source.path, description),
            folder,
        )
        return Made(
            format="torch",
            precision=source.precision,
            inputs=description.inputs,
            outputs=description.outputs,
            facts={**sizes, **account},
        )

    job = Job(stage="prune", source=source, options=options, libraries=LIBRARIES)
    return store.produce(job, work, out=out, force=force)


def _operate(surgeon: Surgeon, options: PruneOptions) -> tuple[list[Edit], Json]:
    """Choose the channels of every group by the weights as they are, then remove them."""
    plans: list[tuple[Group, list[int]]] = []
    left: list[tuple[Group, str]] = []
    for group in surgeon.groups():
        kept = kept_channels(group.channels, _ratio(group, options), options.round_to)
        if reason := _reason_to_leave(group, kept, options):
            left.append((group, reason))
        else:
            gone = surgeon.weakest(group, group.channels - kept, POWERS[options.importance])
            plans.append((group, gone))
    done: list[tuple[Group, list[int]]] = []
    for group, gone in plans:
        if reason := surgeon.remove(group.root, gone):
            left.append((group, reason))
        else:
            done.append((group, gone))
    if not done:
        raise _nothing(left)
    return [(group.root, True, tuple(gone)) for group, gone in done], _account(done, left)


def _reason_to_leave(group: Group, kept: int, options: PruneOptions) -> str | None:
    for pattern in options.keep:
        if any(_matches(name, pattern) for name in group.layers):
            return f"kept by the pattern {pattern!r}"
    if group.obstacle:
        return group.obstacle
    if kept == group.channels:
        return f"the nearest multiple of {options.round_to} is all {group.channels} channels"
    return None


def _ratio(group: Group, options: PruneOptions) -> float:
    ratios = [
        ratio
        for pattern, ratio in options.ratios.items()
        if any(_matches(name, pattern) for name in group.layers)
    ]
    return ratios[-1] if ratios else options.ratio


def _matches(name: str, pattern: str) -> bool:
    """Whether the pattern matches the module or one that it lies in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))


def _check_patterns(module: nn.Module, patterns: Iterable[str]) -> None:
    names = [name for name, _ in module.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"the pattern {pattern!r} matches no module", hint=did_you_mean(pattern, names)
            )


def _account(done: list[tuple[Group, list[int]]], left: list[tuple[Group, str]]) -> Json:
    return {
        "pruned": [
            {
                "layers": list(group.layers),
                "channels_before": group.channels,
                "channels_after": group.channels - len(gone),
            }
            for group, gone in done
        ],
        "left_alone": [
            {"layers": list(group.layers), "channels": group.channels, "reason": reason}
            for group, reason in left
        ],
        "ratio_reached": sum(len(gone) for _, gone in done) / sum(g.channels for g, _ in done),
    }


def _nothing(left: list[tuple[Group, str]]) -> StageError:
    reasons = "; ".join(f"{group.layers[0]}: {reason}" for group, reason in left)
    return StageError(
        f"nothing could be pruned: {reasons or 'gradients lead from the outputs to no layer'}",
        hint="a higher ratio or a smaller --round-to removes more; else leave the model unpruned",
    )


def _check_outputs(module: nn.Module, description: Description) -> None:
    """Run a batch of another size than any before. Raises StageError: the outputs differ."""
    import torch

    probe = torch_folder.examples(description.inputs, batch=3)
    try:
        with torch.inference_mode():
            outputs = torch_folder.output_tensors(module(*probe))
        problem = _misfit(outputs, description.outputs)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        problem = f"it raises {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if problem:
        raise StageError(
            f"the pruned model does not work: {problem}",
            hint="leave the layers out whose channels the code counts on (--keep PATTERN)",
        )


def _misfit(outputs: tuple[torch.Tensor, ...], specs: tuple[TensorSpec, ...]) -> str | None:
    if len(outputs) != len(specs):
        return f"it has {len(outputs)} outputs, not {len(specs)}"
    pairs = zip(outputs, specs, strict=True)
    return next((f"{s.name!r}: {m}" for o, s in pairs if (m := s.misfit(o.numpy()))), None)


def _size(module: nn.Module, inputs: tuple[TensorSpec, ...]) -> dict[str, int]:
    """Parameters, and multiply-accumulates of one sample in convolutions and matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    probe = torch_folder.examples(inputs)
    with FlopCounterMode(display=False) as counter:
        module(*probe)
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "macs": counter.get_total_flops() // 2 // len(probe[0]),
    }
