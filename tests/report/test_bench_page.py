"""The page of a bench: it is whole, it is safe, and its numbers are those of the table."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from deploykit import environment
from deploykit.measure import BenchOptions, BenchResult
from deploykit.measure.result import ScenarioRun
from deploykit.report import bench_page, bench_text
from deploykit.values import Interval, Kernel, Measurement, Placement, Score, SessionOptions

HOSTILE = """<script src="http://evil.example/x.js">alert('1')</script>&"'"""
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags in order; every one that opens must close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def timed(name: str, ms: float, *, batch: int = 1, invalid: str | None = None) -> Measurement:
    rng = np.random.default_rng(len(name) + batch)
    times = (rng.normal(1, 0.01, (40, 20)) * ms * 1e6).astype(int)
    kernel = Kernel(names=("conv",), operator="Conv", microseconds=80, nodes=("conv",), module="m")
    return Measurement(
        name=name, backend="b", batch_size=batch, options=SessionOptions(), load_ns=1,
        first_run_ns=1, warmup_runs=5, blocks_ns=tuple(map(tuple, times.tolist())),
        process_blocks=(10,) * 4, placement=Placement(provider="p", precisions={"int8": 5}),
        peak_rss_bytes=1, kernels=(kernel, kernel.model_copy(update={"microseconds": 20.0})),
        invalid=invalid,
    )  # fmt: skip


def result(*more: Measurement, sizes: tuple[int, ...] = (1,), **changes: object) -> BenchResult:
    pairs = [timed(n, 2 * b, batch=b) for b in sizes for n in ("base", "base (again)")]
    plain = BenchResult(
        baseline="base", control="base (again)", measurements=(*pairs, *more),
        options=BenchOptions(batch_sizes=sizes), inputs="real", data_digest=None,
        environment=environment.read(), load_average_after=0.1, steal_share=None,
    )  # fmt: skip
    return plain.model_copy(update=changes)


def test_the_page_is_whole_and_loads_nothing() -> None:
    text = bench_page.render(result(timed("fast", 1)))
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object", "embed", "image"} & set(page.tags)
    outside = [
        value for name, value in page.attributes
        if name in ("src", "href", "xlink:href", "data") and not str(value).startswith("#")
    ]  # fmt: skip
    assert outside == []
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert '<meta name="viewport"' in text
    assert "prefers-color-scheme: dark" in text


def test_every_number_of_the_table_is_on_it() -> None:
    made = result(timed("fast", 1))
    words = Page(bench_page.render(made)).words
    for row in bench_text.times(made):
        for cell in row:
            assert cell.split(" [")[0] in words, cell


def test_there_is_a_plot_only_of_what_was_measured() -> None:
    def titles(made: BenchResult) -> list[str]:
        return re.findall(r"<h2>(.*?)</h2>", bench_page.render(made))

    alone = titles(result())
    assert "Latency of a call at batch 1" in alone
    assert "Where the time goes" in alone
    assert "Throughput by batch size" not in alone
    assert "Score against latency" not in alone
    assert "Throughput by batch size" in titles(result(sizes=(1, 8)))
    score = Score(metric="top1", score=Interval(value=0.9, low=0.88, high=0.92), samples=100)
    assert "Score against latency" in titles(result(scores={"base": score}))


def test_a_plot_takes_the_ink_of_the_page() -> None:
    text = bench_page.render(result())
    assert bench_page.INK not in text
    assert "currentColor" in text


def test_the_bars_are_as_long_as_the_kernels_take() -> None:
    text = bench_page.render(result())
    assert re.findall(r'style="width:([\d.]+)%"', text) == ["100.0", "25.0"]
    assert "80.0%" in text


@pytest.mark.parametrize("invalid", [None, "it crashed"])
def test_what_must_not_be_used_is_said_first(invalid: str | None) -> None:
    text = bench_page.render(result(timed("bad", 1, invalid=invalid)))
    assert ("1 measurements are INVALID" in text) == bool(invalid)
    assert ("Every measurement is valid" in text) != bool(invalid)
    assert ("it crashed" in text) == bool(invalid)


def test_a_scenario_that_must_not_be_used_is_said_with_the_measurements() -> None:
    played = ScenarioRun(
        name="base", batch_size=1, scenario="server", seconds=1, seed=0, rate=9, affinity=(),
        invalid="it hung",
    )  # fmt: skip
    assert "1 scenarios are INVALID." in bench_page.render(result(scenarios=(played,)))
    assert "scenarios are INVALID" not in bench_page.render(result())


def test_a_hostile_name_is_text() -> None:
    made = result(timed(HOSTILE, 1), timed("bad", 1, invalid=HOSTILE), notes=(HOSTILE,))
    text = bench_page.render(made)
    assert "<script" not in text
    assert HOSTILE in " ".join(Page(text).words)


def test_without_a_valid_measurement_there_is_a_page() -> None:
    bad = [timed(n, 1, invalid="gone") for n in ("base", "base (again)")]
    text = bench_page.render(result(measurements=tuple(bad)))
    assert "2 measurements are INVALID" in text
    assert "<svg" not in text
