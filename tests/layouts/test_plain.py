from __future__ import annotations

import pytest

from deploykit.layouts import Laid, Member, Serving, plain
from deploykit.values import Format
from tests.layouts.test_triton import IMAGES, LOGITS, artifact


@pytest.mark.parametrize(
    ("kind", "label", "path"),
    [
        ("onnx", "", "model.onnx"),
        ("onnx", "-int8-ort-cpu", "model-int8-ort-cpu.onnx"),
        ("engine", "", "model.engine"),
    ],
)
def test_the_model_lies_at_the_top_whatever_the_bundles_name(kind: Format, label: str, path: str):
    model = artifact((IMAGES,), (LOGITS,), kind=kind)
    member = Member(artifact=model, backend="ort-cpu", label=label)
    found = plain.lay([member], Serving(name="net", version=7), {})
    assert found == Laid(models=(path,), configs=(None,))
