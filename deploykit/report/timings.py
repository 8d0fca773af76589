"""Tables in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploykit.measure import BenchResult, Comparison, proof, statistics
from deploykit.measure.result import ScenarioRun
from deploykit.measure.selftest import SelfTest
from deploykit.report.summary import (
    DASH,
    HEADER,
    RunSummary,
    cells,
    interval,
    measurement,
    notes,
    ran_as,
    size,
    speedup,
    verdict_text,
)
from deploykit.values import Interval, Kernel, Measurement

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def show_summary(summary: RunSummary, console: Console) -> None:
    """Print a run's table, its notes and its verdict."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in HEADER:
        table.add_column(name, no_wrap=True)
    for row in summary.rows:
        ships = row.name == summary.verdict.ship and row.backend == summary.target
        table.add_row(*map(_two_lines, cells(row)), style="bold green" if ships else "")
    console.print(table)
    console.print(notes(summary))
    console.print(verdict_text(summary), style="bold")


def _two_lines(cell: str) -> str:
    """The interval under its value, so that the table stays narrow."""
    return cell.replace(" [", "\n\\[").replace(", fp32", "\nfp32")


def show(result: BenchResult, console: Console, *, layers: int = 0) -> None:
    """Print the measurements of a bench: times beside the baseline's, then what is told apart.

    `layers` is how many of each engine's longest kernels are shown.
    """
    console.print(_times(result, narrow=console.width < WIDE))
    console.print()
    console.print(_apart(result))
    console.print()
    if layers:
        _show_layers(result, layers, console)
    for tell in (_invalid, _together, _scenarios, _floors, _overhead, _kept):
        for line in tell(result):
            console.print(line, markup=False)
    for note in result.notes:
        console.print(f"{note}.", markup=False)


FIRST = ("engine", "batch", "ran as", "p50 ms", "p90 ms", "p99 ms", "samples/s")
WIDE = 180
"""Columns from which an interval fits beside its value."""


def _times(result: BenchResult, *, narrow: bool) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in (*FIRST, "speed-up", "claim"):
        table.add_column(name, overflow="fold")
    claims = {size: statistics.compare_all(result, size) for size in result.batch_sizes}
    for m in result.measurements:
        if m.invalid:
            table.add_row(m.name, str(m.batch_size), "INVALID", *[DASH] * 6)
            continue
        base = measurement(result, result.baseline, m.batch_size)
        numbers = (
            *(_percentile(m, q) for q in (50, 90, 99)),
            interval(statistics.throughput(m), 0),
            interval(speedup(base, m), 2, "x"),
        )
        table.add_row(
            m.name,
            str(m.batch_size),
            ran_as(m.placement.precisions),
            *(_two_lines(number) if narrow else escape(number) for number in numbers),
            _claim(m.name, result, claims[m.batch_size].get(m.name)),
        )
    return table


def _claim(name: str, result: BenchResult, found: Comparison | None) -> str:
    """What may be said of the speed-up, with its p-value."""
    if found:
        return f"{found.claim}, {_p(found.p_value)}"
    return {result.baseline: "baseline", result.control: "control"}.get(name, DASH)


