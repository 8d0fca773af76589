"""A bench as one HTML page that loads nothing: plots, tables, environment, validity."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from deploykit.measure import BenchResult, statistics
from deploykit.report import bench_text
from deploykit.values import Interval, Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"
"""Stands for the page's own colour of text in a plot, which follows light and dark."""
COLOURS = ("#2f7de1", "#e07b00", "#1f9e5a", "#d6455d", "#9467bd", "#8c6d4f", "#d965b0", "#7f8c8d")
"""Readable on white and on black."""
LAYERS = 12
ECDF_POINTS = 400


def render(result: BenchResult) -> str:
    """The page as text."""
    import jinja2

    template = jinja2.Environment(
        loader=jinja2.PackageLoader("deploykit", "report"), autoescape=True
    ).get_template("bench.html.j2")
    valid = [m for m in result.measurements if not m.invalid]
    return template.render(
        invalid=[m for m in result.measurements if m.invalid],
        failed=bench_text.failed(result),
        quick=result.options.preset == "quick",
        notes=result.notes,
        sentences=bench_text.sentences(result),
        plots=_plots(result, valid),
        tables=[(bench_text.TIMES, bench_text.times(result)), bench_text.apart(result)],
        layers=[(m.name, _bars(m)) for m in bench_text.profiled(result)],
        facts={**result.environment.model_dump(exclude={"libraries"}), **_run_facts(result)},
        libraries=result.environment.libraries,
        options=result.options.model_dump(mode="json"),
    )


def _run_facts(result: BenchResult) -> dict[str, object]:
    return {
        "load average after": result.load_average_after,
        "share of CPU time taken by others": result.others_share,
        "share of CPU time stolen": result.steal_share,
        "inputs": result.inputs,
    }


def _plots(result: BenchResult, valid: Sequence[Measurement]) -> list[tuple[str, str, str]]:
    """Title, explanation and SVG of each plot that there is something for."""
    if not valid:
        return []
    first = [m for m in valid if m.batch_size == result.batch_sizes[0]]
    found = []
    if result.scores and first:
        text = "Bars are 95 % intervals; up and left is better."
        svg = _plot(lambda axes: _draw_scores(axes, first, result))
        found.append(("Score against latency", text, svg))
    if first:
        text = (
            "The share of calls that took no longer, every call counted; the steps are the calls."
        )
        svg = _plot(lambda axes: _draw_distributions(axes, first))
        found.append((f"Latency of a call at batch {result.batch_sizes[0]}", text, svg))
    if len(result.batch_sizes) > 1:
        svg = _plot(lambda axes: _draw_throughput(axes, valid, result))
        found.append(("Throughput by batch size", "Bars are 95 % intervals.", svg))
    return found


def _draw_scores(axes: Axes, measured: Sequence[Measurement], result: BenchResult) -> None:
    for m, colour in zip(measured, cycle(COLOURS), strict=False):
        if m.name not in result.scores:
            continue
        score, time = result.scores[m.name].score, statistics.percentile_interval_ms(m, 50)
        if time:
            axes.errorbar(
                time.value, score.value, xerr=_bar(time), yerr=_bar(score), fmt="o", color=colour,
                capsize=2, elinewidth=0.8, label=m.name,
            )  # fmt: skip
    axes.set_xlabel("median latency, ms")
    axes.set_ylabel(next(iter(result.scores.values())).metric)


def _draw_distributions(axes: Axes, measured: Sequence[Measurement]) -> None:
    """Each empirical distribution function, at its quantiles where the calls are many."""
    for m, colour in zip(measured, cycle(COLOURS), strict=False):
        calls = np.sort(np.concatenate([np.array(block) for block in m.blocks_ns])) / 1e6
        share = np.arange(1, len(calls) + 1) / len(calls)
        few = np.unique(np.linspace(0, len(calls) - 1, ECDF_POINTS).astype(int))
        axes.step(calls[few], share[few], where="post", color=colour, label=m.name, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlabel("latency, ms (log)")
    axes.set_ylabel("share of calls")


def _draw_throughput(axes: Axes, measured: Sequence[Measurement], result: BenchResult) -> None:
    names = dict.fromkeys(m.name for m in measured)
    for name, colour in zip(names, cycle(COLOURS), strict=False):
        mine = sorted((m for m in measured if m.name == name), key=lambda m: m.batch_size)
        rates = [statistics.throughput(m) for m in mine]
        bars = np.concatenate([_bar(rate) for rate in rates], axis=1)
        axes.errorbar(
            [m.batch_size for m in mine], [rate.value for rate in rates], yerr=bars, fmt="o-",
            color=colour, capsize=2, elinewidth=0.8, linewidth=1.2, label=name,
        )  # fmt: skip
    axes.set_xticks(sorted(result.batch_sizes))
    axes.set_xlabel("batch size")
    axes.set_ylabel("samples a second")


def _bar(interval: Interval) -> list[list[float]]:
    return [[max(0, interval.value - interval.low)], [max(0, interval.high - interval.value)]]


def _plot(draw: Callable[[Axes], None]) -> str:
    """What `draw` draws, as SVG text in the page's own ink."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(7.5, 4.2), facecolor="none")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot(facecolor="none")
    draw(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
        if axis.get_scale() == "log":
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(colors=INK, which="both", labelsize=8)
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.grid(alpha=0.25)
    legend = axes.legend(
        fontsize=8, labelcolor=INK, framealpha=0, loc="upper center", bbox_to_anchor=(0.5, -0.15)
    )
    legend.set_in_layout(True)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _bars(measured: Measurement) -> list[tuple[float, tuple[str, ...]]]:
    """The longest kernels: length of the bar in percent of the longest, and the words."""
    longest = max((kernel.microseconds for kernel in measured.kernels), default=0) or 1
    rows = bench_text.kernels(measured, LAYERS)
    return [
        (100 * kernel.microseconds / longest, row)
        for kernel, row in zip(measured.kernels, rows, strict=False)
    ]
