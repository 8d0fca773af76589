from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit import environment
from deploykit.measure import BenchOptions, BenchResult, statistics
from deploykit.report import summary
from deploykit.report.summary import HEADER, Row, RunSummary
from deploykit.values import (
    Artifact,
    Gate,
    Interval,
    Measurement,
    Placement,
    Score,
    SessionOptions,
    Verdict,
)

BASELINES = ("model @ pytorch", "model.fp32.onnx @ ort-cpu")
HOSTILE = """<script src="http://evil.example/x.js">alert('1')</script>&"'"""


def about(value: float, by: float = 0.01) -> Interval:
    return Interval(value=value, low=value - by, high=value + by)


def row(**changes: Any) -> Row:
    plain = Row(
        name="model.int8.onnx", backend="ort-cpu", precision="int8", ran={"int8": 26, "fp32": 3},
        size_bytes=345_678, score=about(0.9123, 0.0101), samples=1000, batch_size=1, threads=2,
        p50_ms=about(0.3214, 0.0021), p90_ms=about(0.5), p99_ms=about(0.75),
        throughput_per_second=about(12345.6, 100), throughput_batch_size=8,
        over_pytorch=about(3.5, 0.25), over_fp32_onnx=about(2, 0.125),
    )  # fmt: skip
    return plain.model_copy(update=changes)


def unmeasured(**changes: Any) -> Row:
    return Row(
        name="pruned", backend="pytorch", precision="fp32", ran=None, size_bytes=1_234_567,
        score=about(0.9), samples=1000, **changes,
    )  # fmt: skip


def verdict(*, ship: str | None) -> Verdict:
    gates = [
        Gate(name=name, engine=engine, value=about(value), limit=limit, passed=True)
        for engine, lost, gain in (("other", 0.5, 9), ("model.int8.onnx", 0.002, 2))
        for name, value, limit in (("max_drop", lost, 0.005), ("min_speedup", gain, 1.1))
    ]
    return Verdict(ship=ship, gates=tuple(gates), reason="the nearest is far")


def found(*rows: Row, ship: str | None = "model.int8.onnx", **changes: Any) -> RunSummary:
    plain = RunSummary(
        recipe="shoes", metric="top1", target="ort-cpu", rows=rows or (row(), unmeasured()),
        noise_floor=about(1.001, 0.02), verdict=verdict(ship=ship),
        environment=environment.read(), comparable=True,
    )  # fmt: skip
    return plain.model_copy(update=changes)


def timed(
    name: str, ms: float, *, batch: int = 1, blocks: int = 40, invalid: str | None = None
) -> Measurement:
    """20 calls a block around a known time, of real spread."""
    rng = np.random.default_rng(len(name) + batch)
    times = (rng.normal(1, 0.01, (blocks, 20)) * ms * 1e6).astype(int)
    return Measurement(
        name=name, backend=name.rpartition(" ")[2], batch_size=batch, options=SessionOptions(),
        load_ns=1, first_run_ns=1, warmup_runs=5, blocks_ns=tuple(map(tuple, times.tolist())),
        placement=Placement(provider="p", precisions={"int8": 5}), peak_rss_bytes=1,
        invalid=invalid,
    )  # fmt: skip


def benched(*measurements: Measurement) -> BenchResult:
    sizes = tuple(sorted({m.batch_size for m in measurements})) or (1,)
    return BenchResult(
        baseline=BASELINES[1], control="again", measurements=measurements,
        options=BenchOptions(batch_sizes=sizes), inputs="real", data_digest=None,
        environment=environment.read(), load_average_after=0.1, steal_share=None,
    )  # fmt: skip


def made(folder: Path, result: BenchResult) -> Row:
    """The row of an engine with a file of 1,000 bytes."""
    path = folder / "model.int8.onnx"
    path.write_bytes(bytes(1000))
    artifact = Artifact(
        path=path, format="onnx", precision="int8", inputs=(), outputs=(), sha256="0"
    )
    score = Score(metric="top1", score=about(0.9), samples=77)
    engine = ("model.int8.onnx", "ort-cpu")
    return Row.of(engine, artifact, score, result, baselines=BASELINES)


# --- text of one number


