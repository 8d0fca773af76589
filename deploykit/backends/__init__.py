"""The runtimes that deploykit can run a model on."""

from __future__ import annotations

from deploykit.backends.openvino import OpenVino
from deploykit.backends.ort import CUDA, TENSORRT, OrtCpu, OrtGpu
from deploykit.backends.pytorch import PyTorch, PyTorchCompile
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
)


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
    """Open a model on the backend of this name, or on the first that takes its format.

    Raises UsageError: not a format of the backend. MissingError: no backend for it here.
    """
    options = options or SessionOptions()
    if name is None:
        fitting = available(artifact.format)
        if not fitting:
            raise no_backend(artifact)
        return fitting[0].open(artifact, options)
    chosen = backend(name)
    if artifact.format not in chosen.formats:
        raise UsageError(
            f"{name} does not run {artifact.format} models ({artifact.path})",
            hint=f"{name} takes {', '.join(sorted(chosen.formats))}",
        )
    if options.simulate and not isinstance(chosen, OrtCpu):
        raise UsageError(f"{name} cannot simulate integers", hint="ort-cpu can")
    check_available(name)
    return chosen.open(artifact, options)


def check_available(name: str) -> None:
    """Raises MissingError: the backend of this name cannot run here, and why."""
    if reason := backend(name).unavailable():
        raise MissingError(f"{name} cannot run here: {reason}", hint="see `deploykit doctor`")


def no_backend(artifact: Artifact) -> MissingError:
    """The error for a model that nothing here can run."""
    takers = [b.name for b in BACKENDS if artifact.format in b.formats]
    if not takers:
        return MissingError(
            f"{artifact.path}: this version of deploykit runs no {artifact.format} models",
            hint="engines are built and described, not yet run; time them with trtexec",
        )
    return MissingError(
        f"{artifact.path}: no backend for {artifact.format} models can run here",
        hint=f"see `deploykit doctor` for what {' and '.join(takers)} need",
    )
