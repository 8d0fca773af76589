"""Build a TensorRT engine from ONNX: strongly typed, so precision is what the file says."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from deploykit import store
from deploykit._lazy import installed
from deploykit.errors import InputError, MissingError, StageError, UsageError, did_you_mean
from deploykit.formats import onnx_file
from deploykit.stages.build.account import check_precision, layer_kind, quantized_layers
from deploykit.stages.build.options import BuildOptions, Flavour
from deploykit.stages.build.profiles import Profile, shape_profile
from deploykit.store import Job, Made
from deploykit.values import Artifact, Json, Precision, TensorSpec, Value

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
__all__ = ["INSTALL", "BuildOptions", "build", "shape_profile", "unavailable"]

LIBRARIES = ("tensorrt", "tensorrt-rtx-cu13", "onnx")
PORTABLE_FROM, FP8_FROM = 80, 89
"""Compute capabilities, times ten: what a portable engine is for, and what computes in FP8."""
INSTALL = (
    "pip install 'deploykit[tensorrt-rtx]' (builds without a GPU), or 'deploykit[tensorrt]' "
    "with the vendor's package index on a GPU host"
)


def unavailable(flavour: Flavour = "auto") -> str | None:
    """Why no engine can be built here, or None; nothing is imported."""
    names = list(MODULES) if flavour == "auto" else [flavour]
    if any(installed(MODULES[name]) for name in names):
        return None
    verb = "are" if len(names) > 1 else "is"
    return f"{' and '.join(names)} {verb} not installed"


def build(source: Artifact, options: BuildOptions, *, out: Path, force: bool = False) -> Artifact:
    """Parse an ONNX model and build a serialized engine.

    Raises InputError: no ONNX model. MissingError: neither TensorRT flavour is installed.
    UsageError: a dynamic input without shapes, or a shape that does not fit. StageError: the
    parser or the builder refuses the model.
    """
    if source.format != "onnx":
        raise InputError(
            f"{source.path} is {source.format}, build takes an ONNX model", hint="export it first"
        )
    if reason := unavailable(options.flavour):
        raise MissingError(f"no engine can be built here: {reason}", hint=INSTALL)
    profile = shape_profile(source.inputs, options)
    flavour = next(
        name
        for name, module in MODULES.items()
        if options.flavour in ("auto", name) and installed(module)
    )

    def work(path: Path) -> Made:
        onnx_file.read(source.path)
        trt = importlib.import_module(MODULES[flavour])
        plan, facts = _build(trt, flavour, source, options, profile)
        path.write_bytes(plan)
        return Made(
            format="engine",
            precision=source.precision,
            inputs=source.inputs,
            outputs=source.outputs,
            facts=facts,
        )

    job = Job(stage="build", source=source, options=options, libraries=LIBRARIES)
    return store.produce(job, work, out=out, force=force)


def _build(
    trt: Any, flavour: str, source: Artifact, options: BuildOptions, profile: Profile
) -> tuple[bytes, Json]:
    """The serialized engine and the facts of its network."""
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source.path)):
        raise _refused(parser, source)
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    capabilities = _set_capabilities(trt, flavour, config, options.gpu, source.precision)
    if profile:
        shapes = builder.create_optimization_profile()
        for name, (low, best, high) in profile.items():
            shapes.set_shape(name, low, best, high)
        config.add_optimization_profile(shapes)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise StageError(
            f"{flavour} cannot build {source.path}: {log.last or 'no reason given'}",
            hint="check the shapes; --opt-shapes must be ones that the model really takes",
        )
    layers = Counter(layer_kind(network.get_layer(i)) for i in range(network.num_layers))
    facts: Json = {
        "flavour": flavour,
        "flavour_version": trt.__version__,
        "compute_capabilities": capabilities,
        "profile": {name: [list(s) for s in shapes] for name, shapes in profile.items()},
        "network_layers": dict(layers.most_common()),
        **quantized_layers(network),
        "ran_on_gpu": False,
    }
    check_precision(source.precision, facts["network_layers"])
    return bytes(plan), facts


def _set_capabilities(
    trt: Any, flavour: str, config: Any, gpus: tuple[str, ...], precision: Precision
) -> list[str]:
    """Target compute capabilities, a matter of TensorRT-RTX only. Raises UsageError."""
    least = FP8_FROM if precision == "fp8" else PORTABLE_FROM
    if not gpus:
        return (
            [f"portable, sm{least} and newer"] if flavour == "tensorrt-rtx" else ["this machine's"]
        )
    if flavour != "tensorrt-rtx":
        raise UsageError(
            "tensorrt builds for the GPU of this machine only",
            hint="leave --gpu out, or use --flavour tensorrt-rtx",
        )
    known = {n.lower(): v for n, v in trt.ComputeCapability.__members__.items() if n[-1].isdigit()}
    config.num_compute_capabilities = len(gpus)
    for index, gpu in enumerate(gpus):
        if gpu not in known:
            raise UsageError(f"unknown compute capability {gpu!r}", hint=did_you_mean(gpu, known))
        if precision == "fp8" and int(gpu[2:]) < FP8_FROM:
            raise UsageError(
                f"{gpu} has no FP8, GPUs have it from sm{FP8_FROM} on",
                hint=f"leave {gpu} out, or quantize with --precision int8",
            )
        if not config.set_compute_capability(known[gpu], index):
            raise UsageError(f"{flavour} does not build for {gpu}", hint="leave it out")
    return list(gpus)


def _refused(parser: Any, source: Artifact) -> StageError:
    error = parser.get_error(0) if parser.num_errors else None
    where = f" at node {error.node_name() or error.node()!r}" if error else ""
    text = str(error.desc()) if error else "no reason given"
    quantized = source.precision in ("int8", "fp8", "int4")
    return StageError(
        f"TensorRT's parser refuses {source.path}{where}: {text.splitlines()[0]}",
        hint="quantize with --target tensorrt: it takes symmetric int8 and a float bias only"
        if quantized
        else "export with another opset, or leave out what it names",
    )


def _logger(trt: Any) -> Any:
    """A logger that keeps the last error: TensorRT reports by None and the log, not by raising."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.last = message.splitlines()[0]

    return Logger()
