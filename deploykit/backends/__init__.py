"""The runtimes that deploykit can run a model on."""

from __future__ import annotations

from deploykit.backends.openvino import OpenVino
from deploykit.backends.ort import CUDA, TENSORRT, OrtCpu, OrtGpu
from deploykit.backends.pytorch import PyTorch, PyTorchCompile
from deploykit.backends.tensorrt import TensorRt
from deploykit.errors import MissingError, UsageError, did_you_mean
from deploykit.session import Backend, Session
from deploykit.values import Artifact, Format, SessionOptions

BACKENDS: tuple[Backend, ...] = (
    PyTorch(),
    PyTorchCompile(),
    OrtCpu(),
    OpenVino(),
    OrtGpu("ort-cuda", CUDA),
    OrtGpu("ort-tensorrt", TENSORRT),
    TensorRt("tensorrt"),
    TensorRt("tensorrt-rtx"),
)
NAMED_ONLY = frozenset({"pytorch-compile"})
"""Taken only where asked for by name: it compiles each model anew, in every process."""


def backend(name: str) -> Backend:
    """The backend of this name. Raises UsageError: there is none (did you mean)."""
    for candidate in BACKENDS:
        if candidate.name == name:
            return candidate
    names = [b.name for b in BACKENDS]
    raise UsageError(f"unknown backend {name!r}", hint=did_you_mean(name, names))


def available(format_: Format) -> tuple[Backend, ...]:
    """The backends that open this format and can run here."""
    return tuple(b for b in BACKENDS if format_ in b.formats and b.unavailable() is None)


def open_session(
    artifact: Artifact, name: str | None = None, options: SessionOptions | None = None
) -> Session:
    """Open a model on the backend of this name, or on the first that fits.

    Raises UsageError: not a format of the backend. MissingError: no backend for it here.
    """
    options = options or SessionOptions()
    if name is None:
        name = fitting(artifact)[0]
    chosen = backend(name)
    if artifact.format not in chosen.formats:
        raise UsageError(
            f"{name} does not run {artifact.format} models ({artifact.path})",
            hint=f"{name} takes {', '.join(sorted(chosen.formats))}",
        )
    if options.simulate and not isinstance(chosen, OrtCpu):
        raise UsageError(f"{name} cannot simulate integers", hint="ort-cpu can")
    if options.cuda_graph and not isinstance(chosen, TensorRt):
        raise UsageError(f"{name} has no CUDA graphs", hint="TensorRT engines have")
    check_available(name)
    return chosen.open(artifact, options)


def check_available(name: str) -> None:
    """Raises MissingError: the backend of this name cannot run here, and why."""
    if reason := backend(name).unavailable():
        raise MissingError(f"{name} cannot run here: {reason}", hint="see `deploykit doctor`")


def fitting(artifact: Artifact) -> list[str]:
    """The backends that can run it here, without those that must be named.

    Of an engine, that of its flavour. Raises MissingError: there is none.
    """
    names = [b.name for b in available(artifact.format) if b.name not in NAMED_ONLY]
    if artifact.format == "engine":
        names = [name for name in names if name == artifact.facts.get("flavour")]
    if not names:
        raise no_backend(artifact)
    return names


def no_backend(artifact: Artifact) -> MissingError:
    """The error for a model that nothing here can run."""
    takers = [b for b in BACKENDS if artifact.format in b.formats]
    flavour = artifact.facts.get("flavour") if artifact.format == "engine" else None
    reasons = [f"{b.name}: {b.unavailable()}" for b in takers if flavour in (None, b.name)]
    return MissingError(
        f"{artifact.path}: no backend for {artifact.format} models can run here ({reasons[0]})",
        hint="see `deploykit doctor`",
    )
