"""Real models on real runtimes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from deploykit import backends
from deploykit.dataset import Dataset, open_dataset
from deploykit.formats import onnx_file
from deploykit.measure import Candidate, bench, compare_speed, throughput
from deploykit.stages.take import TakeOptions, take
from deploykit.values import TensorSpec

from .conftest import FAST

ROOT = Path(__file__).parents[2]
CHANNELS = 16


def write_model(path: Path, idle_convolutions: int = 0, sign: float = 1) -> Path:
    """A small convolutional classifier; idle convolutions cost time and change nothing."""
    rng = np.random.default_rng(0)
    same = np.zeros((CHANNELS, CHANNELS, 3, 3), np.float32)
    same[range(CHANNELS), range(CHANNELS), 1, 1] = 1
    weights = {
        "first": rng.standard_normal((CHANNELS, 1, 3, 3)).astype(np.float32),
        "same": same,
        "last": sign * rng.standard_normal((CHANNELS, 10)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["images", "first"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["t0"]),
    ]
    nodes += [
        helper.make_node("Conv", [f"t{i}", "same"], [f"t{i + 1}"], pads=[1] * 4)
        for i in range(idle_convolutions)
    ]
    nodes += [
        helper.make_node("GlobalAveragePool", [f"t{idle_convolutions}"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("MatMul", ["f", "last"], ["logits"]),
    ]
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("images", kind, ["batch", 1, 28, 28])],
        [helper.make_tensor_value_info("logits", kind, ["batch", 10])],
        [numpy_helper.from_array(np.float32(array), name) for name, array in weights.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


@pytest.fixture(scope="module")
def images() -> Dataset:
    return open_dataset(ROOT / "calibration_data/fashion_mnist/evaluation.npz")


def backend_or_skip(name: str) -> str:
    if reason := backends.backend(name).unavailable():
        pytest.skip(reason)
    return name


@pytest.fixture(scope="module")
def onnx_result(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("models")
    ort = backend_or_skip("ort-cpu")
    good = onnx_file.open_file(write_model(folder / "good.onnx"))
    slow = onnx_file.open_file(write_model(folder / "slow.onnx", idle_convolutions=12))
    wrong = onnx_file.open_file(write_model(folder / "wrong.onnx", sign=-1))
    torn = good.model_copy(update={"path": folder / "torn.onnx"})
    torn.path.write_bytes(good.path.read_bytes()[:300])
    candidates = [
        Candidate(name="good", artifact=good, backend=ort),
        Candidate(name="slow", artifact=slow, backend=ort),
        Candidate(name="wrong", artifact=wrong, backend=ort),
        Candidate(name="torn", artifact=torn, backend=ort),
        Candidate(name="openvino", artifact=good, backend="openvino"),
    ]
    options = FAST.model_copy(update={"batch_sizes": (4,), "block_ms": 20})
    return bench(candidates, options, data=images)


def test_a_slower_model_is_found_slower(onnx_result):
    assert compare_speed(onnx_result, "slow", 4).claim == "slower"
    assert onnx_result.of("slow", 4).cosines == {"logits": pytest.approx(1)}
    good, slow = (throughput(onnx_result.of(name, 4)) for name in ("good", "slow"))
    assert slow.high < good.low


def test_a_wrong_and_a_torn_model_are_void(onnx_result):
    assert "'logits' is wrong" in onnx_result.of("wrong", 4).invalid
    assert "torn.onnx: ONNX Runtime does not load it" in onnx_result.of("torn", 4).invalid


def test_what_really_ran_is_recorded(onnx_result):
    good = onnx_result.of("good", 4)
    assert good.placement.provider == "CPUExecutionProvider"
    assert good.placement.precisions["fp32"] >= 3
    assert 0 < good.load_ns < 10e9
    assert good.first_run_ns > 0


def test_another_runtime_is_compared_with_the_baseline(onnx_result):
    backend_or_skip("openvino")
    other = onnx_result.of("openvino", 4)
    assert other.invalid is None
    assert other.cosines["logits"] > 0.99


def test_a_torch_model_is_measured(tmp_path, images):
    spec = TensorSpec(name="images", dtype="float32", shape=("batch", 1, 28, 28))
    factory = f"{ROOT / 'benchmarks/models/fashion_mnist.py'}:resnet"
    artifact = take(TakeOptions(factory=factory, inputs=(spec,)), out=tmp_path / "resnet")
    candidate = Candidate(name="torch", artifact=artifact, backend="pytorch")
    result = bench([candidate], FAST, data=images)
    for measurement in result.measurements:
        assert measurement.invalid is None
        assert measurement.cosines["output"] == pytest.approx(1)
        assert measurement.load_ns < 5e9  # importing torch is not loading the model
    assert result.of("torch", 1).placement.precisions["fp32"] > 10
