"""What a bench must keep: limits, what they are held against, and the answers that are no."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from deploykit.dataset import Dataset
from deploykit.environment import read as read_environment
from deploykit.errors import AnswerIsNo, UsageError
from deploykit.measure import BenchOptions, BenchResult, gate, host, read_result
from deploykit.report.summary import interval

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


def limit_options(command: F) -> F:
    """Add the options of Limits to a command."""
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


def limits_of(given: dict[str, Any]) -> Limits:
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


def differing(limits: Limits, options: BenchOptions, data: Dataset | None) -> list[str]:
    """What differs from the earlier run; before a minute of work, not after.

    Raises UsageError: something does, and nobody said to compare anyway. AnswerIsNo: strict, and
    the machine is disturbed already.
    """
    machine = read_environment()
    check_undisturbed(host.notes(machine, None, None), limits)
    if not limits.then:
        return []
    found = gate.differences(limits.then, machine, options, data.digest if data else None)
    if found and not limits.anyway:
        raise UsageError(
            f"the earlier run is no comparison: {'; '.join(found)}",
            hint="measure it again here, or add --compare-anyway: the result then says so",
        )
    return found


def ungated(limits: Limits, names: Sequence[str], options: BenchOptions) -> list[str]:
    """A sentence for each engine that the earlier run cannot judge.

    Raises UsageError: it can judge none.
    """
    if not limits.then:
        return []
    missing = gate.unknown(limits.then, names, options.batch_sizes)
    return [f"{each} is not in it" for each in missing]


def judged(result: BenchResult, limits: Limits, unlike: list[str]) -> BenchResult:
    """The result with what the gate found."""
    found: dict[str, Any] = {}
    if limits.then and not any(m.invalid for m in result.measurements):
        found["slowdowns"] = gate.slowdowns(result, limits.then, limits.max_regression)
    if limits.max_drop is not None:
        found["drops"] = gate.drops(result, limits.then, limits.max_drop)
    told = tuple(f"compared with an earlier run all the same, though {each}" for each in unlike)
    return result.model_copy(update={**found, "notes": (*told, *result.notes)})


def check_valid(result: BenchResult) -> None:
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
    for each in result.instances:
        if each.invalid:
            raise AnswerIsNo(
                f"{len(each.blocks_ns)} instances of {each.name} at once are invalid: "
                f"{each.invalid}",
                hint="their throughput is not known",
            )
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


def check_undisturbed(disturbances: Sequence[str], limits: Limits) -> None:
    """Raises AnswerIsNo: strict, and something disturbs."""
    if limits.strict and disturbances:
        raise AnswerIsNo(
            f"the machine is disturbed: {'; '.join(disturbances)}",
            hint="remove the cause, or leave --strict out to have it as a note",
        )


def check_kept(result: BenchResult) -> None:
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
