"""What each node of a quantized model does to the outputs: a table and a plot."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit import _files
from deploykit.errors import UsageError
from deploykit.report.summary import DASH
from deploykit.values import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
LISTED, DRAWN = 8, 40
"""Nodes in the table and in the plot, the worst first."""
LONGEST = 64
"""Letters of a node's name in the plot."""
BLUE, GREY, ORANGE = "#2563c9", "#9a9a9a", "#d9730d"


def table(damage: Sequence[Json], probe: Json) -> list[str]:
    """The worst nodes, one a line; no line for a model without the data."""
    if not damage:
        return []
    whole = f" ({probe['sqnr_db']:.1f} with all)" if probe else ""
    return [
        "what each node costs, worst first: signal to noise of the outputs in dB with it alone",
        f"quantized, their cosine, dB with all but it quantized{whole},",
        "its time in the runtime's profile of the float and of the quantized model, one thread:",
        "   alone   cosine  without  float us quantized us",
        *(_line(row) for row in damage[:LISTED]),
    ]


def _line(row: Json) -> str:
    numbers = (
        _number(row["sqnr_db"], 8, 1),
        _number(row.get("cosine"), 9, 5),
        _number(row.get("sqnr_db_if_float"), 9, 1),
        _number(row.get("float_us"), 10, 1),
        _number(row.get("quantized_us"), 13, 1),
    )
    return f"{''.join(numbers)}  {row['operator']} {row['node']}"


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{DASH:>{width}}" if value is None else f"{value:{width}.{digits}f}"


def gain(kept: Json) -> str:
    """What leaving nodes in float would give, in one sentence."""
    pattern, nodes = ", ".join(kept["patterns"]), kept["nodes"]
    if not nodes:
        return f"{pattern}: in float already"
    best = kept["sqnr_db_if_float"]
    much = DASH if best is None else f"{best:.1f} dB"
    what = "measured" if kept["measured"] else "with the best of them alone; together not measured"
    total = kept["multiply_accumulates_quantized"]
    share = f" ({kept['multiply_accumulates'] / total:.1%} of the quantized ones)" if total else ""
    time = ""
    if kept["extra_us"] is not None:
        way = "slower" if kept["extra_us"] > 0 else "faster"
        time = f", about {abs(kept['extra_us']):.0f} us {way} of {kept['quantized_us']:.0f}"
    return (
        f"{pattern}: {len(nodes)} node{'s' if len(nodes) > 1 else ''} in float, "
        f"{kept['sqnr_db']:.1f} -> {much} ({what}), "
        f"{kept['multiply_accumulates']:,} multiply-accumulates back in float{share}{time}"
    )


def check_suffix(out: Path) -> None:
    """Raises UsageError: a plot is not written in the format of this suffix."""
    if out.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{out}: a plot is no {out.suffix or 'file without suffix'}",
            hint=f"give a name that ends in {' or '.join(SUFFIXES)}",
        )


def plot(facts: Json, title: str, out: Path) -> None:
    """Draw the facts of a quantized model that has them, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    search, in_float = facts["search"], {node["node"] for node in facts["float_nodes"]}
    rows = list(reversed(search["damage"][:DRAWN]))  # the first is drawn lowest
    timed = any(row["float_us"] is not None or row["quantized_us"] is not None for row in rows)
    names = [_name(row) for row in rows]
    width = (9.5 if timed else 6.5) + 0.065 * max(map(len, names))
    figure = Figure(figsize=(width, 2.1 + 0.27 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        1, 1 + timed, sharey=True, squeeze=False, width_ratios=[3, 2][: 1 + timed]
    )
    noise, *time = axes[0]
    noise.set_yticks(range(len(rows)), names, fontsize=8, parse_math=False)
    noise.set_ylim(-0.6, len(rows) - 0.4)
    _draw_noise(noise, rows, search["probe"]["sqnr_db"], in_float)
    for place in time:
        _draw_time(place, rows)
    drawn, known = len(rows), len(search["damage"])
    others = len(in_float - {row["node"] for row in search["damage"]})
    told = [f"the {drawn} worst of {known} nodes"] if drawn < known else []
    told += [f"{others} nodes in float are not drawn"] if others else []
    figure.suptitle(
        f"{title}: what each quantized node costs, on {search['runtime']}\n{'; '.join(told)}",
        parse_math=False,
    )
    _files.check_file(out)
    with _files.staged(out) as temporary:
        figure.savefig(temporary, format=out.suffix[1:].lower(), dpi=130)


def _draw_noise(axes: Axes, rows: Sequence[Json], whole: float, in_float: Collection[str]) -> None:
    """Bars: the node alone; diamonds: all but the node; line: the whole model."""
    for kept, color, label in (
        (False, BLUE, "this node alone quantized"),
        (True, GREY, "the same, for a node that was left in float"),
    ):
        here = [n for n, row in enumerate(rows) if (row["node"] in in_float) == kept]
        if here:
            axes.barh(here, [rows[n]["sqnr_db"] for n in here], 0.62, color=color, label=label)
    axes.axvline(whole, color="black", lw=1.2, label=f"the quantized model: {whole:.1f} dB")
    _dots(axes, rows, lambda row: row["sqnr_db_if_float"])
    axes.set_xlabel("signal to noise of the outputs, dB (less is worse)")
    _finish(axes)


def _dots(axes: Axes, rows: Sequence[Json], value: Callable[[Json], float | None]) -> None:
    known = [(x, n) for n, row in enumerate(rows) if (x := value(row)) is not None]
    if known:
        axes.plot(
            *zip(*known, strict=True), "D", ms=4.5, color=ORANGE, mec="white", mew=0.6,
            label="all but this node quantized",
        )  # fmt: skip


def _draw_time(axes: Axes, rows: Sequence[Json]) -> None:
    """Two bars a node; none where the runtime tells no time for it."""
    for key, shift, color, label in (
        ("float_us", 0.18, GREY, "in the float model"),
        ("quantized_us", -0.18, BLUE, "in the quantized model"),
    ):
        times = [row[key] or 0.0 for row in rows]
        axes.barh([n + shift for n in range(len(rows))], times, 0.34, color=color, label=label)
    axes.set_xlabel("time of the node, us (runtime's profile, one thread)")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, frameon=False, borderpad=0.2
    )


def _name(row: Json) -> str:
    """Operator and name; of a long one the two ends, where names differ."""
    name = str(row["node"])
    if len(name) > LONGEST:
        half = LONGEST // 2
        name = f"{name[: half - 3]}...{name[-half:]}"
    return f"{row['operator']}  {name}"
