"""Verify a bundle: who made it, its files, then the machine, then the answers of its engines."""

from __future__ import annotations

from pathlib import Path

from deploykit import _json
from deploykit import environment as environments
from deploykit.backends import open_session
from deploykit.bundle import golden, integrity, manifest
from deploykit.bundle.golden import Agreement
from deploykit.bundle.integrity import Whole
from deploykit.bundle.manifest import Bundle, Engine, GoldenOutputs
from deploykit.bundle.requirements import mismatches
from deploykit.environment import Environment
from deploykit.errors import AnswerIsNo, InputError, IntegrityError, MissingError
from deploykit.formats import engine_file, onnx_check, onnx_file
from deploykit.layouts import oci
from deploykit.session import Session
from deploykit.values import Array, Artifact, Feed, Value, parse


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


def verify(
    path: Path,
    *,
    public_key: Path | None = None,
    min_version: int | None = None,
    target: Environment | None = None,
    environment: Environment | None = None,
) -> Verification:
    """Check signature, version, files, the machine, and the golden outputs of every engine.

    Nothing of the bundle is loaded before its files and the machine are found good. With `target`,
    the description of another machine, the engines are held against that one and not run.

    Raises InputError: no bundle there, or no key. BundleError: its files are not as the manifest
    or the signature says, or its version is below `min_version`. MissingError: an engine does not
    fit the machine (`environment`, by default the real one). AnswerIsNo: engines answer
    differently from when the bundle was made. Each tells all that is wrong. ResourceError: a model
    without a signature takes more memory or time to read than one of its size may.
    """
    with oci.opened(path) as folder:
        machine = target or environment or environments.read()
        whole = integrity.check(
            folder,
            public_key=public_key,
            min_version=min_version,
            also=lambda bundle: machine_rows(bundle, machine),
        )
        if rows := machine_rows(whole.bundle, machine):
            where = "the target machine" if target else "this machine"
            raise MissingError(
                f"{path} does not fit {where}: {'; '.join(rows)}",
                hint="install what is required, or package the model for that machine",
            )
        elsewhere = "checked for another machine" if target else None
        engines = check_engines(whole, machine, not_run=elsewhere)
        return _verification(path, whole, engines, target=target is not None)


def machine_rows(bundle: Bundle, machine: Environment) -> list[str]:
    """What every engine requires and the machine has not."""
    return [
        f"{engine.path}: {row}" for engine in bundle.engines for row in engine_rows(engine, machine)
    ]


def engine_rows(engine: Engine, machine: Environment) -> list[str]:
    """What the engine requires and the machine has not; empty where it fits."""
    return [*mismatches(engine.requires, machine), *_unknown_backend(engine)]


def check_engines(
    whole: Whole, machine: Environment, *, not_run: str | None = None
) -> tuple[EngineCheck, ...]:
    """Run the golden inputs on every engine, unless there is a reason not to.

    Raises AnswerIsNo: engines that answer differently, all of them. IntegrityError: a file was
    changed meanwhile.
    """
    checks, wrong, hints = [], [], []
    for engine in whole.bundle.engines:
        check, problem = _check_engine(whole, engine, not_run)
        checks.append(check)
        if problem:
            wrong.append(f"{whole.folder / engine.path} on {engine.backend}: {problem}")
            hints.append(_differences(engine, machine))
    integrity.check_untouched(whole)
    if wrong:
        raise AnswerIsNo("; ".join(wrong), hint=hints[0])
    return tuple(checks)


def _verification(
    path: Path, whole: Whole, engines: tuple[EngineCheck, ...], *, target: bool
) -> Verification:
    bundle = whole.bundle
    errors = [e.golden_max_error for e in engines if e.golden_max_error is not None]
    return Verification(
        path=path,
        name=bundle.name,
        version=bundle.version,
        layout=bundle.layout,
        files=len(bundle.files) + 1,
        size_bytes=sum(entry.size for entry in bundle.files),
        checks=_sentences(whole, engines, target=target),
        engines=engines,
        golden_max_error=max(errors) if errors else None,
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
    whole: Whole, engine: Engine, not_run: str | None
) -> tuple[EngineCheck, str | None]:
    """What was found out about an engine, and what is wrong with its answers."""
    artifact, agreement = artifact_of(whole, engine), None
    if engine.format == "onnx":
        _check_sound(whole, artifact)
        _check_names(artifact)
    reason = golden.no_runner(engine.format) or not_run or untrusted(whole, engine)
    if reason is None and expected_of(whole, engine) is None:
        reason = engine.no_golden
    if reason is None:
        with open_session(artifact, engine.backend) as session:
            agreement = answers(whole, engine, session)
    check = EngineCheck(
        path=engine.path,
        backend=engine.backend,
        golden_max_error=agreement.max_error if agreement else None,
        golden_not_run=reason,
    )
    return check, agreement.problem if agreement else None


