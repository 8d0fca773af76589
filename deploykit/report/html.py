"""One self-contained HTML page: verdict, Pareto plot, table, environment."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

from deploykit.environment import Environment
from deploykit.values import Interval


class Point(NamedTuple):
    """One engine in the plot; `name` is its row in the table."""

    name: str
    latency_ms: Interval
    score: Interval
    shipped: bool


class Page(NamedTuple):
    """What a page shows."""

    title: str
    verdict: str
    good: bool
    notes: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    points: Sequence[Point]
    metric: str
    environment: Environment


def render(page: Page) -> str:
    """The page as text; it loads nothing from anywhere."""
    import jinja2

    template = jinja2.Environment(
        loader=jinja2.PackageLoader("deploykit", "report"), autoescape=True
    ).get_template("page.html.j2")
    plots = [_plot(page.points, page.metric, dark=dark) for dark in (False, True)]
    facts = page.environment.model_dump(exclude={"libraries"})
    libraries = page.environment.libraries
    return template.render(page._asdict(), plots=plots, facts=facts, libraries=libraries)


DARK, LIGHT = ("#e6e6e6", "#5ecf8a", "#7fb2ff"), ("#222222", "#14803c", "#2563c9")
"""Colours of text, of the engine to ship, and of the others."""


def _plain(value: float, position: int | None = None) -> str:
    """A tick as people write it: 0.4, not 4 x 10^-1."""
    del position
    return f"{value:g}"


def _plot(points: Sequence[Point], metric: str, *, dark: bool) -> str:
    """Score against median latency with both intervals, as SVG text."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    ink, accent, plain = DARK if dark else LIGHT
    figure = Figure(figsize=(7.5, 4.2), facecolor="none")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot(facecolor="none")
    for point in points:
        x, y = point.latency_ms, point.score
        axes.errorbar(
            x.value,
            y.value,
            xerr=[[max(0, x.value - x.low)], [max(0, x.high - x.value)]],
            yerr=[[max(0, y.value - y.low)], [max(0, y.high - y.value)]],
            fmt="D" if point.shipped else "o",
            color=accent if point.shipped else plain,
            capsize=2,
            elinewidth=0.8,
        )
        axes.annotate(
            point.name, (x.value, y.value), xytext=(5, 5), textcoords="offset points",
            fontsize=9, color=ink,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_formatter(FuncFormatter(_plain))
    axes.set_xlabel("median latency, ms (log)", color=ink)
    axes.set_ylabel(metric, color=ink)
    axes.tick_params(colors=ink, which="both")
    for spine in axes.spines.values():
        spine.set_color(ink)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
