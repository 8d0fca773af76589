"""What a model repository holds of a bundle's version: its files, and its configuration."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from deploykit import _files
from deploykit.bundle import verification
from deploykit.bundle.integrity import Whole
from deploykit.bundle.manifest import Engine
from deploykit.errors import UsageError
from deploykit.layouts import triton


def config(
    folder: Path, whole: Whole, engine: Engine, versions: tuple[int, ...], before: str | None
) -> str:
    """The bundle's configuration for this folder. Raises InputError: Triton would not load it."""
    made_for = Path(str(engine.config)).parent
    text = (whole.folder / str(engine.config)).read_text(encoding="utf-8")
    config = triton.parse(text, made_for.name)
    plans = dict(config.cc_model_filenames)
    artifact = verification.artifact_of(whole, engine)
    name, version = made_for.name, whole.bundle.version
    triton.check(text, triton.served_as(artifact, engine.backend, name, (version,), plans))
    text = triton.renamed(text, folder.name, versions, f"v{version}_")
    if before is not None and len(versions) > 1:
        _check_same_tensors(folder, triton.parse(before, folder.name), config)
    return text


def _check_same_tensors(folder: Path, old: object, new: object) -> None:
    """One configuration describes all versions that are served together. Raises UsageError."""
    for kind in ("input", "output"):
        one, other = (
            [(t.name, t.data_type, tuple(t.dims)) for t in getattr(config, kind)]
            for config in (old, new)
        )
        if one != other:
            raise UsageError(
                f"{folder} serves versions with other {kind}s than this one",
                hint="give it another --name, or publish with --keep 0",
            )


def place(folder: Path, whole: Whole, engine: Engine) -> None:
    """Link the files that Triton loads from the bundle into the version's folder."""
    version, model = whole.bundle.version, whole.folder / engine.path
    if not (folder / str(version)).exists():
        with _files.staged(folder / str(version)) as out:
            out.mkdir()
            for name in _files.tree(model.parent):
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                # weights that a file names are refused where they are hard links
                put = _link if name == model.name else shutil.copyfile
                put(model.parent / name, out / name)
    warmup = model.parent.parent / triton.WARMUP
    if warmup.is_dir():
        (folder / triton.WARMUP).mkdir(exist_ok=True)
        for file in warmup.iterdir():
            target = folder / triton.WARMUP / f"v{version}_{file.name}"
            with _files.staged(target) as out:
                _link(file, out)


def _link(source: Path, out: Path) -> None:
    try:
        os.link(source, out)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, out)


def numbers(folder: Path) -> list[int]:
    """The versions that lie in a folder, in order."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
