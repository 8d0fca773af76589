"""The whole way: from a recipe to a measured, packaged engine, or an honest no."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from deploykit import _files, _json, _locks, backends, evaluation, metrics, store
from deploykit._code import load_function
from deploykit.bundle import Bundle, PackagedModel, PackageOptions, inventory, manifest, package
from deploykit.environment import read as read_environment
from deploykit.errors import DeploykitError, InputError, UsageError
from deploykit.evaluation import Outputs
from deploykit.measure import BenchOptions, BenchResult, Candidate, bench, statistics
from deploykit.plan import FLOAT, MODEL, Step, data, plan
from deploykit.recipe import Recipe
from deploykit.report import summary
from deploykit.report.made import describe
from deploykit.report.summary import Row, RunSummary
from deploykit.values import Artifact, Score, SessionOptions, Verdict, parse
from deploykit.verdict import Contender, Limits, decide

MARKER = "deploykit-run.json"
MAX_SHARED = 0.01
"""Share of evaluation samples known before; public data sets hold a few duplicates."""


class Observer(Protocol):
    """Who watches a run."""

    def step(self, name: str, what: str) -> None:
        """A step begins."""

    def progress(self, done: int, total: int, text: str = "") -> None:
        """The step is so far."""

    def done(self, text: str, *, cached: bool) -> None:
        """The step ended; `cached` if an earlier run's result was taken."""


