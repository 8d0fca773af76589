from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit import tuning
from deploykit.errors import AnswerIsNo
from deploykit.measure.scenarios import Slo
from deploykit.tuning import Tried, choose
from deploykit.values import Artifact
from tests.bundle.conftest import linear
from tests.cli.conftest import Command, deploykit

__all__ = ["deploykit", "linear"]
SETTINGS = st.builds(
    Tried,
    threads=st.sampled_from([1, 2, 4]),
    instances=st.integers(1, 8),
    batch_size=st.sampled_from(tuning.SIZES),
    call_ms=st.floats(0.01, 100),
    samples_per_second=st.floats(1, 1e6),
)


@given(st.lists(SETTINGS, min_size=1, max_size=12), st.floats(0.1, 200))
def test_the_fastest_that_holds_the_objective(tried: list[Tried], limit_ms: float) -> None:
    slo = Slo(99.0, round(limit_ms * 1e6))
    holding = [each for each in tried if 2 * each.call_ms <= slo.latency_ns / 1e6]
    if not holding:
        with pytest.raises(AnswerIsNo, match="no setting holds p99"):
            choose(tried, slo)
        return
    chosen, delay_us = choose(tried, slo)
    assert chosen in holding
    assert chosen.samples_per_second == max(each.samples_per_second for each in holding)
    assert 2 * chosen.call_ms + delay_us / 1000 <= slo.latency_ns / 1e6 + 1e-9
    assert 0 <= delay_us <= 1000 * chosen.call_ms
    assert delay_us == 0 or chosen.batch_size > 1


def test_what_was_measured_goes_into_the_server_s_configuration(
    linear: Artifact, tmp_path: Path, deploykit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "SIZES", (1, 4))
    monkeypatch.setattr(tuning, "_powers", lambda cores: [1])
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).random((16, 3), np.float32))
    words = ("package", linear.path, "--data", tmp_path / "d.npz", "--backend", "ort-cpu")
    out = tmp_path / "bundle"
    told = deploykit(*words, "-o", out, "--layout", "triton", "--slo", "p99=500ms")
    assert told.code == 0, told.err
    (document,) = json.loads((out / "evidence.json").read_text())["documents"]
    chosen = document["chosen"]
    assert document["schema"] == "deploykit.tuning/1"
    assert {each["batch_size"] for each in document["tried"]} == {1, 4}
    assert all(each["call_ms"] > 0 for each in document["tried"])
    config = (out / "model" / "config.pbtxt").read_text()
    assert f"max_batch_size: {chosen['batch_size']}\n" in config
    assert f"count: {chosen['instances']}\n" in config
    assert f"max_queue_delay_microseconds: {document['queue_delay_us']}\n" in config
    assert f'string_value: "{chosen["threads"]}"' in config
    monkeypatch.setattr(tuning, "SIZES", (1,))
    no = deploykit(*words, "-o", tmp_path / "no", "--layout", "triton", "--slo", "p99=1us")
    assert no.code == 7
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("more", "fact"),
    [
        (("--slo", "p99=5ms"), "plain layout has none"),
        (("--slo", "fast", "--layout", "triton"), "no latency objective"),
        (("--slo", "p99=5ms", "--layout", "triton", "--instances", "2"), "--instances"),
    ],
)
def test_bad_requests(
    more: tuple[str, ...], fact: str, linear: Artifact, tmp_path: Path, deploykit: Command
) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((16, 3), np.float32))
    words = ("package", linear.path, "--data", tmp_path / "d.npz", "--backend", "ort-cpu")
    told = deploykit(*words, "-o", tmp_path / "bundle", *more)
    assert told.code == 2
    assert fact in told.lines[0]
    assert not (tmp_path / "bundle").exists()
