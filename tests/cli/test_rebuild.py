"""`build --from BUNDLE`: real engines of TensorRT for RTX, which needs no GPU to build."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from deploykit import gpu, store
from deploykit.errors import AnswerIsNo
from deploykit.formats import engine_file
from deploykit.stages.build import unavailable
from deploykit.values import Artifact
from tests.bundle.conftest import linear
from tests.bundle.small_models import save_linear
from tests.bundle.test_verification import relist
from tests.cli.conftest import Command

__all__ = ["linear"]
pytestmark = pytest.mark.skipif(
    unavailable("tensorrt-rtx") is not None, reason=str(unavailable("tensorrt-rtx"))
)
without_gpu = pytest.mark.skipif(gpu.unavailable() is None, reason="there is a GPU")


@pytest.fixture(scope="module")
def packed(linear: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine for sm89 and the model that it was built from."""
    from deploykit.cli import _errors, group

    folder = tmp_path_factory.mktemp("packed")
    np.savez(folder / "d.npz", x=np.random.default_rng(0).random((8, 3), np.float32))
    engine = folder / "m.engine"
    for words in (
        ("build", linear.path, "-o", engine, "--shapes-from", folder / "d.npz", "--batch-sizes",
         "1,4,16", "--gpu", "sm89"),
        ("package", engine, linear.path, "--data", folder / "d.npz", "--backend", "ort-cpu",
         "-o", folder / "bundle"),
    ):  # fmt: skip
        assert _errors.call(group, [str(word) for word in words]) == 0
    return folder / "bundle"


@without_gpu
def test_an_engine_is_made_again_and_what_is_not_proven_is_said(
    packed: Path, tmp_path: Path, deploykit: Command
) -> None:
    out = tmp_path / "again.engine"
    told = deploykit("build", "--from", packed, "-o", out)
    assert told.code == 0, told.err
    assert "made again from model-fp32-ort-cpu.onnx" in told.out
    assert "NOT PROVEN, its answers were not compared: no engine runs on this machine" in told.out
    made = engine_file.open_file(out)
    assert made.facts["compute_capabilities"] == ["sm89"]
    assert made.facts["profiles"] == [{"x": [[1, 3], [4, 3], [16, 3]]}]
    assert engine_file.built_here(made)
    assert {path.name for path in tmp_path.iterdir()} == {
        "again.engine",
        "again.engine.record.json",
    }


@without_gpu
def test_what_changed_is_said(packed: Path, tmp_path: Path, deploykit: Command) -> None:
    words = ("build", "--from", packed, "-o", tmp_path / "m.engine", "--gpu", "sm120")
    told = deploykit(*words, "--opt-shapes", "x:2x3", "--json")
    assert told.code == 0, told.err
    document = json.loads(told.out)
    assert document["schema"] == "deploykit.rebuilt/1"
    assert document["changed"]["compute_capabilities"] == [["sm89"], ["sm120"]]
    assert document["changed"]["profiles"][1] == [{"x": [[2, 3]] * 3}]
    assert document["golden_max_error"] is None
    assert document["not_proven"]
    assert deploykit(*words).code == 2  # something is there


def test_a_portable_bundle_is_built_with_the_options_given(
    linear: Artifact, tmp_path: Path, deploykit: Command
) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((8, 3), np.float32))
    words = ("package", linear.path, "--data", tmp_path / "d.npz", "--backend", "ort-cpu")
    assert deploykit(*words, "-o", tmp_path / "bundle").code == 0
    again = ("build", "--from", tmp_path / "bundle", "-o", tmp_path / "m.engine")
    assert deploykit(*again, "--flavour", "tensorrt-rtx").code == 2  # dynamic, and no shapes
    told = deploykit(*again, "--opt-shapes", "x:2x3", "--flavour", "tensorrt-rtx")
    assert told.code == 0, told.err


def test_bad_requests(packed: Path, linear: Artifact, tmp_path: Path, deploykit: Command) -> None:
    out = tmp_path / "m.engine"
    assert deploykit("build", "-o", out).code == 2
    assert deploykit("build", linear.path, "--from", packed, "-o", out).code == 2
    bundle = Path(shutil.copytree(packed, tmp_path / "bundle"))
    other = save_linear(tmp_path / "other.onnx", seed=9)
    shutil.copy(other.path, bundle / "model-fp32-ort-cpu.onnx")
    told = deploykit("build", "--from", bundle, "-o", out)
    assert told.code == 5
    relist(bundle, "model-fp32-ort-cpu.onnx")
    told = deploykit("build", "--from", bundle, "-o", out)
    assert told.code == 3, told.err
    assert "was built from a model that is not in the bundle" in told.lines[0]
    record = bundle / "model.engine.record.json"
    record.write_text(record.read_text().replace('"plugins": []', '"plugins": ["/x/evil.so"]'))
    shutil.copy(packed / "model-fp32-ort-cpu.onnx", bundle)
    for name in ("model-fp32-ort-cpu.onnx", "model.engine.record.json"):
        relist(bundle, name)
    told = deploykit("build", "--from", bundle, "-o", out)
    assert told.code == 2
    assert "evil.so" in told.lines[0]
    assert not out.exists()


def test_an_engine_that_answers_otherwise_is_not_written(
    packed: Path, tmp_path: Path, deploykit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*_: object) -> None:
        raise AnswerIsNo("it answers differently", hint="nothing was written")

    monkeypatch.setattr("deploykit.cli.onnx_stages.prove", no)
    told = deploykit("build", "--from", packed, "-o", tmp_path / "m.engine")
    assert told.code == 7
    assert not list(tmp_path.iterdir())
    assert store.read(tmp_path / "m.engine") is None
