"""Where the time goes: kernels mapped back to the model's nodes and to the PyTorch modules."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from deploykit.formats import onnx_file
from deploykit.measure import proof
from deploykit.values import Artifact, Kernel, Value

if TYPE_CHECKING:
    import onnx

SCOPES = "pkg.torch.onnx.name_scopes"
"""Where PyTorch's exporter keeps the modules around a node: a Python list, outermost first."""


class Layer(Value):
    """One kernel, and what of the model it is for."""

    operator: str
    """As the runtime calls it."""
    nodes: tuple[str, ...]
    """Of the ONNX file, several where the runtime fused them; empty for work of its own."""
    module: str | None
    """Path of the PyTorch module; None where the file does not say."""
    precision: str
    provider: str
    microseconds: float
    share: float
    """Of all kernels' time, 0..1."""


class Account(Value):
    """Where the time of an engine goes; shares are of its kernels' time, 0..1."""

    layers: tuple[Layer, ...]
    """Longest first."""
    by_operator: dict[str, float]
    by_precision: dict[str, float]
    reformatting: float
    """Transposes, reorders, casts and copies."""
    quantizing_alone: float
    """QuantizeLinear and DequantizeLinear that were not fused into an operator."""


def account(kernels: Sequence[Kernel], artifact: Artifact | None) -> Account:
    """Sum up the kernels; without the artifact they keep the runtime's names.

    Raises InputError: the artifact is an ONNX file that cannot be read.
    """
    model = artifact is not None and artifact.format == "onnx" and onnx_file.read(artifact.path)
    nodes = _by_name(model) if model else {}
    whole = sum(kernel.microseconds for kernel in kernels) or 1
    layers = sorted(
        (_layer(kernel, nodes, whole, known=bool(model)) for kernel in kernels),
        key=lambda layer: -layer.microseconds,
    )
    return Account(
        layers=tuple(layers),
        by_operator=proof.shares(kernels, lambda kernel: kernel.operator),
        by_precision=proof.shares(kernels, lambda kernel: kernel.precision or "not told"),
        reformatting=proof.share_of(kernels, proof.REFORMATTING),
        quantizing_alone=proof.share_of(kernels, proof.ALONE),
    )


def _by_name(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Nodes by their own name and by those of the tensors that they make."""
    found = {tensor: node for node in model.graph.node for tensor in node.output}
    return {**found, **{node.name: node for node in model.graph.node if node.name}}


def _layer(
    kernel: Kernel, nodes: Mapping[str, onnx.NodeProto], whole: float, *, known: bool
) -> Layer:
    named = {nodes[name].name or name: nodes[name] for name in kernel.names if name in nodes}
    modules = [module for node in named.values() if (module := _module(node))]
    return Layer(
        operator=kernel.operator,
        nodes=tuple(named),
        module=modules[0] if modules else None if known else ", ".join(kernel.names) or None,
        precision=kernel.precision,
        provider=kernel.provider,
        microseconds=kernel.microseconds,
        share=kernel.microseconds / whole,
    )


def _module(node: onnx.NodeProto) -> str | None:
    """Path of the innermost module around a node; the last scope is the operation itself."""
    told = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "")
    try:
        scopes = ast.literal_eval(told) if told else []
    except (ValueError, SyntaxError):
        return None
    inner = [scope for scope in scopes[:-1] if scope]
    return str(inner[-1]) if inner else None
