"""The summary of a run: one row an engine, with an interval for each number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field

from deploykit import _files, _json, metrics
from deploykit.environment import Environment
from deploykit.measure import BenchResult, statistics
from deploykit.report import html
from deploykit.report.steps import step_by_step
from deploykit.values import Artifact, Gate, Interval, Measurement, Score, Value, Verdict


class Row(Value):
    """One model on one backend; a number that was not measured is None."""

    name: str
    backend: str
    precision: str
    """Of the file; `ran` says what the runtime made of it."""
    ran: dict[str, int] | None
    size_bytes: int
    score: Interval
    samples: int
    batch_size: int | None = None
    threads: int | None = None
    p50_ms: Interval | None = None
    p90_ms: Interval | None = None
    p99_ms: Interval | None = None
    throughput_per_second: Interval | None = None
    throughput_batch_size: int | None = None
    over_pytorch: Interval | None = None
    over_fp32_onnx: Interval | None = None
    invalid: str | None = None

    @classmethod
    def of(
        cls,
        engine: tuple[str, str],
        artifact: Artifact,
        score: Score,
        result: BenchResult,
        *,
        baselines: tuple[str, str],
    ) -> Row:
        """The row of an engine, named by model and backend.

        `baselines` name the PyTorch and the FP32 ONNX measurement.
        """
        name, backend = engine
        sizes = sorted({m.batch_size for m in result.measurements})
        small, large = sizes[0], sizes[-1]
        measured = measurement(result, f"{name} @ {backend}", small)
        plain = cls(
            name=name,
            backend=backend,
            precision=artifact.precision,
            ran=measured.placement.precisions if measured and not measured.invalid else None,
            size_bytes=sum(map(_files.size_bytes, artifact.files)),
            score=score.score,
            samples=score.samples,
        )
        if measured is None or measured.invalid:
            return plain.model_copy(update={"invalid": measured.invalid if measured else None})
        pytorch, onnx = (measurement(result, b, small) for b in baselines)
        many = measurement(result, f"{name} @ {backend}", large)
        percentiles = statistics.percentile_intervals_ms(measured, (50, 90, 99))
        return plain.model_copy(
            update={
                "batch_size": small,
                "threads": measured.options.threads,
                **dict(zip(("p50_ms", "p90_ms", "p99_ms"), percentiles, strict=True)),
                "throughput_per_second": statistics.throughput(many) if many else None,
                "throughput_batch_size": large if many else None,
                "over_pytorch": speedup(pytorch, measured),
                "over_fp32_onnx": speedup(onnx, measured),
            }
        )


class RunSummary(Value):
    """What a run found."""

    schema_: Literal["deploykit.run-summary/1"] = Field(
        default="deploykit.run-summary/1", alias="schema"
    )
    recipe: str
    metric: str
    target: str
    rows: tuple[Row, ...]
    baselines: dict[str, str] = {}
    """The engines that the speed-ups are over, by what the table calls them."""
    noise_floor: Interval
    """Speed-up of the baseline over itself in another process: less than this is noise."""
    verdict: Verdict
    environment: Environment
    notes: tuple[str, ...] = ()
    """What disturbed the measurement, one sentence each."""
    comparable: bool
    """Whether the times may be compared with another run's; a quick preset's may not."""

    model_config = ConfigDict(populate_by_name=True)


def measurement(result: BenchResult, name: str, batch_size: int) -> Measurement | None:
    """The measurement of this engine at this batch size, if there is one."""
    found = (m for m in result.measurements if m.name == name and m.batch_size == batch_size)
    return next(found, None)


def speedup(baseline: Measurement | None, candidate: Measurement | None) -> Interval | None:
    """Paired speed-up; None where one of the two was not measured or is invalid."""
    if baseline is None or candidate is None or baseline.invalid or candidate.invalid:
        return None
    return statistics.speedup(baseline, candidate)


DASH = "-"
"""For a number that was not measured."""

HEADER = (
    "model", "runs on", "nodes ran as", "score", "size", "p50 ms", "p90 ms", "p99 ms", "samples/s",
    "vs PyTorch", "vs FP32 ONNX",
)  # fmt: skip


def cells(row: Row, *, bounds: bool = True) -> tuple[str, ...]:
    """A row as text, in the order of HEADER."""
    times = [interval(t, 3, bounds=bounds) for t in (row.p50_ms, row.p90_ms, row.p99_ms)]
    gains = [interval(g, 2, "x", bounds=bounds) for g in (row.over_pytorch, row.over_fp32_onnx)]
    return (
        row.name,
        row.backend,
        ran_as(row.ran),
        interval(row.score, 4, bounds=bounds),
        size(row.size_bytes),
        *times,
        interval(row.throughput_per_second, 0, bounds=bounds),
        *gains,
    )


def interval(value: Interval | None, digits: int, unit: str = "", *, bounds: bool = True) -> str:
    """`0.321 [0.318, 0.325]`; a dash for what was not measured."""
    if value is None:
        return DASH
    text = f"{value.value:.{digits}f}{unit}"
    if not bounds or value.low != value.low:
        return text
    return f"{text} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def ran_as(precisions: dict[str, int] | None) -> str:
    """`int8 26, fp32 3`: nodes by the precision in which the runtime ran them."""
    return ", ".join(f"{name} {n}" for name, n in precisions.items()) if precisions else DASH


def size(number: int) -> str:
    """A size in B, kB, MB or GB."""
    if number < 1000:
        return f"{number} B"
    if number < 1e6:
        return f"{number / 1e3:.0f} kB"
    return f"{number / 1e6:.1f} MB" if number < 1e9 else f"{number / 1e9:.2f} GB"


def _ships(row: Row, summary: RunSummary) -> bool:
    return row.name == summary.verdict.ship and row.backend == summary.target


def markdown(summary: RunSummary) -> str:
    """The summary as a Markdown document."""
    lines = [f"# {summary.recipe}", "", verdict_text(summary), "", notes(summary), ""]
    lines.append("| " + " | ".join(HEADER) + " |")
    lines.append("|" + "---|" * len(HEADER))
    lines += ["| " + " | ".join(cells(row)) + " |" for row in summary.rows]
    invalid = [f"- {r.name} @ {r.backend}: {r.invalid}" for r in summary.rows if r.invalid]
    if invalid:
        lines += ["", "Not measured:", "", *invalid]
    return "\n".join(lines) + "\n"


def verdict_text(summary: RunSummary) -> str:
    """The verdict, in one sentence."""
    verdict = summary.verdict
    if verdict.ship is None:
        return f"Not worth it: {verdict.reason}."
    drop, gain = (g for g in verdict.gates if g.engine == verdict.ship)
    samples = next((row.samples for row in summary.rows if row.name == verdict.ship), 0)
    return (
        f"Ship {verdict.ship} on {summary.target}, the recipe's target: "
        f"{summary.metric} drop {interval(drop.value, 4)} (allowed {drop.limit:.4f}), "
        f"{interval(gain.value, 2, 'x')} as fast as FP32 ONNX there "
        f"(needed above {gain.limit:.2f}x: the larger of the recipe's limit and the noise floor)."
        f"{_unsettled(drop, samples)}{step_by_step(summary)}{_elsewhere(summary)}"
    )


def _unsettled(drop: Gate, samples: int) -> str:
    """What it would take to be sure, where the interval of the drop reaches over the limit."""
    needed = metrics.samples_to_settle(drop.value, drop.limit, samples)
    if needed == samples:
        return ""
    if needed == math.inf:
        return " The drop is at its limit: these samples cannot settle it."
    return (
        f" The gate holds on these {samples} samples; its interval reaches over the limit, about "
        f"{needed:.1g} samples would settle it."
    )


def _elsewhere(summary: RunSummary) -> str:
    """Another runtime on which the shipped model is clearly faster than on the target."""
    rows = [row for row in summary.rows if row.name == summary.verdict.ship and row.p50_ms]
    here = next((row for row in rows if row.backend == summary.target), None)
    if here is None or here.p50_ms is None:
        return ""
    told = [
        f" On {row.backend} it takes {row.p50_ms.value / here.p50_ms.value:.2f} of that time."
        for row in rows
        if row.p50_ms and row.p50_ms.high < here.p50_ms.low
    ]
    return "".join(told)


def notes(summary: RunSummary) -> str:
    """How to read the numbers."""
    quick = "" if summary.comparable else " Quick preset: do not compare with another run."
    sample = next((row for row in summary.rows if row.batch_size), None)
    sizes = (
        f"Latency at batch {sample.batch_size} on {sample.threads} "
        f"thread{'s' if sample.threads != 1 else ''}, "
        f"samples/s at batch {sample.throughput_batch_size}. "
        if sample
        else ""
    )
    return (
        f"{sizes}{_baselines(summary)}Brackets are 95 % intervals. "
        f"Noise floor (the baseline against itself): {interval(summary.noise_floor, 3, 'x')}; "
        f"a gain inside it is none.{quick}"
        + "".join(f" {note}." for note in summary.notes if not note.startswith("quick"))
    )


def _baselines(summary: RunSummary) -> str:
    """What each speed-up is over, with its time."""
    times = {f"{r.name} @ {r.backend}": r.p50_ms for r in summary.rows if r.p50_ms}
    return "".join(
        f"{title}: over {name}, {interval(times[name], 3)} ms. "
        for title, name in summary.baselines.items()
        if name in times
    )


def write(summary: RunSummary, result: BenchResult, out: Path) -> None:
    """Write `summary.json`, `summary.md` and `report.html`."""
    _files.write_text(
        out / "summary.json", _json.text(summary.model_dump(mode="json", by_alias=True))
    )
    _files.write_text(out / "summary.md", markdown(summary))
    page = html.Page(
        title=summary.recipe,
        verdict=verdict_text(summary),
        good=summary.verdict.ship is not None,
        notes=notes(summary),
        header=HEADER,
        rows=[cells(row) for row in summary.rows],
        points=[
            html.Point(str(number), row.p50_ms, row.score, _ships(row, summary))
            for number, row in enumerate(summary.rows, 1)
            if row.p50_ms
        ],
        metric=summary.metric,
        environment=result.environment,
    )
    _files.write_text(out / "report.html", html.render(page))
