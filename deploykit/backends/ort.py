"""ONNX Runtime: its CPU provider, and those for NVIDIA GPUs, which have not run on a GPU yet."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from deploykit import _files, gpu
from deploykit._lazy import needs
from deploykit.backends._common import check_feed, missing_library, refused, running
from deploykit.environment import versions
from deploykit.errors import MissingError
from deploykit.session import Closing
from deploykit.values import Array, Artifact, Feed, Format, Kernel, Placement, SessionOptions

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_MADE_UP = re.compile(r"^fused |(/\w+Fusion/?|_token_\d+|_nchwc)*_kernel_time$")
"""What ONNX Runtime puts around the name of the node, or of the tensor, that a kernel is for."""
_TYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"}


class OrtCpu:
    """Backend for ONNX files on ONNX Runtime's CPU provider."""

    name = "ort-cpu"
    formats: frozenset[Format] = frozenset({"onnx"})

    def unavailable(self) -> str | None:
        """Why ONNX Runtime cannot run here, or None."""
        return missing_library("onnxruntime")

    def open(self, artifact: Artifact, options: SessionOptions) -> OrtSession:
        """Create an inference session, with all graph optimizations unless it is to simulate."""
        return OrtSession(artifact, options, CPU)


class OrtGpu:
    """Backend for ONNX files on one of ONNX Runtime's providers for NVIDIA GPUs.

    The CPU provider takes what the other does not: `placement` says which nodes, and a session
    that would run on the CPU altogether is refused.
    """

    formats: frozenset[Format] = frozenset({"onnx"})

    def __init__(self, name: str, provider: str) -> None:
        self.name, self._provider = name, provider

    def unavailable(self) -> str | None:
        """Why the provider cannot run here, or None."""
        if reason := missing_library("onnxruntime"):
            return reason
        if not versions(("onnxruntime-gpu",)):
            return (
                "the onnxruntime here is built for the CPU: pip uninstall onnxruntime, then "
                "pip install 'deploykit[gpu]'"
            )
        needs_tensorrt = self._provider == TENSORRT
        return gpu.unavailable() or (missing_library("tensorrt") if needs_tensorrt else None)

    def open(self, artifact: Artifact, options: SessionOptions) -> OrtSession:
        """Create an inference session. Raises MissingError: the provider does not come up."""
        return OrtSession(artifact, options, self._provider)


class OrtSession(Closing):
    """An InferenceSession on one provider, with fixed threads."""

    def __init__(self, artifact: Artifact, options: SessionOptions, provider: str) -> None:
        self.inputs, self.outputs = artifact.inputs, artifact.outputs
        self._artifact, self._options, self._provider = artifact, options, provider
        self._opened: Any = _session(artifact, options, provider)
        self._names = [spec.name for spec in self.outputs]

    def run(self, feed: Feed) -> dict[str, Array]:
        """Run one batch."""
        call = self.prepare(feed)
        with running(self._artifact, "ONNX Runtime"):
            return dict(zip(self._names, call(), strict=True))

    def prepare(self, feed: Feed) -> Callable[[], list[Array]]:
        """Make the arrays contiguous once; each call runs the session on them."""
        check_feed(feed, self.inputs)
        arrays = {name: np.ascontiguousarray(array) for name, array in feed.items()}
        run, names = self._live().run, self._names

        def call() -> list[Array]:
            result: list[Array] = run(names, arrays)
            return result

        return call

    def placement(self, feed: Feed) -> Placement:
        """Run the feed once under ONNX Runtime's profiler and read its account."""
        nodes = [event["args"] for event in self._profile(feed, 1)]
        return Placement(
            provider=self._provider,
            providers=dict(Counter(str(args["provider"]) for args in nodes).most_common()),
            precisions=dict(Counter(_precision(args) for args in nodes).most_common()),
            detail={"operators": dict(Counter(args["op_name"] for args in nodes).most_common())},
        )

    def kernels(self, feed: Feed, runs: int) -> tuple[Kernel, ...]:
        """Median times; ONNX Runtime's profile counts whole microseconds."""
        times: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for event in self._profile(feed, runs):
            args = event["args"]
            key = event["name"], args["op_name"], _precision(args), args["provider"]
            times[key].append(event["dur"])
        return tuple(
            Kernel(
                names=(_MADE_UP.sub("", name),),
                operator=operator,
                microseconds=median(each) * len(each) / runs,
                precision=precision,
                provider=provider,
            )
            for (name, operator, precision, provider), each in times.items()
        )

    def _live(self) -> Any:
        """The session; opened again where it was closed for another to fit."""
        if self._opened is None:
            self._opened = _session(self._artifact, self._options, self._provider)
        return self._opened

    def _profile(self, feed: Feed, runs: int) -> list[dict[str, Any]]:
        """What ONNX Runtime's profiler tells of each kernel in each run."""
        if self._artifact.weights:  # too large to be there twice
            self._opened = None
        with _files.scratch() as folder:
            session = _session(
                self._artifact, self._options, self._provider, profile=folder / "profile"
            )
            for _ in range(runs):
                session.run(self._names, dict(feed))
            events = json.loads(Path(session.end_profiling()).read_text())
        return [e for e in events if e.get("cat") == "Node" and "provider" in e.get("args", {})]

    def close(self) -> None:
        """Let go of the session."""
        del self._opened


