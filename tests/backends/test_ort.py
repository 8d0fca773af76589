from __future__ import annotations

import pytest

from deploykit.backends import backend, open_session, ort
from deploykit.errors import MissingError
from deploykit.values import Artifact, SessionOptions

GPU = ("ort-cuda", "ort-tensorrt")


@pytest.fixture(autouse=True)
def _needs_onnxruntime() -> None:
    if reason := backend("ort-cpu").unavailable():
        pytest.skip(reason)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_threads_are_those_asked_for(teacher_onnx: Artifact, threads: int) -> None:
    with open_session(teacher_onnx, "ort-cpu", SessionOptions(threads=threads)) as session:
        settings = session._opened.get_session_options()
    assert (settings.intra_op_num_threads, settings.inter_op_num_threads) == (threads, 1)


@pytest.mark.parametrize("name", GPU)
def test_a_provider_that_does_not_come_up_is_no_silent_cpu(
    teacher_onnx: Artifact, name: str
) -> None:
    """ONNX Runtime would open the session on the CPU with a warning."""
    import onnxruntime

    runtime = backend(name)
    if runtime._provider in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the provider")
    with pytest.raises(MissingError, match=f"asked for {runtime._provider}, ONNX Runtime gives"):
        runtime.open(teacher_onnx, SessionOptions())


@pytest.mark.parametrize("name", GPU)
def test_a_provider_that_is_listed_and_fails_is_no_silent_cpu(
    teacher_onnx: Artifact, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    runtime = backend(name)
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [runtime._provider])
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda *a, **named: real(*a, providers=[ort.CPU])
    )
    with pytest.raises(MissingError, match="ONNX Runtime gives CPUExecutionProvider"):
        runtime.open(teacher_onnx, SessionOptions())


@pytest.mark.parametrize("name", GPU)
def test_each_reason_is_told_in_turn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = backend(name)
    monkeypatch.setattr(ort, "versions", lambda names: {})
    assert "is built for the CPU" in runtime.unavailable()
    monkeypatch.setattr(ort, "versions", lambda names: {"onnxruntime-gpu": "1"})
    monkeypatch.setattr(ort.gpu, "unavailable", lambda: "no driver")
    assert runtime.unavailable() == "no driver"
    monkeypatch.setattr(ort.gpu, "unavailable", lambda: None)
    monkeypatch.setattr(ort, "missing_library", lambda name: None)
    assert runtime.unavailable() is None


def test_float32_is_not_tf32_and_reduced_precision_is_as_the_file_says() -> None:
    assert ort._providers(ort.CUDA, "fp32") == [(ort.CUDA, {"use_tf32": "0"}), ort.CPU]
    tensorrt = ort._providers(ort.TENSORRT, "int8")
    assert tensorrt[0] == (ort.TENSORRT, {"trt_int8_enable": "1"})
    assert ort._providers(ort.TENSORRT, "fp32")[0] == (ort.TENSORRT, {})
