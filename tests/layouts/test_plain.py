from __future__ import annotations

from pathlib import Path

import pytest

from deploykit.layouts import Serving, plain
from deploykit.values import Artifact, Format


@pytest.mark.parametrize(
    ("kind", "label", "path"),
    [
        ("onnx", "", "model.onnx"),
        ("onnx", "-int8-ort-cpu", "model-int8-ort-cpu.onnx"),
        ("engine", "", "model.engine"),
    ],
)
def test_the_model_lies_at_the_top_whatever_the_bundles_name(kind: Format, label: str, path: str):
    artifact = Artifact(
        path=Path("somewhere/my.file"), format=kind, precision="int8", inputs=(), outputs=(),
        sha256="0" * 64,
    )  # fmt: skip
    serving = Serving(name="net", version=3)
    placed = plain.place(artifact, backend="any", label=label, serving=serving)
    assert (placed.model, placed.texts) == (path, {})
