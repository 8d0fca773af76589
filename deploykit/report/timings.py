"""Tables in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deploykit.measure import BenchResult, statistics
from deploykit.report.summary import (
    DASH,
    HEADER,
    RunSummary,
    cells,
    interval,
    measurement,
    notes,
    ran_as,
    speedup,
    verdict_text,
)
from deploykit.values import Measurement

if TYPE_CHECKING:
    from rich.console import Console


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


def show(result: BenchResult, console: Console) -> None:
    """Print the measurements of a bench, each against the first."""
    from rich.markup import escape
    from rich.table import Table

    columns = ("engine", "batch", "ran as", "p50 ms", "p90 ms", "p99 ms", "samples/s", "speed-up")
    table = Table(*columns, box=None, pad_edge=False)
    for m in result.measurements:
        if m.invalid:
            reason = escape(f"INVALID: {m.invalid}")
            table.add_row(m.name, str(m.batch_size), reason, *[DASH] * 5)
            continue
        base = measurement(result, result.baseline, m.batch_size)
        table.add_row(
            m.name,
            str(m.batch_size),
            ran_as(m.placement.precisions),
            *(_percentile(m, q) for q in (50, 90, 99)),
            interval(statistics.throughput(m), 0),
            interval(speedup(base, m), 2, "x"),
        )
    console.print(table)
    for line in (*_together(result), _floor(result)):
        console.print(line, markup=False)
    for note in result.notes:
        console.print(f"{note}.")


def _percentile(measured: Measurement, percent: float) -> str:
    """With its interval; where the calls are too few to tell, what it is not below."""
    if found := statistics.percentile_interval_ms(measured, percent):
        return interval(found, 3)
    return f">= {statistics.percentile_bound_ms(measured, percent):.3f}"


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


def _floor(result: BenchResult) -> str:
    batch = result.options.batch_sizes[0]
    pair = [result.of(name, batch) for name in (result.baseline, result.control)]
    broken = next((m for m in pair if m.invalid), None)
    if broken:
        return f"No speed-up and no noise floor: {broken.name} is invalid."
    floor = interval(statistics.noise_floor(result, batch), 3, "x")
    return f"Speed-up over {result.baseline}; 95 % intervals; noise floor {floor}."
