"""Verify a bundle: its files, then the machine, then the answers of its engines."""

from __future__ import annotations

from pathlib import Path

from deploykit import environment as environments
from deploykit.backends import open_session
from deploykit.bundle import golden, inventory, manifest
from deploykit.bundle.manifest import Bundle, Engine, GoldenOutputs
from deploykit.bundle.requirements import mismatches
from deploykit.environment import Environment
from deploykit.errors import AnswerIsNo, IntegrityError, MissingError
from deploykit.formats import onnx_file
from deploykit.values import Array, Artifact, Feed, Value


class EngineCheck(Value):
    """What was found out about one engine."""

    path: str
    backend: str
    golden_max_error: float | None
    """Largest |difference| from the golden outputs; None where they were not run."""
    golden_not_run: str | None
    """Why not; None where they were run."""


class Verification(Value):
    """A bundle that is whole, fits this machine, and answers as it did when it was made."""

    path: Path
    name: str
    version: int
    layout: str
    files: int
    """Files checked, with the manifest."""
    size_bytes: int
    checks: tuple[str, ...]
    """What was checked, one sentence each, in this order."""
    engines: tuple[EngineCheck, ...]
    golden_max_error: float | None
    """Over all engines that were run; None where none was."""

    def __str__(self) -> str:
        waiting = [engine.path for engine in self.engines if engine.golden_not_run]
        head = f"files verified, NOT RUN: {', '.join(waiting)}" if waiting else "verified"
        return "\n  ".join((head, *self.checks))


def verify(path: Path, *, environment: Environment | None = None) -> Verification:
    """Check the manifest, every file, the machine, and the golden outputs of every engine.

    Nothing of the bundle is loaded before its files and the machine are found good. The files are
    hashed and then loaded by path: whoever can write to the folder in between can change them.

    Raises InputError: no bundle there. BundleError: its files are not as the manifest says.
    MissingError: an engine does not fit this machine (`environment`, by default the real one).
    AnswerIsNo: an engine answers differently from when the bundle was made.
    """
    bundle = manifest.read(path)
    inventory.check(path, bundle)
    machine = environment or environments.read()
    _check_machine(path, bundle, machine)
    feed = _golden_inputs(path, bundle)
    engines = tuple(_check_engine(path, bundle, engine, feed, machine) for engine in bundle.engines)
    errors = [e.golden_max_error for e in engines if e.golden_max_error is not None]
    return Verification(
        path=path,
        name=bundle.name,
        version=bundle.version,
        layout=bundle.layout,
        files=len(bundle.files) + 1,
        size_bytes=sum(entry.size for entry in bundle.files),
        checks=_sentences(bundle, engines),
        engines=engines,
        golden_max_error=max(errors) if errors else None,
    )


def _check_machine(path: Path, bundle: Bundle, machine: Environment) -> None:
    rows = [
        f"{engine.path}: {row}"
        for engine in bundle.engines
        for row in (*mismatches(engine.requires, machine), *_unknown_backend(engine))
    ]
    if rows:
        raise MissingError(
            f"{path} does not fit this machine: {'; '.join(rows)}",
            hint="install what is required, or package the model for this machine",
        )


def _golden_inputs(path: Path, bundle: Bundle) -> Feed:
    feed = golden.read_arrays(path / bundle.golden.path)
    if not feed or any(array.shape[:1] != (bundle.golden.samples,) for array in feed.values()):
        raise IntegrityError(
            f"{path / bundle.golden.path} does not hold {bundle.golden.samples} samples",
            hint=manifest.GET_AGAIN,
        )
    return feed


def _golden_outputs(path: Path, expected: GoldenOutputs) -> dict[str, Array]:
    found = golden.read_arrays(path / expected.path)
    if not set(found) == set(expected.atol) == set(expected.rtol):
        raise IntegrityError(
            f"{path / expected.path} does not hold the outputs {sorted(expected.atol)}",
            hint=manifest.GET_AGAIN,
        )
    return found


