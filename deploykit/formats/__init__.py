"""Models on disk, one kind of file each."""

from __future__ import annotations

from pathlib import Path

from deploykit import store
from deploykit.errors import InputError
from deploykit.formats import engine_file, onnx_file, torch_folder
from deploykit.values import Artifact

__all__ = ["engine_file", "onnx_file", "open_model", "torch_folder"]

ENGINES = frozenset({".engine", ".plan", ".trt"})


def open_model(path: str | Path, *, native: bool = False) -> Artifact:
    """Open a torch artifact folder, an `.onnx` file or an engine.

    With `native` an `.onnx` file may hold nodes that only native code of others can run.
    Raises InputError: no such model or an unknown kind. IntegrityError: it is not the file that its
    record describes.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"{path}: no such model",
            hint="give file.py:factory, a torch artifact folder, an .onnx file or an .engine",
        )
    if path.is_dir():
        torch_folder.describe(path)
        if artifact := store.read(path):
            return artifact
        raise InputError(
            f"{path}: {store.FOLDER_RECORD} is missing", hint="make the torch artifact again"
        )
    if path.suffix == ".onnx":
        return onnx_file.open_file(path, native=native)
    if path.suffix in ENGINES:
        return engine_file.open_file(path)
    raise InputError(
        f"{path}: a model of an unknown kind {path.suffix!r}",
        hint="give file.py:factory, a torch artifact folder, an .onnx file or an .engine",
    )