class _Silent:
    """An Observer that tells nobody."""

    def step(self, name: str, what: str) -> None:
        """Do nothing."""

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Do nothing."""

    def done(self, text: str, *, cached: bool) -> None:
        """Do nothing."""


@dataclass(slots=True)
class Run:
    """A run in progress: what was asked, where it goes, what is made so far."""

    recipe: Recipe
    out: Path
    observer: Observer
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    scores: dict[tuple[str, str], Score] = field(default_factory=dict)
    """By artifact and backend."""

    @property
    def target(self) -> str:
        """The backend that the engine is for."""
        return self.recipe.quantize.target


def run(
    recipe: Recipe, *, out: Path, observer: Observer | None = None, force: bool = False
) -> RunSummary:
    """Make, evaluate and bench every artifact of the recipe, decide, and package the winner.

    What an earlier run into `out` made from the same inputs, options and versions is taken as it
    is. Where no engine passes both gates, the verdict of the summary ships None and there is no
    bundle. Raises UsageError: `out` is in the way.
    """
    state = Run(recipe, out, observer or _Silent())
    if state.target not in {b.name for b in backends.BACKENDS if "onnx" in b.formats}:
        raise UsageError(
            f"`run` measures on the target, and {state.target} models do not run here",
            hint="take the target ort-cpu or openvino; use `quantize` and `build` for TensorRT",
        )
    if ":" in recipe.gates.metric:
        load_function(recipe.gates.metric)  # before minutes of work, not after
    _check_apart(recipe)
    _claim(out, force=force)
    with _locks.held(out):
        return _carried_out(state)


def _carried_out(state: Run) -> RunSummary:
    out = state.out
    for step in plan(state.recipe):
        _make(state, step)
    result = _bench(state)
    verdict = _decide(state, result)
    made = _summarize(state, result, verdict)
    summary.write(made, result, out)
    if verdict.ship is None:
        _files.remove(out / "bundle")  # an earlier run's engine is not this one's answer
    else:
        _package(state, verdict.ship, made)
    return made


def _check_apart(recipe: Recipe) -> None:
    """Refuse to score on the samples that were calibrated or trained on. Raises InputError."""
    evaluated = data(recipe, "evaluation").sample_digests()
    for role in ("calibration", "train") if recipe.data.train else ("calibration",):
        shared = len(evaluated & data(recipe, role).sample_digests())
        if shared > MAX_SHARED * len(evaluated):
            raise InputError(
                f"{shared} of {len(evaluated)} evaluation samples are in the {role} data too",
                hint="hold samples back for evaluation: a score on known samples says nothing",
            )


def _claim(out: Path, *, force: bool) -> None:
    """Take a folder for a run: a new one, or one of an earlier run. Raises UsageError."""
    foreign = out.exists() and not (out / MARKER).exists()
    if foreign and not force and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} exists already and is no folder of an earlier run",
            hint="give another output folder, or --force to write into it",
        )
    _files.check_free(out, force=True)
    out.mkdir(parents=True, exist_ok=True)
    _files.write_text(out / MARKER, '{"schema": "deploykit.run/1"}\n')


def _make(run: Run, step: Step) -> None:
    """Make one artifact and score it on the runtimes that it is for."""
    run.observer.step(step.name, step.stage)
    path = run.out / "work" / step.name
    before = store.last_record(path)
    artifact = step.make(run.artifacts, path, run.observer.progress)
    run.artifacts[step.name] = artifact
    cached = bool(artifact.history) and artifact.history[-1] == before
    run.observer.done(describe(artifact), cached=cached)
    for backend in _backends_for(run, artifact):
        _score(run, step.name, backend)


def _backends_for(run: Run, artifact: Artifact) -> list[str]:
    """The backends on which an artifact is scored: the target, and the others asked for."""
    wanted = (run.target, *run.recipe.bench.backends)
    return [b.name for b in backends.available(artifact.format) if b.name in wanted]


def _score(run: Run, name: str, backend: str) -> None:
    """Score an artifact on a backend, unless an earlier run has."""
    artifact, metric = run.artifacts[name], run.recipe.gates.metric
    evaluated = data(run.recipe, "evaluation")
    reference = run.artifacts.get(MODEL) or run.artifacts[FLOAT]
    key = store.digest_of(
        {
            "artifact": artifact.sha256,
            "backend": backend,
            "data": evaluated.digest,
            "metric": evaluation.metric_identity(metric),
            "reference": reference.sha256,
            "machine": read_environment().lasting(),
            "code": store.code_digest(),
        }
    )
    options = SessionOptions(threads=read_environment().cores)

    def make() -> Score:
        outputs: Outputs | None = None
        if metric not in metrics.NEED_TARGET:  # it compares, or may: a user's own
            with backends.open_session(reference, None, options) as session:
                outputs, _ = evaluation.collect(session, evaluated)
        with backends.open_session(artifact, backend, options) as session:
            return evaluation.evaluate(
                session, evaluated, metric, reference=outputs, progress=run.observer.progress
            )

    run.observer.step(name, f"evaluate on {backend}")
    path = run.out / "work" / f"{name}.{backend}.score.json"
    score, cached = store.remember(path, key, Score, make)
    run.scores[name, backend] = score
    run.observer.done(f"{metric} {summary.interval(score.score, 4)}", cached=cached)


def _engine(name: str, backend: str) -> str:
    return f"{name} @ {backend}"


def _leaves(run: Run) -> tuple[Candidate, ...]:
    """What is benched: the float ONNX model first (the baseline), then all other ends."""
    made = [
        Candidate(
            name=_engine(name, backend),
            artifact=run.artifacts[name],
            backend=backend,
            family=name.split(".")[0],  # a student need not agree with its teacher
        )
        for name, backend in run.scores
        if run.artifacts[name].format != "torch" or name == MODEL
    ]
    return tuple(sorted(made, key=lambda c: c.name != _engine(FLOAT, run.target)))


def _bench(run: Run) -> BenchResult:
    """Time all leaves in one interleaved run, unless an earlier run has."""
    candidates = _leaves(run)
    evaluated = data(run.recipe, "evaluation")
    options = BenchOptions(**run.recipe.bench.model_dump(exclude={"backends"}))
    key = store.digest_of(
        {
            "candidates": [(c.name, c.artifact.sha256) for c in candidates],
            "options": options.model_dump(mode="json"),
            "data": evaluated.digest,
            "environment": read_environment().lasting(),
            "code": store.code_digest(),
        }
    )

    def make() -> BenchResult:
        return bench(
            candidates,
            options,
            data=evaluated,
            progress=lambda text, done, total: run.observer.progress(done, total, text),
        )

    run.observer.step("bench", f"{len(candidates)} engines")
    result, cached = store.remember(run.out / "bench.json", key, BenchResult, make)
    try:
        floor = statistics.noise_floor(result, _latency_batch(result))
    except InputError:
        _files.remove(run.out / "bench.json")  # else the next run would take it for good
        raise
    run.observer.done(f"noise floor {summary.interval(floor, 3, 'x')}", cached=cached)
    return result


def _latency_batch(result: BenchResult) -> int:
    """The batch size at which latency is judged: the smallest."""
    return min(result.options.batch_sizes)


def _decide(run: Run, result: BenchResult) -> Verdict:
    """Weigh every engine on the target against the float ONNX model."""
    batch, gates = _latency_batch(result), run.recipe.gates
    base = summary.measurement(result, _engine(FLOAT, run.target), batch)
    contenders = [
        Contender(
            name,
            score,
            summary.speedup(base, summary.measurement(result, _engine(name, backend), batch)),
        )
        for (name, backend), score in run.scores.items()
        if backend == run.target and name != FLOAT and run.artifacts[name].format != "torch"
    ]
    floor = statistics.noise_floor(result, batch)
    limits = Limits(gates.max_drop, max(gates.min_speedup, floor.high, 1 / floor.low))
    return decide(run.scores[FLOAT, run.target], tuple(contenders), limits)


def _summarize(run: Run, result: BenchResult, verdict: Verdict) -> RunSummary:
    baselines = (_engine(MODEL, "pytorch"), _engine(FLOAT, run.target))
    rows = [
        Row.of((name, backend), run.artifacts[name], score, result, baselines=baselines)
        for (name, backend), score in run.scores.items()
    ]
    return RunSummary(
        recipe=run.recipe.name,
        metric=run.recipe.gates.metric,
        target=run.target,
        rows=tuple(rows),
        baselines={"vs PyTorch": baselines[0], "vs FP32 ONNX": baselines[1]},
        noise_floor=statistics.noise_floor(result, _latency_batch(result)),
        verdict=verdict,
        environment=result.environment,
        notes=result.notes,
        comparable=result.options.preset != "quick",
    )


def _package(run: Run, name: str, made: RunSummary) -> None:
    """Package the winner, unless the bundle of an earlier run is still the same."""
    artifact, out = run.artifacts[name], run.out / "bundle"
    memory = run.out / "work" / "bundle.json"
    options = _package_options(run, artifact, memory)
    key = store.digest_of(
        {
            "artifact": artifact.sha256,
            "options": options.model_dump(mode="json"),
            "evidence": made.model_dump(mode="json"),
            "code": store.code_digest(),
        }
    )

    def make() -> Bundle:
        return package(
            [PackagedModel(artifact=artifact, backend=run.target)],
            options,
            out=out,
            data=data(run.recipe, "calibration"),
            evidence=made.model_dump(mode="json", by_alias=True),
            force=True,
        )

    run.observer.step("bundle", "package")
    if not _is_whole(out):
        _files.remove(memory)
        _files.remove(out)
    bundle, cached = store.remember(memory, key, Bundle, make)
    run.observer.done(f"{len(bundle.files)} files in {out}", cached=cached)


def _package_options(run: Run, artifact: Artifact, memory: Path) -> PackageOptions:
    """The recipe's, for as many threads as were measured, and never an old version for a new model.

    A version that an earlier run gave to another model is taken up: the next one is used.
    """
    options = run.recipe.package
    if "threads" not in options.model_fields_set:
        options = options.model_copy(update={"threads": run.recipe.bench.threads})
    try:
        last = parse(Bundle, _json.read(memory).get("value"), str(memory))
    except InputError:
        return options
    served = {entry.sha256 for entry in last.files if entry.role == "model"}
    if last.version < options.version or artifact.sha256 in served:
        return options.model_copy(update={"version": max(last.version, options.version)})
    return options.model_copy(update={"version": last.version + 1})


def _is_whole(bundle: Path) -> bool:
    try:
        inventory.check(bundle, manifest.read(bundle))
    except DeploykitError:
        return False
    return True
