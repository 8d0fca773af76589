"""The building process with a TensorRT that is none: which way it goes, not what it builds."""

from __future__ import annotations

import io
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from deploykit import gpu
from deploykit.errors import StageError
from deploykit.gpu import Gpu
from deploykit.stages.build import BuildOptions, account, worker
from deploykit.stages.build.exchange import Request
from deploykit.stages.build.worker import Channel
from deploykit.values import Json

HOPPER = Gpu(name="fake Hopper", compute_capability="sm90", memory_bytes=1)
PLAN = b"fake plan"


class FakeBuild:
    """A builder that gives PLAN for the GPUs it is asked for; counts what is deserialized."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, loads: bool) -> None:
        self.loaded: list[bytes] = []
        self.loads = loads
        parser = SimpleNamespace(parse_from_file=lambda path: True)
        trt = SimpleNamespace(
            __version__="0.fake",
            Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=self.deserialize),
            OnnxParser=lambda network, log: parser,
            NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=0),
            LayerInformationFormat=SimpleNamespace(JSON="json"),
        )
        builder = SimpleNamespace(
            get_plugin_registry=lambda: None,
            create_network=lambda flags: SimpleNamespace(),
            build_serialized_network=lambda network, config: PLAN,
        )
        log = SimpleNamespace(warnings=[], told=lambda: "engine is for another GPU")
        monkeypatch.setattr(worker.importlib, "import_module", lambda name: trt)
        monkeypatch.setattr(worker, "logger", lambda trt: log)
        monkeypatch.setattr(worker, "_builder", lambda trt, request, log: builder)
        monkeypatch.setattr(worker, "_monitor", lambda trt, channel: None)
        monkeypatch.setattr(worker, "configure", _configured)
        monkeypatch.setattr(account, "of_network", lambda *given: {"ran_on_gpu": False})
        monkeypatch.setattr(account, "check", lambda facts, request: None)

    def deserialize(self, plan: bytes) -> Any:
        self.loaded.append(plan)
        text = '{"Layers": [{"Name": "a", "LayerType": "gemm"}]}'
        inspector = SimpleNamespace(get_engine_information=lambda how: text)
        return SimpleNamespace(create_engine_inspector=lambda: inspector) if self.loads else None


def _configured(trt: Any, builder: Any, request: Request) -> tuple[Any, Json]:
    targets = list(request.options.gpu) or ["portable, sm80 and newer"]
    return SimpleNamespace(), {"compute_capabilities": targets}


def build(folder: Path, *gpus: str) -> Json:
    request = Request(
        onnx=folder / "m.onnx", plan=folder / "m.engine", module="tensorrt_rtx", precision="fp32",
        options=BuildOptions(gpu=gpus), profiles=(),
    )  # fmt: skip
    return worker.build(request, Channel(io.StringIO(), Event()))


@pytest.mark.parametrize(
    ("gpus", "device", "inspected"),
    [
        (("sm90",), HOPPER, True),
        (("sm120", "sm90"), HOPPER, True),
        ((), HOPPER, True),
        (("sm120",), HOPPER, False),
        (("sm86", "sm89"), HOPPER, False),
        (("sm90",), "no NVIDIA driver on this machine", False),
    ],
)
def test_only_an_engine_for_this_gpu_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: tuple[str, ...], device: Gpu | str,
    inspected: bool,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(gpu, "probe", lambda: device)
    fake = FakeBuild(monkeypatch, loads=True)
    facts = build(tmp_path, *gpus)
    assert facts["ran_on_gpu"] is inspected
    assert fake.loaded == [PLAN] * inspected
    assert (tmp_path / "m.engine").read_bytes() == PLAN
    assert len(facts["sealed"]) == 64


def test_an_engine_for_this_gpu_that_does_not_load_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(gpu, "probe", lambda: HOPPER)
    FakeBuild(monkeypatch, loads=False)
    with pytest.raises(StageError, match="does not load on the machine that built it: engine is"):
        build(tmp_path, "sm90")
