from __future__ import annotations

import numpy as np
import pytest

from deploykit.measure import lane as lane_module
from deploykit.measure.lane import Lane, Setup
from deploykit.measure.protocol import Finished, Warmed
from deploykit.values import Placement

from .conftest import FAST

DRIFTING = Warmed(runs=50, steady=False, window_medians_ns=[int(1e6 * 1.05**i) for i in range(50)])
NOISY = Warmed(runs=50, steady=False, window_medians_ns=[1_000_000, 1_200_000] * 25)
STEADY = Warmed(runs=7, steady=True, window_medians_ns=[1_000_000] * 7)


class FakeChild:
    """Gives the answers that it was told, and then must be left alone."""

    answers: list[object] = []

    def __init__(self, *arguments: object, **named: object) -> None:
        self.closed = False

    def ask(self, request: object, kind: type, seconds: float) -> object:
        assert not self.closed
        return self.answers.pop(0)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def lane(fake, tmp_path, monkeypatch) -> Lane:
    monkeypatch.setattr(lane_module, "Child", FakeChild)
    return Lane(fake("steady"), 1, Setup(FAST, (0,), ("no-such-program",)), tmp_path / "lane")


def warm_up(lane: Lane, *answers: Warmed) -> Lane:
    FakeChild.answers = list(answers)
    lane.warm_up()
    assert not FakeChild.answers
    return lane


def test_times_that_drift_through_two_warm_ups_are_void_and_the_process_ends(lane):
    warm_up(lane, DRIFTING, DRIFTING)
    assert lane.invalid == (
        "not steady after 100 runs of warm-up: a call went from 4.12 to 9.21 ms and on"
    )
    assert lane._child.closed
    lane.time(0)
    assert lane.measurement().blocks_ns == ()


def test_a_slow_start_has_a_second_chance(lane):
    warm_up(lane, DRIFTING, STEADY)
    assert (lane.invalid, lane.notes) == (None, [])
    assert lane.measurement().warmup_runs == 57


def test_noise_is_told_and_voids_nothing(lane):
    warm_up(lane, NOISY)
    assert lane.invalid is None
    assert lane.notes == ["steady (batch 1): noisy, its times did not settle within 5 %"]


def test_a_model_that_ran_in_another_precision_is_told(lane, monkeypatch):
    monkeypatch.setattr(lane_module.feeds, "read", lambda path: [{"y": np.ones((1, 16))}])
    lane.before = [{"y": np.ones((1, 16))}]
    placement = Placement(provider="fake", precisions={"bf16": 7, "int8": 1})
    FakeChild.answers = [Finished(placement=placement, peak_rss_bytes=1)]
    lane.finish(account=True)
    assert lane.notes == ["steady (batch 1): the file is fp32, the runtime ran bf16 7, int8 1"]
