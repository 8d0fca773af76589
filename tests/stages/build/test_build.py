from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploykit import store
from deploykit.dataset import Dataset
from deploykit.errors import StageError, UsageError
from deploykit.formats import open_model
from deploykit.stages.build import BuildOptions, build, shape_profiles, unavailable
from deploykit.stages.quantize import QuantizeOptions, quantize
from deploykit.values import Artifact, TensorSpec

SHAPES = {
    "min_shapes": ("images:1x1x28x28",),
    "opt_shapes": ("images:8x1x28x28",),
    "max_shapes": ("images:64x1x28x28",),
}
needs_tensorrt = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@needs_tensorrt
def test_builds_the_float_teacher_without_a_gpu(teacher_onnx: Artifact, tmp_path: Path) -> None:
    made = build(teacher_onnx, BuildOptions(**SHAPES), out=tmp_path / "m.engine")
    assert made.format == "engine"
    assert made.path.stat().st_size > 100_000
    assert made.facts["network_layers"]["convolution"] == 13
    assert made.facts["profile"] == {"images": [[1, 1, 28, 28], [8, 1, 28, 28], [64, 1, 28, 28]]}
    assert made.facts["ran_on_gpu"] is False
    assert open_model(made.path) == made  # the record beside it says what it is
    assert [r.stage for r in made.history] == ["take", "export", "build"]


@needs_tensorrt
def test_builds_int8_from_our_own_quantizer(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    options = QuantizeOptions(target="tensorrt", calibration_samples=64)
    quantized = quantize(teacher_onnx, options, data=calibration, out=tmp_path / "q.onnx")
    made = build(
        quantized, BuildOptions(gpu=("sm89", "sm120"), **SHAPES), out=tmp_path / "q.engine"
    )
    assert made.precision == "int8"
    assert made.facts["network_layers"]["quantize"] >= 10
    assert made.facts["compute_capabilities"] == ["sm89", "sm120"]


@needs_tensorrt
def test_the_cpu_s_int8_is_refused_with_the_preset_that_would_do(
    teacher_int8: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match="parser refuses") as caught:
        build(teacher_int8, BuildOptions(**SHAPES), out=tmp_path / "m.engine")
    assert "--target tensorrt" in caught.value.hint
    assert not list(tmp_path.iterdir())


@needs_tensorrt
def test_an_unknown_gpu_is_told_what_was_meant(teacher_onnx: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        build(teacher_onnx, BuildOptions(gpu=("sm_89",), **SHAPES), out=tmp_path / "m.engine")
    assert caught.value.hint == "did you mean 'sm89'?"


def test_without_tensorrt_it_says_what_to_install(teacher_onnx: Artifact, tmp_path: Path) -> None:
    """In a process in which neither flavour can be found."""
    code = (
        "import sys, importlib.abc\n"
        "class Hide(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith('tensorrt'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "from deploykit.__main__ import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code, "build", str(teacher_onnx.path), "-o", "m.engine"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 4
    assert done.stderr.splitlines() == [
        "error: no engine can be built here: tensorrt and tensorrt-rtx are not installed",
        (
            "  fix: pip install 'deploykit[tensorrt-rtx]' (builds without a GPU), or "
            "'deploykit[tensorrt]' with the vendor's package index on a GPU host"
        ),
    ]


INPUT = TensorSpec(name="x", dtype="float32", shape=("batch", 3, "height"))


def test_a_missing_bound_is_the_optimal_shape() -> None:
    (profile,) = shape_profiles((INPUT,), BuildOptions(opt_shapes=("x:4x3x32",)))
    assert profile == {"x": ((4, 3, 32),) * 3}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (BuildOptions(), "dynamic dimensions and no shapes"),
        (BuildOptions(opt_shapes=("y:1x3x8",)), "no input is called 'y'"),
        (BuildOptions(opt_shapes=("x:1x3",)), "do not fit"),
        (BuildOptions(opt_shapes=("x:1x4x8",)), "do not fit"),
        (BuildOptions(opt_shapes=("x:2x3x8",), max_shapes=("x:1x3x8",)), "do not fit"),
        (BuildOptions(opt_shapes=("x:2,3,8",)), "is no shape"),
    ],
)
def test_shapes_that_make_no_sense_are_refused(options: BuildOptions, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        shape_profiles((INPUT,), options)


def test_an_engine_without_its_record_is_not_opened(tmp_path: Path) -> None:
    from deploykit.errors import InputError

    (tmp_path / "m.engine").write_bytes(b"native code")
    assert store.read(tmp_path / "m.engine") is None
    with pytest.raises(InputError, match="without a record"):
        open_model(tmp_path / "m.engine")
