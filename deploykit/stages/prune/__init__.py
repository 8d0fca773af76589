"""Prune: remove what counts least, so that the model gets smaller where it is slow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploykit import store
from deploykit.dataset import Dataset
from deploykit.errors import InputError, StageError
from deploykit.formats import torch_folder, torch_module
from deploykit.formats.torch_folder import Description
from deploykit.stages.prune import patterns
from deploykit.stages.prune.channels import prune_by_ratio
from deploykit.stages.prune.masks import mask
from deploykit.stages.prune.options import OBSERVED, PruneOptions
from deploykit.stages.prune.search import prune_for_speed
from deploykit.stages.prune.surgeon import Surgeon
from deploykit.stages.prune.widths import kept_channels
from deploykit.store import Job, Made
from deploykit.values import Artifact, Json, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["OBSERVED", "PruneOptions", "kept_channels", "prune"]

LIBRARIES = ("torch", "torch-pruning")


def prune(
    source: Artifact,
    options: PruneOptions,
    *,
    out: Path,
    data: Dataset | None = None,
    force: bool = False,
) -> Artifact:
    """Remove channels, or set weights to zero, and write the model that is left.

    `data` is what importance is seen on, where it is seen on data. With a speed-up the widths
    follow from measured times of the layers; the whole network is not timed here (see
    `deploykit.faster`). Raises InputError: `source` is no torch artifact. UsageError: a pattern
    matches no module, or data is needed. StageError: the model cannot be traced, nothing can be
    removed, or the result has other outputs. MissingError: the target does not run here.
    """
    if source.format != "torch":
        raise InputError(
            f"{source.path}: pruning works on PyTorch models, this one is {source.format}",
            hint="prune before the export",
        )

    def work(folder: Path) -> Made:
        description = torch_folder.describe(source.path)
        operation = _Masking if options.method != "channels" else _Removal
        subject = operation(torch_folder.load(source), description, options)
        patterns.check(subject.module, (*options.keep, *options.ratios))
        before = _size(subject.module, description.inputs)
        changes, account = subject.carry_out(data)
        module = subject.module
        _check_outputs(module, description)
        after = _size(module, description.inputs)
        sizes = {
            f"{key}_{when}": size[key]
            for key in before
            for when, size in (("before", before), ("after", after))
        }
        torch_folder.write(
            module,
            description.model_copy(update=changes),
            torch_folder.factory_file(source.path, description),
            folder,
            torch_folder.own_examples(source.path),
        )
        return Made(
            format="torch",
            precision=source.precision,
            inputs=description.inputs,
            outputs=description.outputs,
            facts={**sizes, **account},
        )

    others = {"data": data.digest} if data else {}
    job = Job(stage="prune", source=source, options=options, others=others, libraries=LIBRARIES)
    return store.produce(job, work, out=out, force=force)


class _Masking:
    """Single weights become zero."""

    def __init__(self, module: nn.Module, description: Description, options: PruneOptions) -> None:
        self.module, self._description, self._options = module, description, options

    def carry_out(self, data: Dataset | None) -> tuple[Json, Json]:
        """What changes in the description, and the account."""
        del data
        masked = mask(self.module, self._options)
        sparse = sorted({*self._description.sparse, *masked.parameters})
        return {"sparse": tuple(sparse)}, masked.account


class _Removal:
    """Whole channels go."""

    def __init__(self, module: nn.Module, description: Description, options: PruneOptions) -> None:
        self._surgeon = Surgeon(module, description.inputs)
        self._description, self._options = description, options

    @property
    def module(self) -> nn.Module:
        """As it is now."""
        return self._surgeon.module

    def carry_out(self, data: Dataset | None) -> tuple[Json, Json]:
        """What changes in the description, and the account."""
        way = prune_for_speed if self._options.speedup else prune_by_ratio
        account = way(self._surgeon, self._options, data)
        facts, old = account.facts(), self._description
        changes = {
            "edits": (*old.edits, *account.edits),
            "attributes": {**old.attributes, **self._surgeon.attributes},
        }
        return changes, facts


def _check_outputs(module: nn.Module, description: Description) -> None:
    """Run a batch of another size than any before. Raises StageError: the outputs differ."""
    import torch

    probe = torch_module.examples(description.inputs, batch=3)
    try:
        with torch.inference_mode():
            called = torch_module.call(module, description.inputs, probe)
            outputs = torch_module.output_tensors(called)
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

    probe = torch_module.examples(inputs)
    with FlopCounterMode(display=False) as counter:
        torch_module.call(module, inputs, probe)
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "macs": counter.get_total_flops() // 2 // len(probe[0]),
    }
