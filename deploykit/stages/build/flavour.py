"""TensorRT and TensorRT for RTX behind one name: which is there, and what it lacks."""

from __future__ import annotations

from deploykit import gpu
from deploykit._lazy import installed
from deploykit._tensorrt import MODULES
from deploykit.errors import MissingError, UsageError
from deploykit.stages.build.options import BuildOptions, Flavour

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


def chosen(options: BuildOptions) -> str:
    """The flavour to build with; auto prefers TensorRT where there is a GPU for it.

    Raises MissingError: it is not installed, or has no GPU.
    """
    if reason := unavailable(options.flavour):
        raise MissingError(f"no engine can be built here: {reason}", hint=INSTALL)
    without_gpu = gpu.unavailable()
    rtx_only = bool(options.gpu) or without_gpu is not None
    if options.flavour != "auto":
        name: str = options.flavour
    elif installed(MODULES["tensorrt-rtx"]) and (rtx_only or not installed(MODULES["tensorrt"])):
        name = "tensorrt-rtx"
    else:
        name = "tensorrt"
    if name == "tensorrt" and without_gpu:
        raise MissingError(
            f"tensorrt builds on a GPU only: {without_gpu}",
            hint="build on the GPU host, or with --flavour tensorrt-rtx, which needs none",
        )
    return name


def check(name: str, options: BuildOptions) -> None:
    """Say by name what the flavour lacks of what is asked. Raises UsageError, MissingError."""
    if name == "tensorrt" and options.gpu:
        raise UsageError(
            "tensorrt builds for the GPU of this machine only",
            hint="leave --gpu out, or use --flavour tensorrt-rtx",
        )
    if name != "tensorrt-rtx":
        return
    if options.timing_cache:
        raise UsageError(
            "tensorrt-rtx has no timing cache: it picks its kernels on the GPU, when it runs",
            hint="leave --timing-cache out, or use --flavour tensorrt",
        )
    if options.version_compatible:
        raise UsageError(
            "tensorrt-rtx has no version-compatible engines: it comes without the lean runtime",
            hint="leave --version-compatible out, and build again for each version",
        )
    if options.hardware_compatibility != "none":
        raise UsageError(
            "tensorrt-rtx has no --hardware-compatibility: it builds for the GPUs that are named",
            hint="leave it out: by default the engine is for sm80 and newer; or use --gpu",
        )
    without_gpu = gpu.unavailable()
    for flag, asked in (("--refit", options.refit), ("--strip-weights", options.strip_weights)):
        if asked and without_gpu:
            raise MissingError(
                f"tensorrt-rtx needs a GPU for {flag}: {without_gpu}",
                hint=f"leave {flag} out, or build on a GPU host",
            )
