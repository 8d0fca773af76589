"""Architectures of transformers go through export with a dynamic batch, proven against PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from deploykit._shapes import parse_inputs
from deploykit.stages.export import ExportOptions, export
from deploykit.stages.take import TakeOptions, take
from tests.stages.transformers_models import ARCHITECTURES


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_exported_and_proven(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    options = TakeOptions(
        factory=f"tests.stages.transformers_models:{name}",
        inputs=parse_inputs(architecture.inputs),
        dynamic_axes=architecture.axes,
    )
    model = take(options, out=tmp_path / "model")
    made = export(model, ExportOptions(verify_batch_sizes=(1, 2, 5)), out=tmp_path / "model.onnx")
    assert {spec.shape[0] for spec in made.inputs} == {"batch"}
    assert made.facts["dynamic"]["batch"]["checked"] == [1, 2, 5]
    assert all(found["cosine"] > 0.99999 for found in made.facts["outputs"].values())
    if architecture.axes:
        assert {1, 13, 32} <= set(made.facts["dynamic"]["sequence"]["checked"])
    if architecture.outputs:
        assert tuple(spec.name for spec in made.outputs) == architecture.outputs
