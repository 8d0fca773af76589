"""A training on disk: after each epoch whole, in one file without pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit import _files
from deploykit.values import Value

if TYPE_CHECKING:
    import torch

State = dict[str, "torch.Tensor"]


class Progress(Value):
    """How far a training is."""

    epochs: int = 0
    losses: tuple[float, ...] = ()
    """The mean of each epoch."""
    scores: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()


def path_for(out: Path) -> Path:
    """Beside the model that is to be."""
    return out.with_name(f"{out.name}.training.safetensors")


def save(path: Path, key: str, progress: Progress, tensors: State) -> None:
    """Write a checkpoint, whole or not at all. Raises ResourceError: the disk is full."""
    from safetensors.torch import save_file

    told = {"key": key, "progress": json.dumps(progress.model_dump(mode="json"))}
    plain = {name: t.detach().clone().contiguous() for name, t in tensors.items()}
    with _files.staged(path) as temporary:
        save_file(plain, temporary, told)


def load(path: Path, key: str) -> tuple[Progress, State] | None:
    """The checkpoint of the same training (`key`); None if there is none that is whole."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            if told.get("key") != key:
                return None
            progress = Progress.model_validate(json.loads(told["progress"]))
            return progress, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
