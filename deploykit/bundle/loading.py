"""Load a bundle into a server of one's own."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from pathlib import Path

from deploykit import environment as environments
from deploykit.backends import open_session
from deploykit.bundle import golden, integrity, verification
from deploykit.bundle.integrity import Whole
from deploykit.bundle.manifest import Engine
from deploykit.environment import Environment
from deploykit.errors import AnswerIsNo, MissingError
from deploykit.layouts import oci
from deploykit.session import Closing, Session
from deploykit.values import Array, Feed, Preprocessing, SessionOptions, TensorSpec

log = logging.getLogger("deploykit")
_SAFE = frozenset({"ort-cpu"})
"""Backends whose session many threads may run at once; others run one call at a time."""


class Loaded(Closing):
    """A model of a bundle, checked, warmed up and ready; `run` may be called from any thread."""

    def __init__(self, whole: Whole, engine: Engine, session: Session, stack: ExitStack) -> None:
        self.name: str = whole.bundle.name
        self.version: int = whole.bundle.version
        self.engine: Engine = engine
        self.passed_over: dict[str, str] = {}
        self.inputs: tuple[TensorSpec, ...] = engine.inputs
        self.outputs: tuple[TensorSpec, ...] = engine.outputs
        self.preprocessing: Preprocessing | None = whole.bundle.preprocessing
        self._session, self._stack = session, stack
        self._lock = None if engine.backend in _SAFE else threading.Lock()

    def run(self, feed: Feed) -> dict[str, Array]:
        """Run one batch: input names to arrays. Raises InputError: a feed it does not take."""
        if self._lock is None:
            return self._session.run(feed)
        with self._lock:
            return self._session.run(feed)

    def close(self) -> None:
        """Free the model. Calls that still run must have ended."""
        self._stack.close()


def load(
    path: str | Path,
    *,
    public_key: str | Path | None = None,
    min_version: int | None = None,
    threads: int = 1,
    environment: Environment | None = None,
) -> Loaded:
    """Open the first model of a bundle that fits this machine, checked and warmed up.

    Signature (with a key), version and files are checked, then the golden inputs are run. Which
    model was taken, and why not the ones before it, is logged (`deploykit`, a warning where one was
    passed over) and kept in `engine` and `passed_over`. Native code is only run where the signature
    was checked or this user built it. An engine without golden outputs of its own is held against
    those of the portable model of its precision.

    Raises BundleError: the files are not as manifest or signature say. MissingError: no model fits.
    AnswerIsNo: it answers differently from when the bundle was made. InputError: no bundle, no key.
    """
    machine = environment or environments.read()
    with ExitStack() as stack:
        folder = stack.enter_context(oci.opened(Path(path)))
        key = None if public_key is None else Path(public_key)
        whole = integrity.check(folder, public_key=key, min_version=min_version)
        engine, passed_over = _choose(whole, machine)
        artifact = verification.artifact_of(whole, engine)
        options = SessionOptions(threads=threads)
        session = stack.enter_context(open_session(artifact, engine.backend, options))
        integrity.check_untouched(whole)
        _warm_up(whole, engine, session)
        loaded = Loaded(whole, engine, session, stack.pop_all())
    loaded.passed_over = passed_over
    for passed, why in passed_over.items():
        log.warning("%s: %s is passed over: %s", path, passed, why)
    log.info("%s: %s runs on %s", path, engine.path, engine.backend)
    return loaded


def _choose(whole: Whole, machine: Environment) -> tuple[Engine, dict[str, str]]:
    """The first model that fits, and why those before it do not. Raises MissingError: none does."""
    passed_over: dict[str, str] = {}
    for engine in whole.bundle.engines:
        reasons = list(verification.engine_rows(engine, machine))
        if reason := golden.no_runner(engine.format):
            reasons.append(reason)
        if reason := verification.untrusted(whole, engine):
            reasons.append(reason)
        if not reasons:
            return engine, passed_over
        passed_over[engine.path] = "; ".join(reasons)
    rows = [f"{engine}: {why}" for engine, why in passed_over.items()]
    raise MissingError(
        f"no model of {whole.folder} fits this machine: {'; '.join(rows)}",
        hint="install what is required, or package the model for this machine",
    )


def _warm_up(whole: Whole, engine: Engine, session: Session) -> None:
    """Run the golden inputs. Raises AnswerIsNo: the answers are others."""
    if verification.expected_of(whole, engine) is None:
        feed = golden.read_arrays(whole.folder / whole.bundle.golden.path)
        golden.run(session, feed, whole.bundle.golden.samples)
        log.warning("%s: its answers could not be compared: %s", engine.path, engine.no_golden)
        return
    agreement = verification.answers(whole, engine, session)
    if agreement.problem:
        raise AnswerIsNo(
            f"{whole.folder / engine.path} on {engine.backend}: {agreement.problem}",
            hint="run `deploykit verify` here: it tells what differs from the packaging machine",
        )