def _score(result: BenchResult, name: str) -> Interval | None:
    found = result.scores.get(name)
    return found.score if found else None


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _apart(result: BenchResult) -> Table:
    """Loading, the first run and memory: numbers that are none of the latency's."""
    from rich.table import Table

    columns = ("engine", "batch", "load ms", "first run ms", "peak memory", "processes", "calls")
    metric = {score.metric for score in result.scores.values()}
    table = Table(*columns, *metric, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for m in result.measurements:
        if not m.invalid:
            table.add_row(
                m.name,
                str(m.batch_size),
                f"{m.load_ns / 1e6:.1f}",
                f"{m.first_run_ns / 1e6:.1f}",
                size(m.peak_rss_bytes),
                str(max(1, len(m.process_blocks))),
                str(sum(map(len, m.blocks_ns))),
                *([interval(_score(result, m.name), 4)] if result.scores else []),
            )
    return table


def show_self_test(found: SelfTest, console: Console) -> None:
    """Print what is true of each fake, and what the bench said of it."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("fake", "truth", "the bench says", "", box=None, padding=(0, 2, 0, 0))
    for check in found.checks:
        verdict = "recovered" if check.passed else "WRONG"
        table.add_row(check.behaviour, check.truth, escape(check.found), verdict)
    console.print(table)
    for note in found.disturbances:
        console.print(f"{note}.", markup=False)


def _percentile(measured: Measurement, percent: float) -> str:
    """With its interval; where the calls are too few to tell, what it is not below."""
    if found := statistics.percentile_interval_ms(measured, percent):
        return interval(found, 3)
    return f">= {statistics.percentile_bound_ms(measured, percent):.3f}"


def _invalid(result: BenchResult) -> list[str]:
    return [
        f"INVALID {m.name} (batch {m.batch_size}): {m.invalid}."
        for m in result.measurements
        if m.invalid
    ]


def _show_layers(result: BenchResult, count: int, console: Console) -> None:
    """A table of the longest kernels of each engine, at the first batch size."""
    from rich.markup import escape
    from rich.table import Table

    for m in _profiled(result):
        whole = sum(kernel.microseconds for kernel in m.kernels) or 1
        table = Table("kernel", "us", "share", "ran as", "for", title=escape(m.name), box=None)
        for k in m.kernels[:count]:
            share = f"{k.microseconds / whole:.1%}"
            time = f"{k.microseconds:.1f}"
            table.add_row(k.operator, time, share, k.precision or DASH, escape(_origin(k)))
        console.print(table)
        console.print()


def _origin(kernel: Kernel) -> str:
    """The module and the nodes that a kernel is for, else what the runtime calls it."""
    nodes = ", ".join(kernel.nodes or kernel.names)
    known = [part for part in (kernel.module, nodes) if part]
    return ": ".join(dict.fromkeys(known)) or DASH


def _profiled(result: BenchResult) -> list[Measurement]:
    first = result.batch_sizes[0]
    return [
        m
        for m in result.measurements
        if m.kernels and not m.invalid and m.batch_size == first and m.name != result.control
    ]


def _overhead(result: BenchResult) -> list[str]:
    """Engines that spend much of their time on no operator of the model."""
    lines = []
    for m in _profiled(result):
        alone, moved = (proof.share_of(m.kernels, o) for o in (proof.ALONE, proof.REFORMATTING))
        parts = ((alone, "quantizing and dequantizing alone"), (moved, "reformatting and casting"))
        if told := [f"{share:.0%} on {what}" for share, what in parts if share >= WORTH_TELLING]:
            lines.append(f"{m.name}: spends {' and '.join(told)}.")
    return lines


WORTH_TELLING = 0.05
"""Share of the kernels' time."""


def _kept(result: BenchResult) -> list[str]:
    """What a gate found, a line each."""
    slower = [
        f"{s.name} (batch {s.batch_size}): {interval(s.slowdown, 3, 'x')} the time of the earlier "
        f"run, {_p(s.p_value)}, noise floor {s.floor:.3f}x: "
        f"{'REGRESSION' if s.regressed else 'no regression'} (allowed {1 + s.limit:.3f}x)."
        for s in result.slowdowns
    ]
    return slower + [
        f"{d.name}: {d.metric} {interval(d.drop, 4)} lower than {d.reference}: "
        f"{'LOST TOO MUCH' if d.regressed else 'kept'} (allowed {d.limit:g})."
        for d in result.drops
    ]


def _together(result: BenchResult) -> list[str]:
    """Throughput of instances that ran at the same time, a line each."""
    lines = []
    for each in result.instances:
        told = f"{len(each.blocks_ns)} at once: {each.name} (batch {each.batch_size}): "
        if each.invalid:
            lines.append(f"{told}INVALID: {each.invalid}")
            continue
        rate = interval(statistics.throughput_together(each), 0)
        lines.append(f"{told}{rate} samples/s{', sharing cores' if each.shared else ''}")
    return lines


def _scenarios(result: BenchResult) -> list[str]:
    """What LoadGen says, a line each."""
    lines = [f"{run.scenario} by LoadGen: {run.name}: {_played(run)}." for run in result.scenarios]
    for search in result.slos:
        if search.invalid:
            told = f"INVALID: {search.invalid}"
        elif search.rate is None:
            told = f"no rate holds {search.slo}"
        else:
            told = (
                f"holds {search.slo} up to {search.rate:.4g} samples/s (confirmed for "
                f"{search.runs[-1].seconds:g} s with another seed: {_played(search.runs[-1])})"
            )
        lines.append(f"server by LoadGen: {search.name}: {told}.")
    return [*lines, LOADGEN] if lines else []


LOADGEN = (
    "Latency of scenarios is from the scheduled arrival to the end. These are no MLPerf results."
)


def _played(run: ScenarioRun) -> str:
    if run.invalid:
        return f"INVALID: {run.invalid}"
    told = [f"{run.rate:.4g}/s asked"] if run.rate else []
    if run.samples_per_second:
        told.append(f"{run.samples_per_second:.4g} samples/s")
    told += [f"{p} {time:.3f} ms" for p, time in run.latencies_ms.items()]
    told.append(f"{run.queries} queries")
    return ", ".join(told) + ("" if run.valid else f", LoadGen says INVALID: {run.reason}")


def _floors(result: BenchResult) -> list[str]:
    """What the speed-ups are over, with its time, and what is noise: a line a batch size."""
    lines = []
    for batch in result.batch_sizes:
        pair = [result.of(name, batch) for name in (result.baseline, result.control)]
        if broken := next((m for m in pair if m.invalid), None):
            lines.append(
                f"Batch {batch}: no speed-up and no noise floor: {broken.name} is invalid."
            )
            continue
        floor = interval(statistics.noise_floor(result, batch), 3, "x")
        lines.append(
            f"Batch {batch}: speed-up over {result.baseline}, {_percentile(pair[0], 50)} ms; "
            f"noise floor {floor}."
        )
    return [*lines, HOW_TO_READ]


HOW_TO_READ = (
    "Brackets are 95 % intervals. A claim needs p < 0.05, corrected for the number of engines "
    "(Holm), and more than the noise floor."
)
