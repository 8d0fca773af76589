"""Pruning until the whole network is fast enough; the network's times are known ones here."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit import faster, store
from deploykit.dataset import Dataset
from deploykit.errors import AnswerIsNo, UsageError
from deploykit.faster import _more, prune_until_faster
from deploykit.formats import torch_folder
from deploykit.formats.onnx_layer import LayerShape
from deploykit.stages.prune import PruneOptions, table
from deploykit.values import Artifact, Interval


@pytest.fixture(autouse=True)
def _known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake_measured(layer: LayerShape, *_: object) -> float:
        area = 1.0
        for size in (*layer.kernel, *layer.around):
            area *= size
        return layer.inputs * layer.outputs * area / 1e3

    monkeypatch.setattr(table, "_measured", fake_measured)
    monkeypatch.setattr(faster._Trial, "_deployed", lambda _, model, name: model)


def times(monkeypatch: pytest.MonkeyPatch, kept: float) -> list[float]:
    """The network gains this share of what its multiply-accumulates fall by; returns all gains."""
    told: list[float] = []

    def fake_timed(_: object, baseline: Artifact, candidate: Artifact) -> Interval:
        facts = candidate.history[-1].facts
        gain = 1 + kept * (facts["macs_before"] / facts["macs_after"] - 1)
        told.append(gain)
        return Interval(value=gain, low=gain * 0.99, high=gain * 1.01)

    monkeypatch.setattr(faster._Trial, "_timed", fake_timed)
    return told


def test_the_table_is_asked_for_more_until_the_network_is_fast_enough(
    teacher: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = times(monkeypatch, kept=0.7)
    options = PruneOptions(speedup="1.5x")
    made = prune_until_faster(teacher, options, out=tmp_path / "p")
    facts = made.history[-1].facts
    assert len(told) == facts["attempts"] > 1
    assert told[0] < 1.5
    assert facts["speedup_measured"]["low"] == pytest.approx(min(t for t in told if t > 1.5) * 0.99)
    assert facts["speedup_measured"]["low"] >= 1.5
    assert made.history[-1].options["speedup"] == 1.5
    assert store.read(tmp_path / "p") == made
    torch_folder.load(made)
    assert prune_until_faster(teacher, options, out=tmp_path / "p") == made
    assert len(told) == facts["attempts"], "nothing is timed twice"


def test_more_than_was_asked_for_is_given_back(
    teacher: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = times(monkeypatch, kept=2.0)
    made = prune_until_faster(teacher, PruneOptions(speedup=2), out=tmp_path / "p")
    found = made.history[-1].facts["speedup_measured"]["low"]
    assert found == pytest.approx(0.99 * min(told))
    assert 2 <= found < 0.95 * 0.99 * told[0]


def test_what_is_out_of_reach_is_a_no_with_the_nearest(
    teacher: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = times(monkeypatch, kept=0.05)
    monkeypatch.setattr(faster, "ATTEMPTS", 2)
    with pytest.raises(AnswerIsNo, match=r"5\.00x on ort-cpu in fp32 was not reached") as caught:
        prune_until_faster(teacher, PruneOptions(speedup=5), out=tmp_path / "p")
    assert f"the nearest is {max(told):.2f}x" in str(caught.value)
    assert f"--speedup {max(told) * 0.99:.2f}x" in caught.value.hint
    assert not (tmp_path / "p").exists()


@given(share=st.floats(0, 0.9), by_table=st.floats(1.05, 8), wanted=st.floats(1.05, 4))
def test_the_next_widths_follow_from_the_time_that_does_not_change(
    share: float, by_table: float, wanted: float
) -> None:
    def real(table: float) -> float:
        return 1 / (share + (1 - share) / table)

    asked = _more(wanted, real(by_table), by_table)
    assert 1.01 <= asked <= 2 * by_table
    if 1.01 < asked < 2 * by_table:
        assert real(asked) == pytest.approx(wanted, rel=1e-3)


def test_int8_needs_data(teacher: Artifact, calibration: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8 is calibrated on data"):
        prune_until_faster(teacher, PruneOptions(speedup=2, precision="int8"), out=tmp_path / "p")