def _session(
    artifact: Artifact, options: SessionOptions, provider: str, profile: Path | None = None
) -> Any:
    with needs("onnxruntime"):
        import onnxruntime as ort
    if provider not in ort.get_available_providers():
        raise _absent(artifact, provider, ort.get_available_providers())
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    if options.simulate:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    elif artifact.precision == "fp8":  # beyond this it drops every Relu before a QuantizeLinear
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if profile:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(profile)
    try:
        session = ort.InferenceSession(
            str(artifact.path), settings, providers=_providers(provider, artifact.precision)
        )
    except Exception as error:  # the runtime's exceptions share no base
        raise refused(artifact, "ONNX Runtime", error) from error
    if session.get_providers()[0] != provider:
        raise _absent(artifact, provider, session.get_providers())
    return session


def _absent(artifact: Artifact, provider: str, found: list[str]) -> MissingError:
    return MissingError(
        f"{artifact.path}: asked for {provider}, ONNX Runtime gives {', '.join(found)}",
        hint="see `deploykit doctor`; ONNX Runtime's log on stderr says what it could not load",
    )


def _providers(provider: str, precision: str) -> list[Any]:
    """The provider and what may stand in for it, with its options.

    ONNX Runtime computes float32 in TF32 on a GPU unless it is told not to, and TensorRT takes
    reduced precision only where it is told to.
    """
    cuda = (CUDA, {"use_tf32": "0"})
    if provider == TENSORRT:
        allowed = {"fp16": "trt_fp16_enable", "bf16": "trt_bf16_enable", "int8": "trt_int8_enable"}
        options = {allowed[precision]: "1"} if precision in allowed else {}
        return [(TENSORRT, options), cuda, CPU]
    return [cuda, CPU] if provider == CUDA else [CPU]


def _precision(args: dict[str, Any]) -> str:
    """Precision of a node in the profile: the lowest among its tensors' types.

    MatMulNBits is what becomes of int4 weights; the profile hides the types of packed weights.
    """
    if args["provider"] == TENSORRT:
        return "unknown"  # one node is a whole engine, and says only what goes in and out
    if args["op_name"] == "MatMulNBits":
        return "int4"
    tensors = [*args.get("input_type_shape", ()), *args.get("output_type_shape", ())]
    found = {_TYPES.get(name, "integer") for tensor in tensors for name in tensor}
    order = ("int8", "fp16", "bf16", "fp32", "integer")
    return next((name for name in order if name in found), "none")
