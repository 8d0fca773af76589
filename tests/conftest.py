"""Real models and data, made once a session."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from deploykit.dataset import Dataset, open_dataset
from deploykit.stages.export import ExportOptions, export
from deploykit.stages.quantize import QuantizeOptions, quantize
from deploykit.stages.take import TakeOptions, take
from deploykit.values import Artifact, TensorSpec

ROOT = Path(__file__).parents[1]
FASHION = ROOT / "calibration_data" / "fashion_mnist"
FACTORY = f"{ROOT / 'benchmarks' / 'models' / 'fashion_mnist.py'}:resnet"
TEACHER = ROOT / "benchmarks" / "models" / "fashion_mnist_teacher.safetensors"
IMAGES = TensorSpec(name="images", dtype="float32", shape=("batch", 1, 28, 28))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="a missing GPU is a failure")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (why := _no_gpu()):
        if item.config.getoption("--require-gpu"):
            pytest.fail(why)
        pytest.skip(why)


def _no_gpu() -> str | None:
    if sys.platform == "linux" and Path("/dev/nvidia0").exists():
        return None
    return "no NVIDIA device on this machine"


@pytest.fixture(scope="session")
def calibration() -> Dataset:
    """512 training images."""
    return open_dataset(FASHION / "calibration.npz")


@pytest.fixture(scope="session")
def evaluation() -> Dataset:
    """The first 1,000 test images."""
    return open_dataset(FASHION / "evaluation.npz").first(1000)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The trained teacher as a torch artifact."""
    options = TakeOptions(factory=FACTORY, weights=TEACHER, inputs=(IMAGES,), outputs=("logits",))
    return take(options, out=tmp_path_factory.mktemp("teacher") / "teacher")


@pytest.fixture(scope="session")
def teacher_onnx(
    teacher: Artifact, evaluation: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """The teacher in ONNX, float32."""
    out = tmp_path_factory.mktemp("onnx") / "teacher.onnx"
    return export(teacher, ExportOptions(), out=out, data=evaluation)


@pytest.fixture(scope="session")
def teacher_int8(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    """The teacher in INT8 for ONNX Runtime on this machine."""
    out = tmp_path_factory.mktemp("int8") / "teacher.int8.onnx"
    return quantize(teacher_onnx, QuantizeOptions(), data=calibration, out=out)


def read_json(path: Path) -> dict[str, object]:
    """A JSON document."""
    document: dict[str, object] = json.loads(path.read_text())
    return document