def _check_engine(
    path: Path, bundle: Bundle, engine: Engine, feed: Feed, machine: Environment
) -> EngineCheck:
    artifact = _artifact(path, bundle, engine)
    if reason := engine.no_golden or golden.no_runner(engine.format):
        return EngineCheck(
            path=engine.path, backend=engine.backend, golden_max_error=None, golden_not_run=reason
        )
    if engine.format == "onnx":
        _check_names(artifact)
    expected = engine.golden
    assert expected is not None  # noqa: S101 - `manifest.read` has checked it
    want = _golden_outputs(path, expected)
    with open_session(artifact, engine.backend) as session:
        agreement = golden.compare(want, golden.run(session, feed, expected.batch_size), expected)
    if agreement.problem:
        raise AnswerIsNo(
            f"{path / engine.path} on {engine.backend}: {agreement.problem}",
            hint=_differences(engine, machine),
        )
    return EngineCheck(
        path=engine.path,
        backend=engine.backend,
        golden_max_error=agreement.max_error,
        golden_not_run=None,
    )


def _check_names(artifact: Artifact) -> None:
    """Hold an ONNX model against the tensors that the manifest names. Raises IntegrityError."""
    model = onnx_file.read(artifact.path)
    for kind, told, real in (
        ("inputs", artifact.inputs, onnx_file.inputs(model)),
        ("outputs", artifact.outputs, onnx_file.outputs(model)),
    ):
        if {spec.name for spec in told} != {spec.name for spec in real}:
            raise IntegrityError(
                f"{artifact.path}: the manifest names other {kind} than the model has",
                hint=manifest.GET_AGAIN,
            )


def _artifact(path: Path, bundle: Bundle, engine: Engine) -> Artifact:
    digests = {entry.path: entry.sha256 for entry in bundle.files}
    return Artifact(
        path=path / engine.path,
        format=engine.format,
        precision=engine.precision,
        inputs=engine.inputs,
        outputs=engine.outputs,
        sha256=digests[engine.path],
    )


def _unknown_backend(engine: Engine) -> list[str]:
    known = golden.runners(engine.format)
    if not known or engine.backend in known:
        return []
    return [f"backend {engine.backend} required, this version of deploykit has {', '.join(known)}"]


def _differences(engine: Engine, machine: Environment) -> str:
    """How this machine differs from the one that gave the golden outputs."""
    was, now = engine.built_on, machine
    rows = []
    if was:
        rows = [
            f"{key} {getattr(was, key)}, now {getattr(now, key)}"
            for key in ("cpu", "cpu_features", "machine", "system")
            if getattr(was, key) != getattr(now, key)
        ]
        rows += [
            f"{name} {was.libraries.get(name)}, now {now.libraries.get(name)}"
            for name in engine.requires.runtimes
            if was.libraries.get(name) != now.libraries.get(name)
        ]
    told = f"since it was packaged: {'; '.join(rows)}. " if rows else ""
    return f"{told}Evaluate the model on this machine, and package it again if it is good"


def _unchecked(bundle: Bundle) -> str:
    gpus = sorted({gpu for engine in bundle.engines for gpu in engine.requires.gpus})
    return f"; its GPU is not checked (built for {', '.join(gpus)})" if gpus else ""


def _sentences(bundle: Bundle, engines: tuple[EngineCheck, ...]) -> tuple[str, ...]:
    return (
        f"manifest is sound ({bundle.schema_})",
        f"{len(bundle.files)} files have their size and sha256, and there is nothing else",
        f"this machine meets what the engines require{_unchecked(bundle)}",
        *(
            f"{e.path}: golden inputs not run: {e.golden_not_run}"
            if e.golden_not_run
            else f"{e.path}: golden outputs within tolerance on {e.backend}"
            for e in engines
        ),
    )
