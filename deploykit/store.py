"""Artifacts on disk: published whole, with a record of how they were made.

A model lies at its path; its record (the Artifact as JSON) lies beside it as `NAME.record.json`, or
inside as `artifact.json` where the model is a folder. A model without a record is simply one that
deploykit did not make.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TypeVar

from deploykit import _files, _interrupt, _json, _locks
from deploykit.environment import versions
from deploykit.errors import InputError, IntegrityError, UsageError
from deploykit.values import (
    Artifact,
    Format,
    Json,
    Precision,
    Preprocessing,
    StageRecord,
    TensorSpec,
    Value,
    parse,
)

FOLDER_RECORD = "artifact.json"
V = TypeVar("V", bound=Value)


class Made(Value):
    """What a stage made at the path it was given."""

    format: Format
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    facts: Json
    weights: tuple[str, ...] = ()
    """Files beside it that hold its weights."""
    preprocessing: Preprocessing | None = None


class Job(Value):
    """A stage with everything that decides its result."""

    stage: str
    source: Artifact | None
    """What is changed; None for the stage that takes a model in."""
    options: Value
    others: dict[str, str] = {}
    """Digests of further inputs, by role: teacher, calibration data."""
    libraries: tuple[str, ...] = ()

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of everything that goes in."""
        source = {"source": self.source.sha256} if self.source else {}
        return {**source, **self.others}

    @property
    def key(self) -> str:
        """Equal for equal stage, options, inputs, library versions and code of deploykit."""
        parts = {
            "stage": self.stage,
            "options": self.options.model_dump(mode="json"),
            "inputs": self.inputs,
            "versions": versions(self.libraries),
            "code": code_digest(),
        }
        return digest_of(parts)


def produce(job: Job, work: Callable[[Path], Made], *, out: Path, force: bool = False) -> Artifact:
    """Run a stage's `work` on a temporary path and publish what it made at `out`.

    What lies at `out` already is returned as it is if it was made by the same job. Of several
    processes one makes it, the others wait. Raises UsageError: `out` is in the way and not forced.
    ResourceError: another process does not get done with it.
    """
    if done := find(out, job.key):
        return done
    _check_free(out, force=force)
    with _locks.alone(out):
        if done := find(out, job.key):
            return done
        _check_free(out, force=force)
        _settle(out)
        return _make(job, work, out)


def _make(job: Job, work: Callable[[Path], Made], out: Path) -> Artifact:
    replaced = _weights_of(out)
    started = time.monotonic()
    with ExitStack() as publishing:
        publishing.callback(_settle, out)
        with _files.staged(out) as temporary:
            made = work(temporary)
            record = StageRecord(
                stage=job.stage,
                options=job.options.model_dump(mode="json"),
                facts=made.facts,
                inputs=job.inputs,
                versions=versions(("deploykit", *job.libraries)),
                seconds=round(time.monotonic() - started, 3),
                key=job.key,
            )
            artifact = Artifact(
                path=out,
                format=made.format,
                precision=made.precision,
                inputs=made.inputs,
                outputs=made.outputs,
                sha256=digest(temporary, made.weights),
                weights=made.weights,
                preprocessing=made.preprocessing or (job.source and job.source.preprocessing),
                history=(*(job.source.history if job.source else ()), record),
            )
            _interrupt.check()
            publishing.enter_context(_interrupt.held())  # a model and its record go together
            _write_record(temporary, out, artifact)
        if not out.is_dir():
            _files.move(_next_record(out), record_path(out))
        for name in set(replaced) - set(made.weights):
            (out.parent / name).unlink(missing_ok=True)
    return artifact


def place(made: Artifact, out: Path, *, force: bool = False) -> Artifact:
    """Put a model of one file, made elsewhere on trial, at `out` with its record.

    Raises UsageError: `out` is in the way and not forced.
    """
    _check_free(out, force=force)
    artifact = made.model_copy(update={"path": out})
    with _locks.alone(out), ExitStack() as publishing:
        publishing.callback(_settle, out)
        with _files.staged(out) as temporary:
            shutil.copyfile(made.path, temporary)
            publishing.enter_context(_interrupt.held())
            _write_record(temporary, out, artifact)
        _files.move(_next_record(out), record_path(out))
    return artifact


def _check_free(out: Path, *, force: bool) -> None:
    _files.check_free(out, force=force)
    _check_replaceable(out)


def _next_record(out: Path) -> Path:
    """Where a record waits for its model; `read` takes it if it fits: a kill parts them never."""
    return out.with_name(f".{out.name}.record.json.next")


def _settle(out: Path) -> None:
    """After a kill or an error: give the model the record that waits, or drop it."""
    waiting = _next_record(out)
    if not waiting.exists():
        return
    if _waiting(out):
        _files.move(waiting, record_path(out))
    else:
        waiting.unlink()