@pytest.mark.parametrize(
    ("value", "digits", "unit", "want"),
    [
        (Interval(value=0.3214, low=0.3184, high=0.3251), 3, "", "0.321 [0.318, 0.325]"),
        (Interval(value=2, low=1.955, high=2.5), 2, "x", "2.00x [1.96, 2.50]"),
        (Interval(value=12345.6, low=12000.2, high=13000), 0, "", "12346 [12000, 13000]"),
        (Interval(value=0, low=0, high=0), 1, "", "0.0 [0.0, 0.0]"),
        (Interval(value=-0.002, low=-0.004, high=0.001), 4, "", "-0.0020 [-0.0040, 0.0010]"),
        (Interval(value=1.5, low=math.nan, high=math.nan), 2, "x", "1.50x"),
        (None, 3, "x", "-"),
    ],
)
def test_a_number_stands_before_its_interval(
    value: Interval | None, digits: int, unit: str, want: str
) -> None:
    assert summary.interval(value, digits, unit) == want
    assert summary.interval(value, digits, unit, bounds=False) == want.split(" [", maxsplit=1)[0]


@pytest.mark.parametrize(
    ("number", "want"),
    [(0, "0 B"), (400, "400 B"), (345_678, "346 kB"), (1_000_000, "1.0 MB"), (94e6, "94.0 MB")],
)
def test_sizes_are_told_in_bytes_kilobytes_and_megabytes(number: int, want: str) -> None:
    assert summary.size(number) == want


# --- the way


def test_what_each_step_took_is_told_of_the_way_of_what_ships() -> None:
    scores = {
        "model": 0.93, "model.fp32.onnx": 0.93, "model.int8.onnx": 0.929, "pruned": 0.4,
        "distilled": 0.928, "distilled.fp32.onnx": 0.928, "distilled.int8.onnx": 0.9285,
    }  # fmt: skip
    rows = [row(name=name, score=about(score)) for name, score in scores.items()]
    text = summary.verdict_text(found(*rows, verdict=shipped("distilled.int8.onnx")))
    assert (
        " Step by step: pruned -0.5300, distilled +0.5280, distilled.fp32.onnx +0.0000, "
        "distilled.int8.onnx +0.0005."
    ) in text
    text = summary.verdict_text(found(*rows, verdict=shipped("model.int8.onnx")))
    assert " Step by step: model.fp32.onnx +0.0000, model.int8.onnx -0.0010." in text


def shipped(name: str) -> Verdict:
    gates = [
        Gate(name=gate, engine=name, value=about(value), limit=1, passed=True)
        for gate, value in (("max_drop", 0.002), ("min_speedup", 2))
    ]
    return Verdict(ship=name, gates=tuple(gates), reason="")


# --- rows


def test_a_row_has_a_cell_for_each_column() -> None:
    assert dict(zip(HEADER, summary.cells(row()), strict=True)) == {
        "model": "model.int8.onnx",
        "runs on": "ort-cpu",
        "nodes ran as": "int8 26, fp32 3",
        "score": "0.9123 [0.9022, 0.9224]",
        "size": "346 kB",
        "p50 ms": "0.321 [0.319, 0.324]",
        "p90 ms": "0.500 [0.490, 0.510]",
        "p99 ms": "0.750 [0.740, 0.760]",
        "samples/s": "12346 [12246, 12446]",
        "vs PyTorch": "3.50x [3.25, 3.75]",
        "vs FP32 ONNX": "2.00x [1.88, 2.12]",
    }
    assert not any("[" in cell for cell in summary.cells(row(), bounds=False))


def test_what_was_not_measured_is_a_dash() -> None:
    cells = dict(zip(HEADER, summary.cells(unmeasured()), strict=True))
    assert {name for name, cell in cells.items() if cell == "-"} == {
        "nodes ran as", "p50 ms", "p90 ms", "p99 ms", "samples/s", "vs PyTorch", "vs FP32 ONNX",
    }  # fmt: skip
    assert (cells["score"], cells["size"]) == ("0.9000 [0.8900, 0.9100]", "1.2 MB")


def test_the_numbers_of_a_row_are_those_of_its_measurements(tmp_path: Path) -> None:
    mine = [timed("model.int8.onnx @ ort-cpu", ms, batch=b) for b, ms in ((1, 1), (8, 4))]
    bases = [timed(BASELINES[0], 3), timed(BASELINES[1], 2), timed(BASELINES[1], 9, batch=8)]
    got = made(tmp_path, benched(*bases, *reversed(mine)))
    assert (got.size_bytes, got.samples, got.precision, got.ran) == (1000, 77, "int8", {"int8": 5})
    assert (got.batch_size, got.throughput_batch_size, got.invalid) == (1, 8, None)
    for percent, cell in ((50, got.p50_ms), (90, got.p90_ms), (99, got.p99_ms)):
        assert cell == statistics.percentile_interval_ms(mine[0], percent)
    assert got.p50_ms is not None
    assert got.p50_ms.value == pytest.approx(1, rel=0.01)
    assert got.throughput_per_second == statistics.throughput(mine[1])
    assert got.over_pytorch == statistics.speedup(bases[0], mine[0])
    assert got.over_fp32_onnx == statistics.speedup(bases[1], mine[0])
    assert got.over_fp32_onnx is not None
    assert got.over_fp32_onnx.value == pytest.approx(2, rel=0.01)


