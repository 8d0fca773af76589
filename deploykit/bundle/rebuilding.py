"""Native code is for one version and one kind of GPU; its bundle carries what makes it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from deploykit.backends import open_session
from deploykit.bundle import golden, integrity, verification
from deploykit.bundle.integrity import Whole
from deploykit.bundle.manifest import Engine
from deploykit.errors import AnswerIsNo, InputError
from deploykit.layouts import oci
from deploykit.values import Artifact, Json, StageRecord, Value

_NOT_TOLD = frozenset({"sealed", "warnings", "profile", "timing_cache"})
"""Facts of a build whose change tells nothing."""
_OF_THE_MACHINE = ("timing_cache", "plugins")
"""Options that are never taken from a bundle: paths, and libraries that are loaded."""


class Origin(NamedTuple):
    """What an engine is made again from."""

    whole: Whole
    engine: Engine | None
    """The engine in the bundle; None where it has portable models only."""
    record: StageRecord | None
    """How that was built."""
    source: Artifact
    """The portable model that it was built from."""

    @property
    def options(self) -> Json:
        """Options of the build that made it, without those that belong to its machine."""
        if self.record is None:
            return {}
        kept = {k: v for k, v in self.record.options.items() if k not in _OF_THE_MACHINE}
        if not kept.get("opt_shapes"):
            kept |= _shapes(self.record.facts)
        return {**kept, "flavour": self.record.facts.get("flavour", "auto")}

    @property
    def plugins(self) -> tuple[str, ...]:
        """Names of the plugin libraries that it was built with."""
        told = self.record.options.get("plugins", ()) if self.record else ()
        return tuple(Path(str(path)).name for path in told)

    @property
    def timing_cache(self) -> Path | None:
        """The kernel times in the bundle."""
        kept = self.engine.timing_cache if self.engine else None
        return self.whole.folder / kept if kept else None


class Rebuilt(Value):
    """An engine that was made again."""

    path: Path
    source: str
    """Path in the bundle of the portable model."""
    replaces: str | None
    """Path in the bundle of the engine."""
    changed: dict[str, tuple[object, object]]
    """What the build found out that is other than then: before and now."""
    golden_max_error: float | None
    """Largest |difference| of its answers to the golden inputs; None where it was not run."""
    not_proven: str | None
    """Why its answers were not compared; None where they were."""

    def __str__(self) -> str:
        rows = [f"{name}: {was}, now {now}" for name, (was, now) in self.changed.items()]
        proof = (
            f"NOT PROVEN, its answers were not compared: {self.not_proven}"
            if self.not_proven
            else f"golden outputs within tolerance, largest difference {self.golden_max_error:.3g}"
        )
        head = f"{self.path}: made again from {self.source}"
        return "\n  ".join((head, *(rows or ["nothing that was recorded changed"]), proof))


@contextmanager
def origin(path: Path, *, public_key: Path | None = None) -> Iterator[Origin]:
    """What the first engine of a bundle, or its first portable model, can be built from.

    Raises BundleError: the bundle is not sound. InputError: the model that the engine was built
    from is not in it.
    """
    with oci.opened(path) as folder:
        whole = integrity.check(folder, public_key=public_key)
        portable = [e for e in whole.bundle.engines if e.format == "onnx"]
        native = next((e for e in whole.bundle.engines if e.native_code), None)
        if native is None:
            source = verification.artifact_of(whole, portable[0])
            yield Origin(whole, None, None, source)
            return
        record = next(
            (r for r in verification.artifact_of(whole, native).history if r.stage == "build"), None
        )
        sources = [verification.artifact_of(whole, engine) for engine in portable]
        wanted = record.inputs.get("source") if record else None
        found = next((a for a in sources if a.sha256 == wanted), None)
        if record is None or found is None:
            raise InputError(
                f"{path}: {native.path} was built from a model that is not in the bundle "
                f"(sha256 {wanted})",
                hint="package the ONNX model that the engine was built from beside it",
            )
        yield Origin(whole, native, record, found)


def prove(told: Origin, made: Artifact, out: Path) -> Rebuilt:
    """Run the golden inputs on the new engine, where it can run, and tell what changed.

    Raises AnswerIsNo: it answers differently.
    """
    whole = told.whole
    served = {e.path: e for e in whole.bundle.engines}
    source = str(told.source.path.relative_to(whole.folder))
    like = told.engine or served[source]
    reason = golden.no_runner("engine")
    if reason is None and verification.expected_of(whole, like) is None:
        reason = "the bundle has no golden outputs in its precision"
    error = None
    if reason is None:
        with open_session(made, str(made.facts["flavour"])) as session:
            agreement = verification.answers(whole, like, session)
        if agreement.problem:
            raise AnswerIsNo(
                f"the engine that was built again answers differently: {agreement.problem}",
                hint="nothing was written; evaluate the portable model, and package it again",
            )
        error = agreement.max_error
    integrity.check_untouched(whole)
    return Rebuilt(
        path=out,
        source=source,
        replaces=told.engine.path if told.engine else None,
        changed=_changed(told.record.facts if told.record else {}, made.facts),
        golden_max_error=error,
        not_proven=reason,
    )


def _changed(before: Json, now: Json) -> dict[str, tuple[object, object]]:
    """Facts of two builds that differ; none where there is nothing to compare with."""
    names = [n for n in before if n not in _NOT_TOLD and not n.endswith("_seconds")]
    return {n: (before[n], now.get(n)) for n in names if before[n] != now.get(n)}


def _shapes(facts: Json) -> Json:
    """The profiles of a build whose shapes came from data, as options."""
    told: dict[str, list[str]] = {"min_shapes": [], "opt_shapes": [], "max_shapes": []}
    for profile in facts.get("profiles", ()):
        for name, shapes in profile.items():
            for kind, shape in zip(told, shapes, strict=True):
                told[kind].append(f"{name}:{'x'.join(map(str, shape))}")
    return dict(told)
