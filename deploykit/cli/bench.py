"""`bench`, and its gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from deploykit import _files, backends
from deploykit.cli import COMMANDS, _common, _options
from deploykit.cli._observer import Terminal, console
from deploykit.dataset import Dataset
from deploykit.environment import read as read_environment
from deploykit.errors import AnswerIsNo, UsageError
from deploykit.evaluation import collect, score
from deploykit.measure import BenchOptions, BenchResult, Candidate, bench, gate, host, read_result
from deploykit.measure.selftest import self_test
from deploykit.report import timings
from deploykit.report.summary import interval
from deploykit.values import Artifact, Score, SessionOptions

F = TypeVar("F", bound=Callable[..., Any])


class Percent(click.ParamType[float]):
    """`3%`, or `0.03`: a share."""

    name = "percent"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """A share, not below 0."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 <= share < float("inf"):
            self.fail(f"{text!r} is no share: write 3% or 0.03", param, ctx)
        return share


class Limits(NamedTuple):
    """What a run must keep, and what it is held against."""

    then: BenchResult | None
    max_regression: float
    metric: str | None
    max_drop: float | None
    anyway: bool
    strict: bool


def _limit_options(command: F) -> F:
    for option in reversed(
        (
            click.option(
                "--baseline",
                type=click.Path(path_type=Path),
                help="What an earlier run kept with -o: each engine is held against itself.",
            ),
            click.option(
                "--max-regression",
                type=Percent(),
                help="How much slower than in --baseline an engine may be; exit 7 where it is "
                "slower by more, significantly, and beyond the noise floor.  [default: 3%]",
            ),
            click.option("--metric", help="Score each engine too; as `deploykit evaluate`."),
            click.option(
                "--max-drop",
                type=Percent(),
                help="How much lower than in --baseline, or than the first engine, a score may be.",
            ),
            click.option(
                "--compare-anyway",
                is_flag=True,
                help="Compare with another machine, other settings or a quick run all the same; "
                "the result says so.",
            ),
            click.option(
                "--strict",
                is_flag=True,
                help="Exit 7 where something disturbs the machine, before the run or during it.",
            ),
        )
    ):
        command = option(command)
    return command


