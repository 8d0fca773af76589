"""OpenVINO on the CPU. It chooses native bfloat16 by itself where the CPU has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import numpy as np

from deploykit._lazy import needs
from deploykit.backends._common import check_feed, missing_library, refused
from deploykit.values import Array, Artifact, Feed, Format, Placement, SessionOptions

_TYPES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8", "i4": "int4"}
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


class OpenVinoSession:
    """A compiled model and one inference request."""

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        with needs("openvino"):
            import openvino
        self.inputs, self.outputs = artifact.inputs, artifact.outputs
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": options.threads,
            "NUM_STREAMS": 1,
        }
        try:
            self._compiled = openvino.Core().compile_model(str(artifact.path), "CPU", settings)
        except Exception as error:  # the runtime's exceptions share no base
            raise refused(artifact, "OpenVINO", error) from error
        self._request = self._compiled.create_infer_request()

    def run(self, feed: Feed) -> dict[str, Array]:
        """Run one batch; the outputs are copies."""
        self.prepare(feed)()
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del self._request, self._compiled


def _text(info: Any, key: str) -> str:
    return str(info[key].value) if key in info else ""