def _waiting(path: Path) -> Artifact | None:
    """The artifact at `path` by a record that waits for it; None if that is of another model."""
    if not path.is_file() or not (waiting := _next_record(path)).exists():
        return None
    try:
        return _described(path, waiting)
    except (InputError, IntegrityError):
        return None


def _weights_of(out: Path) -> tuple[str, ...]:
    """The files of weights that the model at `out` has by its record, if it has one."""
    try:
        found = parse(Artifact, _json.read(record_path(out)), str(out)).weights
    except InputError:
        return ()
    return tuple(name for name in found if Path(name).name == name)


def _check_replaceable(out: Path) -> None:
    """Refuse to replace a folder that deploykit did not write, forced or not. Raises UsageError."""
    if out.is_dir() and any(out.iterdir()) and not (out / FOLDER_RECORD).is_file():
        raise UsageError(
            f"{out} is a folder that deploykit did not write, it is not replaced",
            hint="give another output path, or remove it yourself",
        )


def find(out: Path, key: str) -> Artifact | None:
    """The artifact at `out`, if it is whole and was made by the job of this key."""
    try:
        artifact = read(out)
    except (InputError, IntegrityError):
        return None
    return artifact if artifact and artifact.history and artifact.history[-1].key == key else None


def read(path: Path) -> Artifact | None:
    """The artifact at `path` by its record; None if it has none.

    Raises IntegrityError: the model is not the one that the record describes.
    """
    record = record_path(path)
    if found := _waiting(path):
        return found
    if not path.exists() or not record.exists():
        return None
    return _described(path, record)


def _described(path: Path, record: Path) -> Artifact:
    artifact = parse(Artifact, _json.read(record), str(record))
    artifact = artifact.model_copy(update={"path": path})
    if digest(path, artifact.weights) != artifact.sha256:
        raise IntegrityError(
            f"{path} is not the file that its record describes (sha256 differs)",
            hint="make it again"
            if path.is_dir()
            else f"make it again, or remove {record} to use it as a model without history",
        )
    return artifact


def last_record(path: Path) -> StageRecord | None:
    """How the model at a path was made; None where there is nothing whole."""
    try:
        artifact = read(path)
    except (InputError, IntegrityError, OSError, ValueError):  # or no path for a file at all
        return None
    return artifact.history[-1] if artifact and artifact.history else None


def record_path(path: Path) -> Path:
    """Where the record of the model at `path` lies."""
    return path / FOLDER_RECORD if path.is_dir() else path.with_name(f"{path.name}.record.json")


def digest(path: Path, weights: Sequence[str] = ()) -> str:
    """sha256 of a model: of the file, or of all files of the folder but the record.

    Where files beside it hold its weights, of the digests of all of them. Raises IntegrityError:
    one is missing.
    """
    if weights:
        beside = {name: _weights_digest(path.parent / name) for name in weights}
        return digest_of({"": digest(path), **beside})
    if not path.is_dir():
        return _files.sha256(path)
    names = [name for name in _files.tree(path) if name != FOLDER_RECORD]
    lines = (f"{name}\0{_files.sha256(path / name)}\n" for name in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _weights_digest(path: Path) -> str:
    if not path.is_file():
        raise IntegrityError(f"{path}: the weights are missing", hint="move both files together")
    return _files.sha256(path)


def digest_of(data: Mapping[str, object]) -> str:
    """sha256 of plain data in canonical JSON."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def remember(path: Path, key: str, kind: type[V], make: Callable[[], V]) -> tuple[V, bool]:
    """The value that lies at `path` if it was made under this key; else make and keep it.

    Returns the value and whether an earlier one was taken. A torn or foreign file is a miss.
    """
    try:
        kept = _json.read(path)
        if kept.get("key") == key:
            return kind.model_validate(kept["value"]), True
    except (InputError, ValueError, KeyError):
        pass
    value = make()
    plain = {"key": key, "value": json.loads(value.model_dump_json(by_alias=True))}
    _files.write_text(path, json.dumps(plain) + "\n")
    return value, False


@cache
def code_digest() -> str:
    """Digest of deploykit's own code: results of other code are not reused."""
    package = Path(__file__).parent
    lines = (
        f"{p.relative_to(package)}\0{_files.sha256(p)}\n" for p in sorted(package.rglob("*.py"))
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def record_text(artifact: Artifact) -> str:
    """The record of an artifact as JSON text, without the place where it lies."""
    plain = json.loads(artifact.model_dump_json(exclude={"path"}))
    return json.dumps({**plain, "path": "."}, indent=1) + "\n"


def _write_record(temporary: Path, out: Path, artifact: Artifact) -> None:
    """Into the folder; of a file beside where it is to lie, to wait for it."""
    if temporary.is_dir():
        (temporary / FOLDER_RECORD).write_text(record_text(artifact), encoding="utf-8")
    else:
        _files.write_text(_next_record(out), record_text(artifact))
