"""Engines in bundles: opened only where they were built, or where they are signed.

The GPU and its TensorRT are fakes (`tests/backends/fake_gpu.py`): what is shown is which engine is
opened at all, and what is held against what.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from deploykit import environment, gpu
from deploykit.backends import _cuda
from deploykit.backends._cuda_pycuda import PyCuda
from deploykit.backends.tensorrt import TensorRt
from deploykit.bundle import PackageOptions, golden, load, package, publish, sign, verify
from deploykit.dataset import open_dataset
from deploykit.errors import AnswerIsNo, IntegrityError, MissingError
from deploykit.formats import engine_file, open_model
from deploykit.gpu import Gpu
from deploykit.store import Job, Made, produce
from deploykit.values import Artifact, Interval, TensorSpec
from tests.backends import fake_gpu
from tests.bundle.test_verification import relist

pytest.importorskip("model_signing", reason="model-signing is not installed: deploykit[sign]")
from cryptography.hazmat.primitives.asymmetric import ec

from tests.bundle.test_signature import write_key

HOPPER = Gpu(name="fake Hopper", compute_capability="sm90", memory_bytes=1 << 30)
VERSION = "11.4.0.106"
FACTS = {"flavour": "tensorrt", "flavour_version": VERSION, "compute_capabilities": ["sm90"]}
X = TensorSpec(name="x", dtype="float32", shape=("n", 3))
Y = TensorSpec(name="y", dtype="float32", shape=("n", 3))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "builder"))


def as_gpu_host(monkeypatch: pytest.MonkeyPatch, state: Path, capability: str = "sm90") -> None:
    """From now on this is another machine: it has a GPU, and did not build the engine."""
    here = HOPPER.model_copy(update={"compute_capability": capability})
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    real = environment.versions
    monkeypatch.setattr(environment, "versions", lambda names: {
        **real(names), **({"tensorrt": VERSION} if "tensorrt" in names else {})
    })  # fmt: skip
    machine = environment.read().model_copy(update={"gpus": (here,), "driver": "600.1"})
    monkeypatch.setattr(environment, "read", lambda: machine)
    monkeypatch.setattr(gpu, "probe", lambda: here)
    memory = fake_gpu.Memory()
    driver = fake_gpu.pycuda_driver(memory)
    monkeypatch.setitem(sys.modules, "pycuda", SimpleNamespace(driver=driver))
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_gpu.tensorrt())
    monkeypatch.setattr(TensorRt, "unavailable", lambda self: None)
    monkeypatch.setattr("deploykit.backends.tensorrt.needs", lambda name: _Nothing())
    monkeypatch.setattr(_cuda, "connect", PyCuda)


class _Nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def build(folder: Path, plan: bytes = fake_gpu.DOUBLE) -> Artifact:
    """What the build stage publishes: an engine that doubles, sealed by whoever builds it."""

    def work(path: Path) -> Made:
        path.write_bytes(plan)
        facts = {**FACTS, "sealed": engine_file.seal(plan, FACTS)}
        return Made(format="engine", precision="fp32", inputs=(X,), outputs=(Y,), facts=facts)

    job = Job(stage="build", source=None, options=Interval(value=0, low=0, high=0))
    return produce(job, work, out=folder / "m.engine", force=True)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The engine and its portable model, packed on the machine that has no GPU."""
    text = '<ir_version: 9, opset_import: ["" : 17]> m (float[n,3] x) => (float[n,3] y) '
    onnx.save(onnx.parser.parse_model(f"{text}{{ y = Add(x, x) }}"), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).random((4, 3), np.float32))
    models = [(build(tmp_path), "tensorrt"), (open_model(tmp_path / "m.onnx"), "ort-cpu")]
    data = open_dataset(tmp_path / "d.npz")
    package(models, PackageOptions(golden_samples=4), out=tmp_path / "bundle", data=data)
    return tmp_path / "bundle"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return write_key(tmp_path / "key.pem", ec.generate_private_key(ec.SECP256R1()))


def test_an_unsigned_engine_of_another_machine_is_never_opened(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_gpu_host(monkeypatch, tmp_path / "other")
    monkeypatch.setattr(engine_file, "read_plan", lambda _: pytest.fail("it was read"))
    with load(bundle) as model:
        assert model.engine.format == "onnx"
        assert "not built here, and no signature" in model.passed_over["model.engine"]
    told = verify(bundle)
    assert "not built here" in str(told.engines[0].golden_not_run)
    assert told.engines[1].golden_max_error == 0.0


def test_a_signed_engine_runs_and_is_held_against_the_portable_model(
    bundle: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(bundle, key)
    as_gpu_host(monkeypatch, tmp_path / "other")
    with load(bundle, public_key=key.with_suffix(".pub")) as model:
        assert model.engine.path == "model.engine"
        x = np.ones((2, 3), np.float32)
        np.testing.assert_array_equal(model.run({"x": x})["y"], 2 * x)
    found = verify(bundle, public_key=key.with_suffix(".pub"))
    assert found.engines[0].golden_max_error == 0.0
    with load(bundle) as model:  # without the key it is code of a stranger
        assert model.engine.format == "onnx"


def test_the_builder_needs_no_signature(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_gpu_host(monkeypatch, bundle.parent / "builder")
    with load(bundle) as model:
        assert model.engine.path == "model.engine"


def test_a_signature_does_not_make_it_fit(
    bundle: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(bundle, key)
    as_gpu_host(monkeypatch, tmp_path / "other", capability="sm80")
    with pytest.raises(MissingError, match="GPU sm90 required, sm80 found"):
        verify(bundle, public_key=key.with_suffix(".pub"))
    with load(bundle, public_key=key.with_suffix(".pub")) as model:
        assert model.engine.format == "onnx"


def test_a_signed_engine_that_answers_otherwise_is_refused(
    bundle: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden.write_arrays(
        bundle / "golden_outputs-fp32-ort-cpu.npz", {"y": np.zeros((4, 3), np.float32)}
    )
    relist(bundle, "golden_outputs-fp32-ort-cpu.npz")
    sign(bundle, key)
    as_gpu_host(monkeypatch, tmp_path / "other")
    with pytest.raises(AnswerIsNo, match=r"'y' differs in 12 of 12"):
        load(bundle, public_key=key.with_suffix(".pub"))


def test_a_record_of_another_engine(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = bundle / "model.engine.record.json"
    record.write_text(record.read_text().replace('"sha256": "', '"sha256": "0', 1))
    relist(bundle, "model.engine.record.json")
    as_gpu_host(monkeypatch, bundle.parent / "builder")
    with pytest.raises(IntegrityError, match="record"):
        load(bundle)


def test_an_unsigned_engine_is_not_published(
    bundle: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [(build(tmp_path), "tensorrt"), (open_model(tmp_path / "m.onnx"), "ort-cpu")]
    options = PackageOptions(name="net", layout="triton", golden_samples=4)
    out = tmp_path / "triton"
    package(models, options, out=out, data=open_dataset(tmp_path / "d.npz"))
    as_gpu_host(monkeypatch, tmp_path / "other")
    told = publish(out, tmp_path / "repository")
    assert told.engine.endswith(".onnx")
    assert "no signature was checked" in next(iter(told.passed_over.values()))
    sign(out, key)
    told = publish(out, tmp_path / "signed", public_key=key.with_suffix(".pub"))
    assert told.engine.endswith(".plan")