def test_an_engine_beside_no_sound_baseline_has_times_but_no_speed_up(tmp_path: Path) -> None:
    mine, broken = timed("model.int8.onnx @ ort-cpu", 1), timed(BASELINES[1], 2, invalid="crashed")
    got = made(tmp_path, benched(mine, broken))
    assert got.p50_ms is not None
    assert (got.over_pytorch, got.over_fp32_onnx) == (None, None)


def test_too_few_calls_for_a_percentile_leave_it_out(tmp_path: Path) -> None:
    short = timed("model.int8.onnx @ ort-cpu", 1, blocks=15)  # 300 calls; p99 needs 459
    got = made(tmp_path, benched(short))
    assert got.p90_ms is not None
    assert got.p99_ms is None


def test_an_engine_that_was_not_benched_has_only_its_score(tmp_path: Path) -> None:
    got = made(tmp_path, benched(timed(BASELINES[1], 2)))
    assert got == unmeasured().model_copy(
        update={"name": "model.int8.onnx", "backend": "ort-cpu", "precision": "int8",
                "size_bytes": 1000, "samples": 77}
    )  # fmt: skip


def test_invalid_times_are_not_shown_their_reason_is(tmp_path: Path) -> None:
    bad = timed("model.int8.onnx @ ort-cpu", 1, invalid="it crashed")
    got = made(tmp_path, benched(timed(BASELINES[1], 2), bad))
    assert (got.p50_ms, got.over_fp32_onnx, got.ran, got.batch_size) == (None, None, None, None)
    assert got.invalid == "it crashed"


# --- the verdict and the notes


def test_the_verdict_to_ship_tells_both_gates() -> None:
    assert summary.verdict_text(found(row())) == (
        "Ship model.int8.onnx on ort-cpu, the recipe's target: "
        "top1 drop 0.0020 [-0.0080, 0.0120] (allowed 0.0050), "
        "2.00x [1.99, 2.01] as fast as FP32 ONNX there (needed above 1.10x: "
        "the larger of the recipe's limit and the noise floor)."
        " The gate holds on these 1000 samples; its interval reaches over the limit, about 1e+04 "
        "samples would settle it."
    )


def test_the_verdict_tells_where_the_model_is_faster_than_on_the_target() -> None:
    faster = row(backend="openvino", p50_ms=about(0.25, 0.002))
    level = row(backend="another", p50_ms=about(0.3210, 0.002))
    text = summary.verdict_text(found(row(), faster, level))
    assert text.endswith("On openvino it takes 0.78 of that time.")


def test_the_verdict_not_to_ship_tells_why() -> None:
    assert summary.verdict_text(found(ship=None)) == "Not worth it: the nearest is far."


def test_the_notes_tell_batch_sizes_the_noise_and_a_quick_run() -> None:
    standard = summary.notes(found(unmeasured(), row()))
    assert standard.startswith("Latency at batch 1 on 2 threads, samples/s at batch 8. Brackets")
    assert "1.001x [0.981, 1.021]" in standard
    assert "Quick" not in standard
    quick = summary.notes(found(unmeasured(), comparable=False))
    assert quick.startswith("Brackets")
    assert quick.endswith("Quick preset: do not compare with another run.")


# --- Markdown


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_notes_name_what_a_speed_up_is_over_and_its_time() -> None:
    base = row(name="model.fp32.onnx", backend="openvino", p50_ms=about(0.82))
    names = {"vs PyTorch": "model @ pytorch", "vs FP32 ONNX": "model.fp32.onnx @ openvino"}
    told = summary.notes(found(row(), base, baselines=names))
    assert "vs FP32 ONNX: over model.fp32.onnx @ openvino, 0.820 [0.810, 0.830] ms. " in told
    assert "vs PyTorch" not in told  # it has no time


def test_the_markdown_table_has_one_line_a_row() -> None:
    rows = (row(), unmeasured(), row(backend="openvino"))
    text = summary.markdown(found(*rows))
    header, rule, *body = table(text)
    assert header == list(HEADER)
    assert set(rule) == {"---"}
    assert body == [list(summary.cells(r)) for r in rows]
    assert text.startswith("# shoes\n\nShip model.int8.onnx")
    assert "Not measured" not in text