@click.command("bench", help=COMMANDS["bench"][1])
@click.argument("models", nargs=-1)
@click.option(
    "--self-test",
    is_flag=True,
    help="Bench fakes of known behaviour, no model, and show whether the truth is recovered.",
)
@click.option(
    "--backend",
    "names",
    multiple=True,
    help="As `deploykit doctor` names them; by default all but pytorch-compile.",
)
@_common.data_option(
    required=False, text="Inputs to run; the word 'random' makes some up and marks the result."
)
@_options.fields(BenchOptions)
@_limit_options
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Keep all samples as JSON.")
@click.option("--layers", type=click.IntRange(0), default=0, help="Show so many longest kernels.")
@_common.force_option
@_common.factory_options
@_common.json_option
def bench_command(
    models: tuple[str, ...],
    *,
    names: tuple[str, ...],
    data: str | None,
    output: Path | None,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Time models."""
    if given["self_test"]:
        _self_test(as_json=as_json)
        return
    if not models or data is None:
        raise UsageError(
            "bench needs a model and --data", hint="as in: bench net.onnx --data evaluation.npz"
        )
    options, limits = _options.make(BenchOptions, given), _limits(given)
    opened = None if data == "random" else _common.required_data(data)
    _check_output(output, force=force)
    differing = _differing(limits, options, opened)
    candidates = _candidates(models, names, given, opened)
    with Terminal() as terminal:
        scores = _scores(candidates, limits, opened, terminal)
        terminal.step("bench", f"{len(candidates)} engines")
        result = bench(
            candidates,
            options,
            data=opened,
            progress=lambda text, done, total: terminal.progress(done, total, text),
        )
    result = _judged(result.model_copy(update={"scores": scores}), limits, differing)
    if output:
        _files.write_text(output, result.model_dump_json(by_alias=True) + "\n")
    if as_json:
        _common.show(result, "", as_json=True)
    else:
        timings.show(result, console_for_stdout(), layers=given["layers"])
    _check_valid(result)
    _check_undisturbed(result.disturbances, limits)
    _check_kept(result)


def _self_test(*, as_json: bool) -> None:
    """Raises AnswerIsNo: a truth was not recovered."""
    with Terminal() as terminal:
        terminal.step("bench", "fakes of known behaviour")
        found = self_test(lambda text, done, total: terminal.progress(done, total, text))
    if as_json:
        _common.show(found, "", as_json=True)
    else:
        timings.show_self_test(found, console_for_stdout())
    wrong = [check for check in found.checks if not check.passed]
    if wrong:
        noise = f" ({'; '.join(found.disturbances)})" if found.disturbances else ""
        raise AnswerIsNo(
            f"{wrong[0].behaviour}: the truth is {wrong[0].truth}, the bench says {wrong[0].found}",
            hint=f"repeat it on a quiet machine{noise}; what fails there too is a bug to report",
        )


def _check_output(output: Path | None, *, force: bool) -> None:
    if not output:
        return
    if output.suffix != ".json":
        raise UsageError(f"-o {output}: the samples are JSON", hint="name it *.json")
    _files.check_free(output, force=force)


def _limits(given: dict[str, Any]) -> Limits:
    """Raises UsageError: an option without the one that it needs."""
    for name, needed in (
        ("max_regression", "baseline"),
        ("compare_anyway", "baseline"),
        ("max_drop", "metric"),
    ):
        if given[name] and not given[needed]:
            raise UsageError(
                f"--{name.replace('_', '-')} needs --{needed}", hint=f"give --{needed} too"
            )
    regression = given["max_regression"]
    return Limits(
        then=read_result(given["baseline"]) if given["baseline"] else None,
        max_regression=0.03 if regression is None else regression,
        metric=given["metric"],
        max_drop=given["max_drop"],
        anyway=given["compare_anyway"],
        strict=given["strict"],
    )


def _differing(limits: Limits, options: BenchOptions, data: Dataset | None) -> list[str]:
    """What differs from the earlier run; before a minute of work, not after.

    Raises UsageError: something does, and nobody said to compare anyway. AnswerIsNo: strict, and
    the machine is disturbed already.
    """
    machine = read_environment()
    _check_undisturbed(host.notes(machine, None, None), limits)
    if not limits.then:
        return []
    found = gate.differences(limits.then, machine, options, data.digest if data else None)
    if found and not limits.anyway:
        raise UsageError(
            f"the earlier run is no comparison: {'; '.join(found)}",
            hint="measure it again here, or add --compare-anyway: the result then says so",
        )
    return found


def _scores(
    candidates: Sequence[Candidate], limits: Limits, data: Dataset | None, terminal: Terminal
) -> dict[str, Score]:
    """The score of each engine; the first is the reference of metrics that compare.

    Raises UsageError: no data, or a score from which no drop can be allowed.
    """
    metric = limits.metric
    if metric is None:
        return {}
    if data is None:
        raise UsageError("--metric needs real data", hint="give --data with labels")
    options = SessionOptions(threads=read_environment().cores)
    found, reference = {}, None
    for candidate in candidates:
        terminal.step(candidate.name, "evaluate")
        with backends.open_session(candidate.artifact, candidate.backend, options) as session:
            outputs, targets = collect(session, data, progress=terminal.progress)
        reference = outputs if reference is None else reference
        made = score(outputs, targets, metric, reference=reference)
        if limits.max_drop is not None and not isfinite(made.score.value):
            raise UsageError(
                f"{metric} of {candidate.name} is {made.score.value}: no drop from it can be "
                "allowed",
                hint="take another metric, such as cosine or agreement",
            )
        found[candidate.name] = made
    return found


def _judged(result: BenchResult, limits: Limits, differing: list[str]) -> BenchResult:
    """The result with what the gate found."""
    found: dict[str, Any] = {}
    if limits.then and not any(m.invalid for m in result.measurements):
        found["slowdowns"] = gate.slowdowns(result, limits.then, limits.max_regression)
    if limits.max_drop is not None:
        found["drops"] = gate.drops(result, limits.then, limits.max_drop)
    told = tuple(f"compared with an earlier run all the same, though {each}" for each in differing)
    return result.model_copy(update={**found, "notes": (*told, *result.notes)})


def _check_kept(result: BenchResult) -> None:
    """Raises AnswerIsNo: an engine is slower, or scores lower, than it may."""
    slower = [s for s in result.slowdowns if s.regressed]
    if slower:
        worst = max(slower, key=lambda each: each.slowdown.value)
        raise AnswerIsNo(
            f"{worst.name} at batch {worst.batch_size} takes "
            f"{interval(worst.slowdown, 3, 'x')} the time of the earlier run "
            f"(allowed {1 + worst.limit:.3f}x, noise floor {worst.floor:.3f}x)",
            hint=f"{len(slower)} of {len(result.slowdowns)} measurements are slower",
        )
    lower = [d for d in result.drops if d.regressed]
    if lower:
        lost = max(lower, key=lambda each: each.drop.value)
        raise AnswerIsNo(
            f"{lost.name} loses {interval(lost.drop, 4)} of {lost.metric} against "
            f"{lost.reference} (allowed {lost.limit:g})",
            hint=f"{len(lower)} of {len(result.drops)} engines lose more than allowed",
        )


def _check_undisturbed(disturbances: Sequence[str], limits: Limits) -> None:
    """Raises AnswerIsNo: strict, and something disturbs."""
    if limits.strict and disturbances:
        raise AnswerIsNo(
            f"the machine is disturbed: {'; '.join(disturbances)}",
            hint="remove the cause, or leave --strict out to have it as a note",
        )


def _check_valid(result: BenchResult) -> None:
    """Raises AnswerIsNo: a measurement must not be used, or an objective holds at no rate."""
    broken = [m for m in result.measurements if m.invalid]
    if not broken:
        _check_scenarios(result)
        return
    hint = f"{len(broken)} of {len(result.measurements)} measurements must not be used"
    if result.inputs == "random" and "cosine" in str(broken[0].invalid):
        hint += "; random inputs lie where a quantized model was not calibrated: give real --data"
    raise AnswerIsNo(
        f"{broken[0].name} at batch {broken[0].batch_size} is invalid: {broken[0].invalid}",
        hint=hint,
    )


def _check_scenarios(result: BenchResult) -> None:
    for run in result.scenarios:
        if not run.valid:
            why = run.invalid or run.reason
            raise AnswerIsNo(
                f"the {run.scenario} scenario of {run.name} is invalid: {why}",
                hint="what it printed must not be used",
            )
    for search in result.slos:
        if search.rate is None:
            raise AnswerIsNo(
                f"{search.name} holds {search.slo} at no rate"
                + (f": {search.invalid}" if search.invalid else ""),
                hint="allow a longer latency, or take a faster engine",
            )


def console_for_stdout() -> Any:
    """A console for results; the shared one is for talk."""
    from rich.console import Console

    return Console(highlight=False, width=None if console.is_terminal else 200)


def _candidates(
    models: tuple[str, ...], names: tuple[str, ...], given: dict[str, Any], data: Dataset | None
) -> list[Candidate]:
    """Each model on each backend that was asked for and takes it; by default on all that can."""
    for name in names:
        backends.check_available(name)
    made = []
    for reference in models:
        artifact = _common.model(reference, given, data)
        short = Path(reference).name
        made += [
            Candidate(name=f"{short} @ {name}", artifact=artifact, backend=name)
            for name in _fitting(artifact, names)
        ]
    return made


def _fitting(artifact: Artifact, names: tuple[str, ...]) -> list[str]:
    if not names:
        return backends.fitting(artifact)
    fitting = [name for name in names if artifact.format in backends.backend(name).formats]
    if not fitting:
        raise UsageError(
            f"none of {', '.join(names)} runs {artifact.format} models ({artifact.path})",
            hint="leave --backend out to take what fits",
        )
    return fitting
