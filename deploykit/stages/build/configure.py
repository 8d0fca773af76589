"""From options to TensorRT's builder configuration; what this version lacks is said by name."""

from __future__ import annotations

from typing import Any

from deploykit import gpu
from deploykit.errors import UsageError, did_you_mean
from deploykit.stages.build.exchange import Request
from deploykit.values import Json, Precision

PORTABLE_FROM, FP8_FROM = 80, 89
"""Compute capabilities, times ten: what a portable engine is for, and what computes in FP8."""


def configure(trt: Any, builder: Any, request: Request) -> tuple[Any, Json]:
    """The configuration, and what of it is worth knowing later.

    Raises UsageError: this flavour or version has no such thing.
    """
    config, options = builder.create_builder_config(), request.options
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or no inspector tells precisions
    if options.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    for name, on in _flags(request).items():
        flag = member(trt, "BuilderFlag", name)
        (config.set_flag if on else config.clear_flag)(flag)
    if options.hardware_compatibility != "none":
        level = options.hardware_compatibility.upper().replace("-", "_")
        config.hardware_compatibility_level = member(trt, "HardwareCompatibilityLevel", level)
    tiling = options.tiling.upper()
    config.tiling_optimization_level = member(trt, "TilingOptimizationLevel", tiling)
    if options.plugins and options.version_compatible:
        config.plugins_to_serialize = list(options.plugins)
    capabilities = _capabilities(trt, config, request)
    _add_profiles(builder, config, request)
    return config, {
        "compute_capabilities": capabilities,
        "flags": _on(request),
        "hardware_compatibility": options.hardware_compatibility,
    }


def _flags(request: Request) -> dict[str, bool]:
    """Every flag that deploykit decides, by TensorRT's name."""
    options = request.options
    return {
        "TF32": options.tf32,
        "SPARSE_WEIGHTS": options.sparsity,
        "VERSION_COMPATIBLE": options.version_compatible,
        "WEIGHT_STREAMING": options.weight_streaming,
        "STRIP_PLAN": options.strip_weights,
        "REFIT": options.refit,
    }


def _on(request: Request) -> list[str]:
    return [name for name, on in _flags(request).items() if on]


def member(trt: Any, enum: str, name: str) -> Any:
    """A value of one of TensorRT's enumerations. Raises UsageError: this version has none."""
    known = getattr(trt, enum).__members__
    if name not in known:
        raise UsageError(
            f"{trt.__name__.replace('_', '-')} {trt.__version__} has no {enum}.{name}",
            hint="leave it out, or use another version",
        )
    return known[name]


def _add_profiles(builder: Any, config: Any, request: Request) -> None:
    for profile in request.profiles:
        shapes = builder.create_optimization_profile()
        for name, (low, best, high) in profile.items():
            shapes.set_shape(name, low, best, high)
        if config.add_optimization_profile(shapes) < 0:
            raise UsageError(
                f"TensorRT takes no profile of the shapes {profile}",
                hint="same rank, equal fixed dimensions, and min <= opt <= max",
            )


def _capabilities(trt: Any, config: Any, request: Request) -> list[str]:
    """Target compute capabilities: a choice in TensorRT-RTX only. Raises UsageError."""
    gpus, precision = request.options.gpu, request.precision
    if request.module == "tensorrt":
        found = gpu.probe()
        return [found] if isinstance(found, str) else [found.compute_capability]
    if not gpus:
        least = FP8_FROM if precision == "fp8" else PORTABLE_FROM
        return [f"portable, sm{least} and newer"]
    members = trt.ComputeCapability.__members__
    known = {name.lower(): value for name, value in members.items() if name[-1].isdigit()}
    config.num_compute_capabilities = len(gpus)
    for index, name in enumerate(gpus):
        _check_gpu(name, known, precision)
        if not config.set_compute_capability(known[name], index):
            raise UsageError(f"tensorrt-rtx does not build for {name}", hint="leave it out")
    return list(gpus)


def _check_gpu(name: str, known: dict[str, Any], precision: Precision) -> None:
    if name not in known:
        raise UsageError(f"unknown compute capability {name!r}", hint=did_you_mean(name, known))
    if precision == "fp8" and int(name[2:]) < FP8_FROM:
        raise UsageError(
            f"{name} has no FP8, GPUs have it from sm{FP8_FROM} on",
            hint=f"leave {name} out, or quantize with --precision int8",
        )
