"""Plain: the model lies at the top of the bundle as `model.onnx` or `model.engine`."""

from __future__ import annotations

from collections.abc import Sequence

from deploykit.layouts.interface import Laid, Member, Serving
from deploykit.values import Feed


def lay(members: Sequence[Member], serving: Serving, feed: Feed) -> Laid:
    """Place the models; nothing else is written."""
    del serving, feed
    suffix = {"onnx": "onnx", "engine": "engine"}
    models = [f"model{m.label}.{suffix[m.artifact.format]}" for m in members]
    return Laid(models=tuple(models), configs=(None,) * len(models))
