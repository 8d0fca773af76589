"""The session on a fake GPU (`fake_gpu.py`), and on a real one where there is one."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploykit import gpu
from deploykit.backends import _cuda, open_session
from deploykit.backends._cuda import Cuda
from deploykit.backends._cuda_pycuda import PyCuda
from deploykit.backends._cuda_python import CudaPython
from deploykit.backends.tensorrt import TensorRtSession
from deploykit.dataset import Dataset
from deploykit.errors import InputError, MissingError, ResourceError, UsageError
from deploykit.stages.build import BuildOptions, build, unavailable
from deploykit.values import Artifact, SessionOptions, StageRecord, TensorSpec
from tests.backends import fake_gpu
from tests.backends.fake_gpu import BROKEN, DOUBLE, NONZERO, Memory

LIBRARIES = {"pycuda": PyCuda, "cuda-python": CudaPython}


def engine(shape: tuple[Any, ...] = ("n", 3)) -> Artifact:
    record = StageRecord(
        stage="build", options={}, facts={"flavour": "tensorrt"}, inputs={}, versions={},
        seconds=0, key="k",
    )  # fmt: skip
    return Artifact(
        path=Path("fake.engine"), format="engine", precision="int8", sha256="0" * 64,
        inputs=(TensorSpec(name="x", dtype="float32", shape=shape),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=shape),), history=(record,),
    )  # fmt: skip


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture(params=LIBRARIES)
def cuda(request: pytest.FixtureRequest, memory: Memory, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """Each of the two libraries over the fake's memory."""
    driver, runtime = fake_gpu.pycuda_driver(memory), fake_gpu.cuda_runtime(memory)
    modules = {
        "pycuda": SimpleNamespace(driver=driver), "pycuda.driver": driver,
        "cuda": SimpleNamespace(), "cuda.bindings": SimpleNamespace(runtime=runtime),
        "cuda.bindings.runtime": runtime,
    }  # fmt: skip
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    made: Cuda = LIBRARIES[request.param]()
    return made


def session(cuda: Cuda, plan: bytes = DOUBLE, **options: object) -> TensorRtSession:
    asked = SessionOptions.model_validate(options)
    return TensorRtSession(engine(), asked, trt=fake_gpu.tensorrt(), cuda=cuda, plan=plan)


def feed(samples: int) -> dict[str, np.ndarray]:
    values = np.random.default_rng(samples).normal(size=(samples, 3))
    return {"x": values.astype(np.float32)}


def test_runs_batches_of_any_size_and_gives_copies(cuda: Cuda, memory: Memory) -> None:
    with session(cuda) as opened:
        first = opened.run(feed(2))["y"]
        kept = first.copy()
        for size in (1, 64, 2, 5, 7, 9, 2):
            np.testing.assert_array_equal(opened.run(feed(size))["y"], 2 * feed(size)["x"])
        np.testing.assert_array_equal(first, kept)
        assert len(opened._buffers) <= 4
    assert isinstance(cuda, PyCuda) is (cuda.name == "pycuda")
    if cuda.name == "pycuda":
        assert not memory.blocks  # nothing of the device's memory is left


def test_what_is_prepared_stays_while_others_run(cuda: Cuda) -> None:
    with session(cuda) as opened:
        calls = {size: opened.prepare(feed(size)) for size in range(1, 12)}
        for size in range(20, 30):
            opened.run(feed(size))
        for size, call in calls.items():
            np.testing.assert_array_equal(call()["y"], 2 * feed(size)["x"])


def test_two_feeds_of_a_shape_are_prepared_apart(cuda: Cuda) -> None:
    with session(cuda) as opened:
        one, other = feed(2), {"x": -feed(2)["x"]}
        first, second = opened.prepare(one), opened.prepare(other)
        second()
        np.testing.assert_array_equal(first()["y"], 2 * one["x"])
        np.testing.assert_array_equal(second()["y"], 2 * other["x"])


def test_an_output_whose_size_depends_on_the_data(cuda: Cuda) -> None:
    with session(cuda, NONZERO) as opened:
        for size in (1, 8, 3):
            x = feed(size)["x"]
            np.testing.assert_array_equal(opened.run({"x": x})["y"], x[x > 0])
        nothing = np.full((2, 3), -1, np.float32)
        assert opened.run({"x": nothing})["y"].shape == (0,)


def test_the_profile_made_for_the_shape_is_taken(cuda: Cuda) -> None:
    with session(cuda) as opened:
        for size in (16, 1, 3, 5):
            opened.run(feed(size))
        assert [c.profile for c in opened._engine.contexts] == [1, 0, 0, 1]


