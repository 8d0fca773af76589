"""Tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deploykit.measure import BenchResult
from deploykit.measure.selftest import SelfTest
from deploykit.report import bench_text
from deploykit.report.summary import HEADER, RunSummary, cells, notes, verdict_text

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
    from rich.markup import escape

    rows = bench_text.times(result)
    if console.width < WIDE:
        rows = [tuple(_two_lines(cell) for cell in row) for row in rows]
    else:
        rows = [tuple(map(escape, row)) for row in rows]
    tables = [_table(bench_text.TIMES, rows), _table(*bench_text.apart(result))]
    for m in bench_text.profiled(result) if layers else []:
        told = [tuple(map(escape, row)) for row in bench_text.kernels(m, layers)]
        tables.append(_table(bench_text.KERNELS, told, title=escape(m.name)))
    for table in tables:
        console.print(table)
        console.print()
    for line in bench_text.sentences(result):
        console.print(line, markup=False)
    for note in result.notes:
        console.print(f"{note}.", markup=False)


WIDE = 180
"""Columns from which an interval fits beside its value."""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def show_self_test(found: SelfTest, console: Console) -> None:
    """Print what is true of each fake, and what the bench said of it."""
    from rich.markup import escape

    rows = [
        (c.behaviour, c.truth, escape(c.found), "recovered" if c.passed else "WRONG")
        for c in found.checks
    ]
    console.print(_table(("fake", "truth", "the bench says", ""), rows))
    for note in found.disturbances:
        console.print(f"{note}.", markup=False)
