"""Scenarios: what is asked and read, the search on a made engine, and LoadGen itself on fakes."""

from __future__ import annotations

import pytest

from deploykit._lazy import installed
from deploykit.errors import MissingError, UsageError
from deploykit.measure import bench, loadgen, scenarios
from deploykit.measure.result import ScenarioRun
from deploykit.measure.scenarios import Slo, highest_rate, parse_slo

from .conftest import FAKE_WORKER, FAST

needs_loadgen = pytest.mark.skipif(
    not installed("mlperf_loadgen"), reason="mlcommons-loadgen is not installed"
)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("p99=5ms", Slo(99, 5_000_000)),
        ("p99.9=0.25s", Slo(99.9, 250_000_000)),
        ("p50=800us", Slo(50, 800_000)),
    ],
)
def test_an_objective_is_a_percentile_and_a_time(text, want):
    assert parse_slo(text) == want


@pytest.mark.parametrize("text", ["p99", "99=5ms", "p99=5", "p100=5ms", "p0=1ms", "p99=0ms", ""])
def test_what_is_no_objective_is_refused(text):
    with pytest.raises(UsageError, match="is no latency objective"):
        parse_slo(text)


class Made:
    """An engine that holds up to a rate; where `luck` fails, at its first confirmations."""

    calls_per_second, seconds = 1000.0, 10.0

    def __init__(self, limit, *, unlucky=0, invalid=None):
        self.limit, self.unlucky, self.invalid = limit, unlucky, invalid

    def play(self, scenario, *, rate, slo, seconds, seed):
        assert scenario == "server"
        full = seconds == self.seconds
        assert (seed != 0) == full  # confirmed with another seed
        holds = rate <= self.limit and not (full and self.unlucky > 0)
        self.unlucky -= full
        return ScenarioRun(
            name="m", batch_size=1, scenario="server", seconds=seconds, seed=seed, rate=rate,
            affinity=(), queries=1000, late=0 if holds else 11, valid=holds, invalid=self.invalid,
        )  # fmt: skip


@pytest.mark.parametrize("limit", [40, 333, 700, 999])
def test_the_highest_rate_is_found_from_below(limit):
    found = highest_rate(Made(limit), "p99=5ms", lambda text: None)
    assert limit - 1000 / 2**scenarios.PROBES <= found.rate <= limit
    assert found.runs[-1].seconds == 10
    assert len(found.runs) == scenarios.PROBES + 1


def test_what_does_not_hold_again_is_lowered_and_at_last_given_up():
    lowered = highest_rate(Made(500, unlucky=2), "p99=5ms", lambda text: None)
    assert lowered.rate == pytest.approx(500 * 0.95**2)
    given_up = highest_rate(Made(500, unlucky=99), "p99=5ms", lambda text: None)
    assert given_up.rate is None
    assert len(given_up.runs) == scenarios.PROBES + scenarios.CONFIRMATIONS


def test_where_no_rate_holds_none_is_confirmed():
    found = highest_rate(Made(1), "p99=5ms", lambda text: None)
    assert found.rate is None
    assert len(found.runs) == scenarios.PROBES


def test_a_crash_ends_the_search():
    found = highest_rate(Made(500, invalid="it crashed"), "p99=5ms", lambda text: None)
    assert (found.rate, found.invalid, len(found.runs)) == (None, "it crashed", 1)


def test_the_log_is_read_line_by_line_and_reasons_are_joined(tmp_path):
    lines = [
        "not LoadGen",
        ':::MLLOG {"key": "result_query_count", "value": 459}',
        ':::MLLOG {"key": "result_validity", "value": "INVALID"}',
        ':::MLLOG {"key": "result_invalid_reason", "value": "Reduce target QPS. "}',
        ':::MLLOG {"key": "result_invalid_reason", "value": "Run longer."}',
        ':::MLLOG {"key": "result_99.00_percentile_latency_ns", "value": 5000}',
        ':::MLLOG {"key": "result_completed_samples_per_sec", "value": 99.5}',
        ":::MLLOG {torn",
    ]
    path = tmp_path / "detail.txt"
    path.write_text("\n".join(lines))
    found = loadgen.driven(loadgen.read_detail(path))
    assert (found.queries, found.valid, found.per_second) == (459, False, 99.5)
    assert found.reason == "Reduce target QPS. Run longer."
    assert found.latencies_ns == {"99": 5000}


def test_offline_is_played_at_the_largest_batch_and_the_others_at_the_smallest():
    assert scenarios.size_for("offline", (1, 8, 4)) == 8
    assert scenarios.size_for("server", (1, 8, 4)) == 1


def test_without_loadgen_it_says_what_to_install(fake, vectors, monkeypatch):
    monkeypatch.setattr("deploykit.measure.run.installed", lambda name: False)
    options = FAST.model_copy(update={"scenarios": ("server",)})
    with pytest.raises(MissingError, match="LoadGen is not installed"):
        bench([fake("steady")], options, data=vectors, worker=FAKE_WORKER)


def play(vectors, fakes, *kinds, slo=None):
    """Play scenarios for a second each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scenarios.SECONDS, "standard", 1.0)
        patch.setattr(scenarios, "PROBES", 1)
        patch.setattr(scenarios, "STREAMS", 2)
        options = FAST.model_copy(
            update={"scenarios": kinds, "slo": slo, "block_ms": 1, "max_seconds": 4}
        )
        return bench(fakes, options, data=vectors, worker=FAKE_WORKER)


@needs_loadgen
def test_loadgen_plays_every_scenario(fake, vectors):
    every = ("single-stream", "multi-stream", "offline", "server")
    played = play(vectors, [fake("steady:0.5")], *every, slo="p50=5s")
    runs = {run.scenario: run for run in played.scenarios}
    assert len(runs) == 4
    assert all(run.invalid is None and run.queries >= 1 for run in runs.values())
    assert runs["single-stream"].latencies_ms["p50"] >= 0.5
    assert runs["multi-stream"].latencies_ms["p50"] >= 2 * 0.5  # two samples one after the other
    assert runs["server"].latencies_ms["p50"] >= 0.5
    assert runs["server"].rate <= 1000
    assert runs["offline"].latencies_ms == {}
    assert 0 < runs["offline"].samples_per_second <= 2000
    assert played.slos[0].rate > 0


@needs_loadgen
def test_a_crash_and_a_lost_completion_are_told_and_cost_nobody_else(fake, vectors):
    fakes = [fake("late-crash"), fake("late-hang"), fake("steady")]
    played = play(vectors, fakes, "single-stream")
    told = {run.name: run.invalid for run in played.scenarios}
    assert "RuntimeError: late" in told["late-crash"]
    assert "no answer in" in told["late-hang"]
    assert told["steady"] is None