def test_a_shape_outside_every_profile_is_told(cuda: Cuda) -> None:
    with session(cuda) as opened, pytest.raises(InputError) as caught:
        opened.run(feed(65))
    assert str(caught.value) == "input 'x' is 65x3, the engine takes 1x3 to 4x3 or 1x3 to 64x3"
    assert "--max-shapes" in caught.value.hint


def test_memory_that_is_not_there_is_told(cuda: Cuda, memory: Memory) -> None:
    with session(cuda) as opened:
        memory.limit = 16
        with pytest.raises(ResourceError, match=r"the GPU has no (24|768|\d+) bytes of memory"):
            cuda.allocate(24)
        memory.limit = 1 << 20
        opened.run(feed(1))


def test_a_plan_that_does_not_load_is_told(cuda: Cuda) -> None:
    with pytest.raises(InputError, match=r"does not load it: Magic tag does not match$"):
        session(cuda, BROKEN)


def test_says_what_ran(cuda: Cuda) -> None:
    with session(cuda) as opened:
        placement = opened.placement(feed(2))
        (kernel,) = opened.kernels(feed(2), 3)
    assert placement.provider == f"tensorrt 0.fake by {cuda.name}"
    assert placement.precisions == {"int8": 1}
    assert kernel.microseconds == 250


def test_events(cuda: Cuda) -> None:
    start = cuda.record()
    assert cuda.milliseconds(start, cuda.record()) == 0.5


def test_no_graph_holds_an_output_of_unknown_size(cuda: Cuda) -> None:
    with (
        session(cuda, NONZERO, cuda_graph=True) as opened,
        pytest.raises(InputError, match="no CUDA graph can hold"),
    ):
        opened.prepare(feed(2))


def test_a_graph_is_captured_once_and_launched(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a fake driver: it notes what is called, and the captured work is run at launch."""
    work: list[Any] = []

    class FakeGraph:
        def __init__(self, stream: int, captured: Any) -> None:
            assert stream == fake_gpu.STREAM
            work.append(captured)
            self.launch, self.close = captured, lambda: None

    monkeypatch.setattr("deploykit.backends.tensorrt.Graph", FakeGraph)
    with session(cuda, cuda_graph=True) as opened:
        call = opened.prepare(feed(2))
        for _ in range(3):
            np.testing.assert_array_equal(call()["y"], 2 * feed(2)["x"])
    assert len(work) == 1


@pytest.mark.skipif(gpu.unavailable() is None, reason="there is a GPU")
def test_without_a_driver_one_sentence_and_no_crash(teacher_onnx: Artifact, tmp_path: Path) -> None:
    if reason := unavailable():
        pytest.skip(reason)
    options = BuildOptions(opt_shapes=("images:1x1x28x28",))
    made = build(teacher_onnx, options, out=tmp_path / "m.engine")
    with pytest.raises(MissingError, match="no NVIDIA driver on this machine") as caught:
        open_session(made)
    assert caught.value.exit_code == 4
    with pytest.raises(MissingError, match="no NVIDIA driver"):
        _cuda.connect()


def test_only_engines_have_graphs(teacher_onnx: Artifact) -> None:
    with pytest.raises(UsageError, match="ort-cpu has no CUDA graphs"):
        open_session(teacher_onnx, "ort-cpu", SessionOptions(cuda_graph=True))


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_a_real_engine_agrees_with_onnx_runtime(
    teacher_onnx: Artifact, evaluation: Dataset, tmp_path: Path, graph: bool
) -> None:
    """Not run by anybody yet: it needs a GPU, its driver, and one of the two libraries."""
    options = BuildOptions(
        min_shapes=("images:1x1x28x28",), opt_shapes=("images:8x1x28x28",),
        max_shapes=("images:64x1x28x28",), tf32=False,
    )  # fmt: skip
    made = build(teacher_onnx, options, out=tmp_path / "m.engine")
    batch = next(evaluation.batches(8))[0]
    with (
        open_session(made, None, SessionOptions(cuda_graph=graph)) as ours,
        open_session(teacher_onnx, "ort-cpu") as theirs,
    ):
        want = theirs.run(batch)["logits"]
        np.testing.assert_allclose(ours.run(batch)["logits"], want, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(ours.prepare(batch)()["logits"], want, rtol=1e-3, atol=1e-3)
        assert sum(ours.placement(batch).precisions.values()) > 0