def answers(whole: Whole, engine: Engine, session: Session) -> Agreement:
    """How a session answers the golden inputs. Raises IntegrityError: these are bad."""
    expected = expected_of(whole, engine)
    assert expected is not None  # noqa: S101 - who calls has asked
    feed = _golden_inputs(whole.folder, whole.bundle)
    want = _golden_outputs(whole.folder, expected)
    return golden.compare(want, golden.run(session, feed, expected.batch_size), expected)


def expected_of(whole: Whole, engine: Engine) -> GoldenOutputs | None:
    """What its answers are held against: its own golden outputs, or those of a model like it.

    An engine that could not run where it was packaged has none; the portable model of its precision
    gave them then. None where there is no such model.
    """
    like = (e.golden for e in whole.bundle.engines if e.precision == engine.precision and e.golden)
    return engine.golden or next(like, None)


def untrusted(whole: Whole, engine: Engine) -> str | None:
    """Why native code must not run here; None where it may, and for what is none."""
    if not engine.native_code or whole.trusted:
        return None
    if engine_file.built_here(_recorded(whole, engine)):
        return None
    return "it is native code that was not built here, and no signature was checked"


def _recorded(whole: Whole, engine: Engine) -> Artifact:
    """The model by its record in the bundle. Raises IntegrityError: that is of another."""
    path = whole.folder / engine.record
    try:
        record = parse(Artifact, _json.read(path), str(path))
    except InputError as error:
        raise IntegrityError(str(error), hint=manifest.GET_AGAIN) from error
    digests = {entry.path: entry.sha256 for entry in whole.bundle.files}
    if record.sha256 != digests[engine.path]:
        raise IntegrityError(
            f"{path} is the record of another file than {engine.path}", hint=manifest.GET_AGAIN
        )
    return record.model_copy(update={"path": whole.folder / engine.path})


def _check_sound(whole: Whole, artifact: Artifact) -> None:
    """Read a model that nobody signed for in a process with limits. Raises IntegrityError."""
    if whole.trusted:
        return
    try:
        onnx_check.check(artifact.path)
    except InputError as error:
        raise IntegrityError(str(error), hint=manifest.GET_AGAIN) from error


def _check_names(artifact: Artifact) -> None:
    """Hold an ONNX model against the tensors that the manifest names. Raises IntegrityError."""
    model = onnx_file.shell(artifact.path)
    for kind, told, real in (
        ("inputs", artifact.inputs, onnx_file.inputs(model)),
        ("outputs", artifact.outputs, onnx_file.outputs(model)),
    ):
        if {spec.name for spec in told} != {spec.name for spec in real}:
            raise IntegrityError(
                f"{artifact.path}: the manifest names other {kind} than the model has",
                hint=manifest.GET_AGAIN,
            )


def artifact_of(whole: Whole, engine: Engine) -> Artifact:
    """The engine as a model on disk; native code as one that may run, if it was signed."""
    if engine.native_code:
        found = _recorded(whole, engine)
        return engine_file.vouched(found) if whole.trusted and found.history else found
    digests = {entry.path: entry.sha256 for entry in whole.bundle.files}
    return Artifact(
        path=whole.folder / engine.path,
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


def _sentences(whole: Whole, engines: tuple[EngineCheck, ...], *, target: bool) -> tuple[str, ...]:
    bundle, machine = whole.bundle, "the target machine" if target else "this machine"
    return (
        f"manifest is sound ({bundle.schema_}, version {bundle.version})",
        whole.signed,
        f"{len(bundle.files)} files have their size and sha256, and there is nothing else",
        f"{machine} meets what the engines require",
        *(
            f"{e.path}: golden inputs not run: {e.golden_not_run}"
            if e.golden_not_run
            else f"{e.path}: golden outputs within tolerance on {e.backend}"
            for e in engines
        ),
    )
