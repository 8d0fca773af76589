"""Where the time goes: kernels mapped back to the model's nodes and to the PyTorch modules."""

from __future__ import annotations

from collections.abc import Sequence

from deploykit.formats import onnx_file
from deploykit.values import Artifact, Kernel


def located(kernels: Sequence[Kernel], artifact: Artifact) -> tuple[Kernel, ...]:
    """The kernels, longest first, with the ONNX nodes and the module that each is for.

    PyTorch's own kernels are modules already; an engine's layers keep TensorRT's names. Raises
    InputError: the ONNX file cannot be read.
    """
    origins = {}
    if artifact.format == "onnx" and any(kernel.names for kernel in kernels):
        origins = onnx_file.origins(onnx_file.shell(artifact.path))
    longest = sorted(kernels, key=lambda kernel: -kernel.microseconds)
    return tuple(_located(kernel, artifact, origins) for kernel in longest)


def _located(kernel: Kernel, artifact: Artifact, origins: dict[str, onnx_file.Origin]) -> Kernel:
    if artifact.format == "torch":
        return kernel.model_copy(update={"module": kernel.names[0] if kernel.names else None})
    found = [origins[name] for name in kernel.names if name in origins]
    modules = [origin.module for origin in found if origin.module]
    return kernel.model_copy(
        update={
            "nodes": tuple(dict.fromkeys(origin.node for origin in found)),
            "module": modules[0] if modules else None,
        }
    )