def test_invalid_engines_are_listed_below_the_table() -> None:
    text = summary.markdown(found(row(), unmeasured(invalid="it crashed")))
    assert text.endswith("\n\nNot measured:\n\n- pruned @ pytorch: it crashed\n")
    assert len(table(text)) == 4


# --- the page


class Page(HTMLParser):
    """Tags with their attributes, and the text of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("td", "th"):
            self.cells.append("")
            self.open = True

    def handle_endtag(self, tag: str) -> None:
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.open:
            self.cells[-1] += data

    def count(self, *names: str) -> int:
        return sum(tag in names for tag, _ in self.tags)


def written(folder: Path, run: RunSummary) -> str:
    summary.write(run, benched(), folder)
    return (folder / "report.html").read_text()


def external(page: Page) -> Sequence[str]:
    """What a browser would fetch: links into the page itself are none."""
    names = {"src", "href", "xlink:href", "data", "srcset", "action", "poster"}
    return [
        value
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if value and (name in names and not value.startswith("#"))
    ]


def test_a_run_writes_three_files_that_agree(tmp_path: Path) -> None:
    run = found()
    page = written(tmp_path, run)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "report.html", "summary.json", "summary.md",
    ]  # fmt: skip
    plain = json.loads((tmp_path / "summary.json").read_text())
    assert plain["schema"] == "deploykit.run-summary/1"
    assert RunSummary.model_validate(plain) == run
    assert (tmp_path / "summary.md").read_text() == summary.markdown(run)
    assert summary.verdict_text(run).replace("'", "&#39;") in page


def test_the_page_shows_each_row_with_its_number(tmp_path: Path) -> None:
    run = found(row(), unmeasured(), row(backend="openvino"))
    cells = Page(written(tmp_path, run)).cells
    for number, each in enumerate(run.rows, 1):
        at = cells.index(each.backend, cells.index("samples/s")) - 2
        want = [str(number), *(cell.replace(" [", "[") for cell in summary.cells(each))]
        assert cells[at : at + len(want)] == want


def test_the_page_loads_nothing_and_has_both_plots(tmp_path: Path) -> None:
    text = written(tmp_path, found())
    page = Page(text)
    assert page.count("svg") == 2
    assert page.count("script", "link", "img", "iframe", "object", "embed", "image") == 0
    assert external(page) == []
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_only_what_was_measured_is_in_the_plots_under_its_row_number(tmp_path: Path) -> None:
    rows = (row(), unmeasured(), row(backend="openvino"))
    shown = [p.name for p in points(tmp_path, found(*rows))]
    assert shown == ["1", "3"]
    shipped = [p.name for p in points(tmp_path, found(*rows)) if p.shipped]
    assert shipped == ["1"]
    assert not any(p.shipped for p in points(tmp_path, found(*rows, ship=None)))


def points(folder: Path, run: RunSummary) -> list[Any]:
    """What the plots are given."""
    pages: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(summary.html, "render", lambda page: pages.append(page) or "")
        summary.write(run, benched(), folder)
    return list(pages[0].points)


@pytest.mark.parametrize("ship", ["model.int8.onnx", None])
def test_the_colour_of_the_verdict_is_its_answer(tmp_path: Path, ship: str | None) -> None:
    text = written(tmp_path, found(ship=ship))
    colour = re.search(r"\.verdict \{ border-left: 5px solid var\((--\w+)\)", text)
    assert colour is not None
    assert colour[1] == ("--good" if ship else "--bad")


def test_a_hostile_name_is_text(tmp_path: Path) -> None:
    hostile = row(name=HOSTILE, backend=HOSTILE, ran={HOSTILE: 1})
    no = Verdict(ship=None, gates=(), reason=HOSTILE)
    run = found(hostile, recipe=HOSTILE, metric="top1<i>", verdict=no)
    page = Page(written(tmp_path, run))
    assert page.count("script", "i") == 0
    assert external(page) == []
    assert page.cells.count(HOSTILE) == 2  # model and backend, as they were given


def test_a_run_without_any_times_has_a_page(tmp_path: Path) -> None:
    page = Page(written(tmp_path, found(unmeasured(), ship=None)))
    assert page.count("svg") == 2


def test_an_interval_that_is_no_number_is_drawn_without_bars(tmp_path: Path) -> None:
    nan = Interval(value=0.9, low=math.nan, high=math.nan)
    run = found(row(score=nan, p50_ms=nan))
    assert Page(written(tmp_path, run)).count("svg") == 2
    assert summary.cells(run.rows[0])[3] == "0.9000"
