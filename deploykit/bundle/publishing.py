"""Put a bundle into a live Triton repository, and take it back.

A model's folder in the repository:

    config.pbtxt            names the versions that are served
    VERSION/model.onnx      what Triton loads: hard links into the bundle below
    warmup/vVERSION_input_N the data of the warm-up
    .bundles/VERSION/       the bundle as it was published, with manifest and signature

Each step is a rename, the configuration comes last: until then nothing changes for the server, and
after a kill the same bundle can be published again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import Field

from deploykit import _files, _locks
from deploykit import environment as environments
from deploykit.bundle import (
    golden,
    integrity,
    inventory,
    manifest,
    server,
    verification,
    version_folder,
)
from deploykit.bundle.integrity import Whole
from deploykit.bundle.manifest import MANIFEST, Bundle, Engine
from deploykit.environment import Environment
from deploykit.errors import DeploykitError, MissingError, UsageError
from deploykit.layouts import oci, triton
from deploykit.values import Value

BUNDLES = ".bundles"


class PublishOptions(Value):
    """How to publish."""

    url: str = Field(
        default="",
        description="gRPC address of the Triton that serves the repository, localhost:8001; "
        "without it the server must poll the repository",
    )
    keep: int = Field(
        default=1, ge=0, description="older versions that stay loaded beside the new one"
    )
    timeout_s: float = Field(default=60.0, gt=0, description="longest wait for the server")


class Published(Value):
    """What a repository serves now."""

    repository: Path
    name: str
    version: int
    """The newest one."""
    versions: tuple[int, ...]
    """All that are loaded."""
    engine: str
    """Path in the bundle of the model that was chosen."""
    passed_over: dict[str, str]
    """Models of the bundle that come before it, and why they do not fit."""
    ready: bool
    """Whether the server said so; False where none was asked."""
    golden_max_error: float | None
    """Largest |difference| of the server's answers to the golden inputs; None if not asked."""


def publish(
    path: Path,
    repository: Path,
    options: PublishOptions | None = None,
    *,
    public_key: Path | None = None,
    min_version: int | None = None,
    target: Environment | None = None,
) -> Published:
    """Publish the first model of a bundle that fits the machine (`target`, or this one).

    Everything is checked on a private copy inside the repository, which is then renamed. The
    server loads it, runs the golden inputs, and must answer within tolerance; else the repository
    is put back and the older versions serve on.

    Raises UsageError: the version is not a new one, or other tensors than the older versions have.
    BundleError: the bundle is not sound. MissingError: no model fits, or no server. InputError: the
    server refuses the model. AnswerIsNo: it answers differently.
    """
    options = options or PublishOptions()
    with oci.opened(path) as source:
        bundle = manifest.read(source)
        _check_layout(path, bundle)
        folder = repository / bundle.name
        with _leaving_nothing(folder), _locks.held(folder):
            for place in (folder, folder / BUNDLES, folder / triton.WARMUP):
                _files.sweep(place)
            served = served_versions(folder)
            kept = folder / BUNDLES / str(bundle.version)
            _check_new(folder, served, source, kept)
            for left in (kept, folder / kept.name):  # by a kill: nothing serves them
                _files.remove(left)
            with _files.staged(kept) as copy:
                inventory.copy(source, copy)
                whole = integrity.check(copy, public_key=public_key, min_version=min_version)
                engine, passed_over = _choose(path, whole, target)
            whole = whole._replace(folder=kept)
            versions = (
                (*served[-options.keep :], bundle.version) if options.keep else (bundle.version,)
            )
            try:
                error = _switch(folder, whole, engine, versions, options)
            except BaseException:
                _forget(folder, bundle.version)
                raise
    return Published(
        repository=repository,
        name=bundle.name,
        version=bundle.version,
        versions=versions,
        engine=engine.path,
        passed_over=passed_over,
        ready=bool(options.url),
        golden_max_error=error,
    )


@contextmanager
def _leaving_nothing(folder: Path) -> Iterator[None]:
    """On an error, a folder in which nothing was ever published goes: Triton would trip over it."""
    new = not folder.parent.exists()
    _files.make_folder(folder / BUNDLES)
    try:
        yield
    except BaseException:
        if not (folder / triton.CONFIG).exists() and not any((folder / BUNDLES).iterdir()):
            _files.remove(folder)
            if new:
                with suppress(OSError):  # somebody publishes another model there
                    folder.parent.rmdir()
        raise


def rollback(repository: Path, name: str, options: PublishOptions | None = None) -> Published:
    """Serve the version before the newest one, whose bundle is checked again, and only that.

    Raises UsageError: no such model, or nothing before. BundleError: the older bundle was damaged.
    """
    options = options or PublishOptions()
    folder = repository / name
    if not (folder / triton.CONFIG).is_file():
        raise UsageError(f"{repository} serves no model {name!r}", hint="give its folder's name")
    with _locks.held(folder):
        newest = served_versions(folder)[-1]
        older = [v for v in version_folder.numbers(folder / BUNDLES) if v < newest]
        if not older:
            raise UsageError(
                f"{folder} has nothing before version {newest}", hint="publish another version"
            )
        whole = integrity.check(folder / BUNDLES / str(older[-1]))
        engine, passed_over = _choose(folder, whole, None, run=False)
        error = _switch(folder, whole, engine, (older[-1],), options)
    return Published(
        repository=repository,
        name=name,
        version=older[-1],
        versions=(older[-1],),
        engine=engine.path,
        passed_over=passed_over,
        ready=bool(options.url),
        golden_max_error=error,
    )


