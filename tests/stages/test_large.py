"""Models beyond protobuf's 2 GiB, in small: the limits are lowered, the way is the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from deploykit.backends import open_session
from deploykit.dataset import Dataset, open_dataset
from deploykit.errors import IntegrityError
from deploykit.formats import checkpoint, onnx_weights, open_model, torch_folder
from deploykit.stages.export import ExportOptions, export
from deploykit.stages.quantize import QuantizeOptions, quantize
from deploykit.stages.take import TakeOptions, take
from deploykit.values import Artifact, TensorSpec
from tests.formats.test_onnx_graph import normal, parsed

NET = """
from torch import nn
def make():
    line = nn.Linear(32, 32)
    tied = nn.Linear(32, 32)
    tied.weight = line.weight
    return nn.Sequential(line, nn.ReLU(), tied)
"""
TEXT = "(float[N,32] x) => (float[N,32] y) { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }"


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has more than 1000 bytes is large."""
    monkeypatch.setattr(onnx_weights, "LARGEST", 1000)
    monkeypatch.setattr(checkpoint, "LARGE", 1000)
    monkeypatch.setattr(torch_folder, "LARGE", 1000)
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1000)


def product(folder: Path) -> tuple[Artifact, Dataset]:
    """Two products of 32 x 32 weights, and data."""
    folder.mkdir()
    onnx_weights.write(parsed(TEXT, a=normal(32, 32), b=normal(32, 32, seed=1)), folder / "m.onnx")
    np.savez(folder / "data.npz", x=normal(32, 32, seed=2))
    return open_model(folder / "m.onnx"), open_dataset(folder / "data.npz")


@pytest.mark.usefixtures("limit")
def test_export_puts_weights_beside_the_model_and_proves_it(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    inputs = (TensorSpec(name="x", dtype="float32", shape=("batch", 32)),)
    net = take(TakeOptions(factory=f"{tmp_path}/net.py:make", inputs=inputs), out=tmp_path / "net")
    made = export(net, ExportOptions(), out=tmp_path / "out" / "net.onnx")
    (name,) = made.weights
    assert name.startswith("net.")
    assert made.facts["largest_relative_difference"] < 1e-5
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["net.onnx", name, "net.onnx.record.json"]
    )
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    assert open_model(moved / "net.onnx").sha256 == made.sha256
    data = bytearray((moved / name).read_bytes())
    data[-1] ^= 1
    (moved / name).write_bytes(data)
    with pytest.raises(IntegrityError, match="not the file that its record describes"):
        open_model(moved / "net.onnx")
    (moved / name).unlink()
    with pytest.raises(IntegrityError, match="the weights are missing"):
        open_model(moved / "net.onnx")


def test_quantize_of_weights_in_another_file_is_that_of_weights_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = QuantizeOptions(calibration_method="minmax", scope="compute", corrections=("none",))
    made = {}
    for name, most in (("inside", 1 << 30), ("beside", 1000)):
        monkeypatch.setattr(onnx_weights, "LARGEST", most)
        source, data = product(tmp_path / name)
        made[name] = quantize(source, options, data=data, out=tmp_path / name / "q.onnx")
    assert made["inside"].weights == ()
    (file,) = made["beside"].weights
    assert {p.name for p in (tmp_path / "beside").glob("q*")} == {
        "q.onnx", file, "q.onnx.record.json",
    }  # fmt: skip
    inside, beside = (
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(each.path).graph.initializer}
        for each in made.values()
    )
    integers = [array for array in inside.values() if array.dtype == np.int8 and array.ndim == 2]
    others = [array for array in beside.values() if array.dtype == np.int8 and array.ndim == 2]
    assert len(integers) == 2
    for one, other in zip(integers, others, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("limit")
def test_what_is_chosen_by_measurement_is_published_with_its_weights(tmp_path: Path) -> None:
    source, data = product(tmp_path / "m")
    options = QuantizeOptions(scope="compute")
    made = quantize(source, options, data=data, out=tmp_path / "out" / "q.onnx")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["q.onnx", *made.weights, "q.onnx.record.json"]
    )
    assert "no correction tried" in made.facts["warnings"][0]
    feed = {"x": normal(4, 32, seed=3)}
    with open_session(source, "ort-cpu") as session:
        want = session.run(feed)["y"]
    with open_session(open_model(made.path), "ort-cpu") as session:
        have = session.run(feed)["y"]
    assert np.abs(want - have).max() < 0.1 * np.abs(want).max()
