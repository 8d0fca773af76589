"""Weights of a PyTorch model: read without pickle, loaded whole."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit import _json
from deploykit._lazy import needs
from deploykit.errors import InputError
from deploykit.formats.onnx_check import KINDS

if TYPE_CHECKING:
    import torch
    from torch import nn

LARGE = 1_000_000_000
"""Bytes of weights that are not held twice."""


OWN_KINDS = (b"PK", b"\x80")
"""How checkpoints of PyTorch begin: a zip archive, or a pickle that is then not run."""


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a checkpoint in place: `.safetensors`, or a `.pt`/`.pth` state dict without pickle.

    Raises InputError: unreadable, unsafe, or its keys or shapes are not those of the model.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint", hint="correct --weights")
    state = _read_state(path)
    if path.suffix == ".safetensors" and path.stat().st_size > LARGE:
        _take_over(module, state)
    try:
        missing, unknown = _assign(module, state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise InputError(
            f"{path}: {lines[-1].strip()}",
            hint="give the factory the arguments (--model-args) that this checkpoint was made with",
        ) from error
    if missing or unknown:
        kinds = (("missing", missing), ("unknown", unknown))
        parts = [f"{len(k)} {word} ({', '.join(sorted(k)[:3])})" for word, k in kinds if k]
        raise InputError(
            f"{path}: the keys are not those of the model: {'; '.join(parts)}",
            hint="give the checkpoint of this model, or the factory that made it",
        )
    _check_finite(module, path)


def _take_over(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Let the tensors of a file, which is mapped, be the module's own where they are alike.

    Loading the state dict then copies nothing. (A safetensors file has no tensor twice.)
    """
    for key, own in module.state_dict(keep_vars=True).items():
        new = state.get(key)
        if new is not None and (own.shape, own.dtype) == (new.shape, new.dtype):
            own.data = new


def _assign(module: nn.Module, state: Mapping[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    """Load a state dict; a key missing only because its tensor is shared is not missing."""
    result = module.load_state_dict(state, strict=False)
    own = module.state_dict(keep_vars=True)
    loaded = {id(own[key]) for key in state if key in own}
    missing = {key for key in result.missing_keys if id(own[key]) not in loaded}
    return missing, set(result.unexpected_keys)


def _read_state(path: Path) -> Mapping[str, torch.Tensor]:
    with needs("torch"):
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    _look(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load guesses at a pickle that it then refuses
            safe = path.suffix == ".safetensors"
            state = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a safetensors file: {error}", hint="save it again"
        ) from error
    except Exception as error:
        said = str(error).partition("WeightsUnpickler error: ")[2].strip() or str(error)
        reason = (said.splitlines() or [type(error).__name__])[0].partition(". Please ")[0][:120]
        raise InputError(
            f"{path}: refused, it is no plain state dict ({reason})",
            hint="save model.state_dict() with safetensors.torch.save_file; pickles are never run",
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise InputError(
            f"{path}: not a state dict of tensors", hint="save model.state_dict() and nothing else"
        )
    return state


def _look(path: Path) -> None:
    """Refuse what plainly is something else, and what the reader of safetensors lets pass.

    Raises InputError: it names what it looks like, or what its header must not have.
    """
    safe = path.suffix == ".safetensors"
    kind = "safetensors" if safe else "checkpoint"
    with path.open("rb") as file:
        head = file.read(64)
        if not head:
            raise InputError(f"{path}: not a {kind} file: it is empty", hint="save it again")
        for offset, magic, what, hint in KINDS:
            own = magic.startswith(OWN_KINDS) or (safe and offset == 8)
            if not own and head[offset:].startswith(magic):
                raise InputError(f"{path}: no checkpoint but {what}", hint=hint)
        if not safe or len(head) < 9:
            return
        file.seek(8)
        header = file.read(min(int.from_bytes(head[:8], "little"), path.stat().st_size))
    if not header.startswith(b"{"):
        raise InputError(
            f"{path}: not a safetensors file: its header does not begin with {{",
            hint="save it again",
        )
    try:
        json.loads(header, object_pairs_hook=_json.unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a safetensors file: {error}", hint="save it again") from None


def _check_finite(module: nn.Module, path: Path) -> None:
    import torch

    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(
                f"{path}: {key!r} has NaN or infinite values", hint="give a sound checkpoint"
            )