def served_versions(folder: Path) -> tuple[int, ...]:
    """The versions that a model's configuration names, in order; none where there is none."""
    path = folder / triton.CONFIG
    if not path.is_file():
        return ()
    config = triton.parse(path.read_text(encoding="utf-8"), folder.name)
    return tuple(sorted(config.version_policy.specific.versions))


def _check_layout(path: Path, bundle: Bundle) -> None:
    if any(engine.config is None for engine in bundle.engines):
        raise UsageError(
            f"{path} has the layout {bundle.layout} of {bundle.schema_}, which cannot be published",
            hint="package it with --layout triton, kserve or oci",
        )


def _check_new(folder: Path, served: tuple[int, ...], source: Path, kept: Path) -> None:
    """A number is never used for two bundles, and never goes down. Raises UsageError."""
    version = int(kept.name)
    if served and version <= served[-1]:
        raise UsageError(
            f"{folder} serves version {served[-1]}, {version} is not newer",
            hint="package with a higher --version, or go back with `deploykit rollback`",
        )
    if kept.exists() and (kept / MANIFEST).read_bytes() != (source / MANIFEST).read_bytes():
        raise UsageError(
            f"version {version} of {folder} was another bundle",
            hint="package with a higher --version: a number is never reused",
        )


def _choose(
    path: Path, whole: Whole, target: Environment | None, *, run: bool = True
) -> tuple[Engine, dict[str, str]]:
    """The first model that fits, its golden inputs run if it is for this machine."""
    machine = target or environments.read()
    passed_over: dict[str, str] = {}
    for engine in whole.bundle.engines:
        if rows := verification.engine_rows(engine, machine):
            passed_over[engine.path] = "; ".join(rows)
            continue
        if run and (reason := verification.untrusted(whole, engine)):
            passed_over[engine.path] = reason
            continue
        if run:
            elsewhere = "checked for another machine" if target else None
            only = whole._replace(bundle=whole.bundle.model_copy(update={"engines": (engine,)}))
            verification.check_engines(only, machine, not_run=elsewhere)
        return engine, passed_over
    rows = [f"{engine}: {why}" for engine, why in passed_over.items()]
    raise MissingError(
        f"no model of {path} fits the machine: {'; '.join(rows)}",
        hint="install what is required, or package the model for that machine",
    )


def _switch(
    folder: Path, whole: Whole, engine: Engine, versions: tuple[int, ...], options: PublishOptions
) -> float | None:
    """Put the files in place, then the configuration, then tell the server; or put all back.

    Returns the largest difference of the server's golden answers.
    """
    config = folder / triton.CONFIG
    before = config.read_text(encoding="utf-8") if config.is_file() else None
    text = version_folder.config(folder, whole, engine, versions, before)
    version_folder.place(folder, whole, engine)
    _files.write_text(config, text)
    if not options.url:
        return None
    try:
        return _load(folder.name, whole, engine, options)
    except BaseException:
        _put_back(folder, before, options)
        raise


def _load(name: str, whole: Whole, engine: Engine, options: PublishOptions) -> float | None:
    """Let the server load the model and answer the golden inputs."""
    expected = engine.golden
    with server.connected(options.url, options.timeout_s) as client:
        server.load(client, name, whole.bundle.version)
        if expected is None:
            return None
        feed = golden.read_arrays(whole.folder / whole.bundle.golden.path)
        want = golden.read_arrays(whole.folder / expected.path)
        answer = server.ask(client, name, whole.bundle.version, feed, expected.batch_size)
    return server.check_answer(golden.compare(want, answer, expected), name, options.url)


def _put_back(folder: Path, before: str | None, options: PublishOptions) -> None:
    """Serve what was served before."""
    config = folder / triton.CONFIG
    if before is None:
        config.unlink()
    else:
        _files.write_text(config, before)
    _ignoring(
        lambda: server.reload(folder.name, options.url, options.timeout_s, gone=before is None)
    )


def _forget(folder: Path, version: int) -> None:
    """Remove a bundle that failed and was never served."""
    if version not in served_versions(folder) and version > max(served_versions(folder), default=0):
        for path in (folder / str(version), folder / BUNDLES / str(version)):
            _files.remove(path)
        for path in (folder / triton.WARMUP).glob(f"v{version}_*"):
            path.unlink()


def _ignoring(work: Callable[[], None]) -> None:
    """A server that is gone needs no telling; the error that led here is the one to report."""
    try:
        work()
    except DeploykitError:
        return
