"""The same questions to every backend, on the trained teacher."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deploykit import gpu
from deploykit.backends import BACKENDS, available, backend, open_session
from deploykit.dataset import Dataset
from deploykit.errors import InputError, MissingError, UsageError
from deploykit.evaluation import collect
from deploykit.session import Backend
from deploykit.stages.build import BuildOptions, build
from deploykit.values import Artifact, SessionOptions

of_onnx = pytest.mark.parametrize(
    "runtime", [b for b in BACKENDS if "onnx" in b.formats], ids=lambda b: b.name
)
# Compiling takes long: test_pytorch.py asks it what differs.
each = pytest.mark.parametrize(
    "runtime", [b for b in BACKENDS if b.name != "pytorch-compile"], ids=lambda b: b.name
)


@pytest.fixture
def model(runtime: Backend, teacher: Artifact, teacher_onnx: Artifact, tmp_path: Path) -> Artifact:
    if reason := runtime.unavailable():
        pytest.skip(reason)
    if "engine" in runtime.formats:
        shapes = {
            f"{kind}_shapes": (f"images:{size}x1x28x28",)
            for kind, size in (("min", 1), ("opt", 8), ("max", 256))
        }
        options = BuildOptions.model_validate({"flavour": runtime.name, **shapes})
        return build(teacher_onnx, options, out=tmp_path / "teacher.engine")
    return teacher if "torch" in runtime.formats else teacher_onnx


@pytest.fixture
def feed(evaluation: Dataset) -> dict[str, np.ndarray]:
    return next(evaluation.batches(8))[0]


@each
def test_opens_with_the_names_of_the_artifact(runtime: Backend, model: Artifact) -> None:
    with runtime.open(model, SessionOptions()) as session:
        assert session.inputs == model.inputs
        assert [s.name for s in session.outputs] == ["logits"]


@each
def test_agrees_with_pytorch_on_real_data(
    runtime: Backend, model: Artifact, teacher: Artifact, evaluation: Dataset
) -> None:
    sample = evaluation.first(100)
    with open_session(teacher, "pytorch") as one, runtime.open(model, SessionOptions()) as other:
        want, have = collect(one, sample)[0]["logits"], collect(other, sample)[0]["logits"]
    # OpenVINO computes in bfloat16 where the CPU has it.
    np.testing.assert_allclose(have, want, atol=0.02 * np.abs(want).max())
    assert (have.argmax(1) == want.argmax(1)).mean() > 0.97


@pytest.mark.parametrize(
    "name", [b.name for b in BACKENDS if b.name != "ort-cpu" and "engine" not in b.formats]
)
def test_the_others_refuse_to_simulate(
    name: str, teacher: Artifact, teacher_onnx: Artifact
) -> None:
    model = teacher if "torch" in backend(name).formats else teacher_onnx
    with pytest.raises(UsageError, match=f"{name} cannot simulate integers") as caught:
        open_session(model, name, SessionOptions(simulate=True))
    assert caught.value.hint == "ort-cpu can"


@each
@pytest.mark.parametrize("size", [1, 3, 64])
def test_takes_any_batch(runtime: Backend, model: Artifact, evaluation: Dataset, size: int) -> None:
    batch = next(evaluation.batches(size))[0]
    with runtime.open(model, SessionOptions()) as session:
        assert session.run(batch)["logits"].shape == (size, 10)


@each
def test_two_runs_agree_and_leave_the_feed_as_it_is(
    runtime: Backend, model: Artifact, feed: dict[str, np.ndarray]
) -> None:
    before = feed["images"].copy()
    with runtime.open(model, SessionOptions(threads=2)) as session:
        first = session.run(feed)["logits"]
        kept = first.copy()
        second = session.run({"images": feed["images"][::-1].copy()})["logits"]
        np.testing.assert_array_equal(first, kept)  # outputs are the caller's own
        np.testing.assert_allclose(second[::-1], first, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(feed["images"], before)


@each
def test_prepare_returns_something_to_call_many_times(
    runtime: Backend, model: Artifact, feed: dict[str, np.ndarray]
) -> None:
    with runtime.open(model, SessionOptions()) as session:
        call = session.prepare(feed)
        for _ in range(3):
            call()


@each
def test_says_what_ran(runtime: Backend, model: Artifact, feed: dict[str, np.ndarray]) -> None:
    with runtime.open(model, SessionOptions()) as session:
        placement = session.placement(feed)
    assert ("tensorrt" if "engine" in runtime.formats else "CPU") in placement.provider
    assert sum(placement.precisions.values()) >= 10
    assert set(placement.precisions) <= {"fp32", "bf16", "int8", "integer", "none"}
    assert placement.precisions.get("int8", 0) == 0  # nothing here is quantized


@each
def test_says_how_long_each_kernel_takes(
    runtime: Backend, model: Artifact, feed: dict[str, np.ndarray]
) -> None:
    with runtime.open(model, SessionOptions()) as session:
        call = session.prepare(feed)
        call()
        kernels = session.kernels(feed, 10)
        native = "bf16" if session.placement(feed).precisions.get("bf16") else "fp32"
        started = time.perf_counter()
        for _ in range(10):
            call()
        run_us = (time.perf_counter() - started) * 1e5
    convolutions = [k for k in kernels if k.operator.startswith("Conv")]
    assert len(convolutions) == 13
    assert all(k.precision == native and "CPU" in k.provider for k in convolutions)
    assert all(k.names and k.microseconds > 0 for k in convolutions)
    assert 0.2 * run_us < sum(k.microseconds for k in kernels) < 5 * run_us  # a busy machine


@each
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({}, "'images' is missing"),
        ({"pixels": np.zeros((1, 1, 28, 28), np.float32)}, "images"),
        ({"images": np.zeros((1, 1, 28, 28), np.float64)}, "dtype is float64"),
        ({"images": np.zeros((1, 28, 28), np.float32)}, "shape is (1, 28, 28)"),
        ({"images": np.zeros((1, 1, 28, 29), np.float32)}, "shape is (1, 1, 28, 29)"),
    ],
)
def test_refuses_a_feed_by_the_name_of_the_input(
    runtime: Backend, model: Artifact, wrong: dict[str, np.ndarray], told: str
) -> None:
    with runtime.open(model, SessionOptions()) as session, pytest.raises(InputError) as caught:
        session.run(wrong)
    assert told in str(caught.value)


@each
def test_refuses_another_format_by_name(
    runtime: Backend, model: Artifact, teacher: Artifact, teacher_onnx: Artifact
) -> None:
    del model
    other = teacher_onnx if "torch" in runtime.formats else teacher
    with pytest.raises(UsageError, match=runtime.name):
        open_session(other, runtime.name)


@each
def test_says_why_it_is_unavailable(runtime: Backend) -> None:
    """In a Python that finds none of the heavy libraries."""
    code = (
        "import sys, importlib.abc\n"
        "class Hide(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'onnxruntime', 'openvino') or "
        "name.startswith('tensorrt'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "from deploykit.backends import backend\n"
        f"print(backend({runtime.name!r}).unavailable())\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "is not installed: pip install" in told.stdout


@pytest.mark.parametrize(
    "runtime", [b for b in BACKENDS if "onnx" in b.formats], ids=lambda b: b.name
)
def test_shows_int8_where_int8_ran(
    runtime: Backend, model: Artifact, teacher_int8: Artifact, feed: dict[str, np.ndarray]
) -> None:
    del model
    with runtime.open(teacher_int8, SessionOptions()) as session:
        assert session.placement(feed).precisions["int8"] >= 13  # every convolution


@pytest.mark.parametrize(
    "runtime", [b for b in BACKENDS if "onnx" in b.formats], ids=lambda b: b.name
)
def test_refuses_a_broken_model_as_bad_input(
    runtime: Backend, model: Artifact, tmp_path: object
) -> None:
    path = model.path.with_name("broken.onnx")
    path.write_bytes(model.path.read_bytes()[: -len(model.path.read_bytes()) // 3])
    broken = model.model_copy(update={"path": path})
    with pytest.raises(InputError, match="does not load it"):
        runtime.open(broken, SessionOptions())


def test_an_unknown_backend_is_told_what_was_meant() -> None:
    with pytest.raises(UsageError) as caught:
        backend("ort-cp")
    assert caught.value.hint == "did you mean 'ort-cpu'?"


@pytest.mark.skipif(gpu.unavailable() is None, reason="there is a GPU")
@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_without_a_gpu_is_told_in_one_sentence(
    teacher_onnx: Artifact, flavour: str
) -> None:
    record = teacher_onnx.history[-1].model_copy(update={"facts": {"flavour": flavour}})
    engine = teacher_onnx.model_copy(update={"format": "engine", "history": (record,)})
    assert available("engine") == ()
    with pytest.raises(MissingError, match=f"no backend for engine .* here \\({flavour}: ") as told:
        open_session(engine)
    assert told.value.exit_code == 4
