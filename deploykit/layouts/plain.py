"""Plain: the model lies at the top of the bundle as `model.onnx` or `model.engine`."""

from __future__ import annotations

from deploykit.layouts.interface import Placed, Serving
from deploykit.values import Artifact


def place(artifact: Artifact, *, backend: str, label: str, serving: Serving) -> Placed:
    """Place a model; nothing else is written."""
    del backend, serving
    suffix = "onnx" if artifact.format == "onnx" else "engine"
    return Placed(model=f"model{label}.{suffix}")
