from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

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
    model=st.sampled_from(["net.onnx (fp32)", "net.int8.onnx (int8)"]),
    precision=st.just("fp32"),
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


def test_the_fastest_of_several_models_is_served_first(
    linear: Artifact, tmp_path: Path, deploykit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "SIZES", (64,))
    monkeypatch.setattr(tuning, "_powers", lambda cores: [1])
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).random((64, 3), np.float32))
    slow = slowed(linear, tmp_path / "slow.onnx")
    words = ("package", slow, linear.path, "--data", tmp_path / "d.npz", "--backend", "ort-cpu")
    out = tmp_path / "bundle"
    told = deploykit(*words, "-o", out, "--layout", "triton", "--slo", "p99=900ms")
    assert told.code == 0, told.err
    assert "linear.onnx (fp32) in batches" in told.err
    assert tuning.NOT_COMPARED in told.err
    assert (out / "model/1/model.onnx").read_bytes() == linear.path.read_bytes()
    assert (out / "model-int8-ort-cpu/1/model.onnx").read_bytes() == slow.read_bytes()
    (document,) = json.loads((out / "evidence.json").read_text())["documents"]
    assert {each["precision"] for each in document["tried"]} == {"fp32", "int8"}
    assert document["chosen"]["model"] == "linear.onnx (fp32)"


def slowed(linear: Artifact, out: Path) -> Path:
    """The same model behind a detour in int8 that takes long and changes little."""
    wide = np.random.default_rng(0).standard_normal((3, 40_000)).astype(np.float32)
    parts = {
        "s": np.float32(0.05), "z": np.int8(0), "wide": wide, "back": np.float32(wide.T * 0),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "wide"], ["m"]),
        helper.make_node("MatMul", ["m", "back"], ["n"]),
        helper.make_node("Add", ["n", "x"], ["same"]),
    ]
    proto = onnx.load(linear.path)
    proto.graph.node[0].input[0] = "same"
    for node in reversed(nodes):
        proto.graph.node.insert(0, node)
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k)
                                   for k, v in parts.items())  # fmt: skip
    onnx.save(proto, out)
    return out


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
