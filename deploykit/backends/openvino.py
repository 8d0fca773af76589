"""OpenVINO on the CPU. It chooses native bfloat16 by itself where the CPU has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from deploykit._lazy import needs
from deploykit.backends._common import check_feed, missing_library, refused, running
from deploykit.session import Closing
from deploykit.values import Array, Artifact, Feed, Format, Kernel, Placement, SessionOptions

_TYPES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8", "i4": "int4"}
_MADE_UP = ("/DequantizationMultiply", "/WithoutBiases")
"""What OpenVINO puts behind the name of a node that it takes apart."""
_NO_WORK = frozenset({"Parameter", "Input", "Result", "Output", "Constant", "Const"})


class OpenVino:
    """Backend for ONNX files on OpenVINO's CPU plugin."""

    name = "openvino"
    formats: frozenset[Format] = frozenset({"onnx"})

    def unavailable(self) -> str | None:
        """Why OpenVINO cannot run here, or None."""
        return missing_library("openvino")

    def open(self, artifact: Artifact, options: SessionOptions) -> OpenVinoSession:
        """Compile the model for latency, in one stream."""
        return OpenVinoSession(artifact, options)


class OpenVinoSession(Closing):
    """A compiled model and one inference request."""

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        self.inputs, self.outputs = artifact.inputs, artifact.outputs
        self._artifact, self._options = artifact, options
        self._compiled = _compiled(artifact, options)
        self._request = self._compiled.create_infer_request()

    def run(self, feed: Feed) -> dict[str, Array]:
        """Run one batch; the outputs are copies."""
        call = self.prepare(feed)
        with running(self._artifact, "OpenVINO"):
            call()
            return {s.name: self._request.get_tensor(s.name).data.copy() for s in self.outputs}

    def prepare(self, feed: Feed) -> Callable[[], object]:
        """Make the arrays contiguous once; each call infers on them in place."""
        check_feed(feed, self.inputs)
        arrays = {name: np.ascontiguousarray(array) for name, array in feed.items()}
        infer = self._request.infer

        def call() -> object:
            return infer(arrays, share_inputs=True, share_outputs=True)

        return call

    def placement(self, feed: Feed) -> Placement:
        """Read the precision of every node from the execution graph."""
        self.prepare(feed)()
        counts: Counter[str] = Counter()
        for node in self._compiled.get_runtime_model().get_ops():
            info = node.get_rt_info()
            kind, precision = (_text(info, key) for key in ("layerType", "runtimePrecision"))
            if kind not in _NO_WORK and precision:
                counts[_TYPES.get(precision, "integer")] += 1
        return Placement(provider="CPU", precisions=dict(counts.most_common()))

    def kernels(self, feed: Feed, runs: int) -> tuple[Kernel, ...]:
        """Mean times, without the first run's; OpenVINO counts whole microseconds."""
        compiled = _compiled(self._artifact, self._options, profile=True)
        request = compiled.create_infer_request()
        request.infer(dict(feed))
        first = _told(compiled)
        for _ in range(runs):
            request.infer(dict(feed))
        return tuple(
            Kernel(
                names=names,
                operator=kind,
                microseconds=max(0.0, (mean * (runs + 1) - first[key]) / runs),
                precision=precision,
                provider="CPU",
            )
            for key, mean in _told(compiled).items()
            for names, kind, precision in [key]
        )

    def close(self) -> None:
        """Let go of the compiled model."""
        del self._request, self._compiled


def _compiled(artifact: Artifact, options: SessionOptions, *, profile: bool = False) -> Any:
    with needs("openvino"):
        import openvino
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": options.threads,
        "NUM_STREAMS": 1,
        "PERF_COUNT": profile,
    }
    try:
        return openvino.Core().compile_model(str(artifact.path), "CPU", settings)
    except Exception as error:  # the runtime's exceptions share no base
        raise refused(artifact, "OpenVINO", error) from error


def _told(compiled: Any) -> dict[tuple[tuple[str, ...], str, str], float]:
    """Mean microseconds over all runs so far, by a kernel's nodes, its kind and its precision."""
    found: dict[tuple[tuple[str, ...], str, str], float] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, time = _text(info, "layerType"), _text(info, "execTimeMcs")
        if kind in _NO_WORK or not time.isdigit():
            continue
        names = _text(info, "originalLayersNames") or node.get_friendly_name()
        plain = tuple(dict.fromkeys(map(_plain, names.split(","))))
        precision = _text(info, "runtimePrecision")
        found[plain, kind, _TYPES.get(precision, "integer")] = float(time)
    return found


def _plain(name: str) -> str:
    """The name without what OpenVINO put behind it."""
    for end in _MADE_UP:
        name = name.removesuffix(end)
    return name


def _text(info: Any, key: str) -> str:
    return str(info[key].value) if key in info else ""
