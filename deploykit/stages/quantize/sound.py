"""A result that does not load or gives NaN is never written: who is to blame stays in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deploykit.backends import open_session
from deploykit.dataset import Dataset
from deploykit.errors import AnswerIsNo, InputError, StageError
from deploykit.evaluation import collect
from deploykit.session import Session
from deploykit.stages.quantize.workshop import Variant, Workshop
from deploykit.values import Artifact

SAMPLES = 32
"""On which a model is run, at most."""
Opened = Callable[[Artifact], Session]


def checked(
    shop: Workshop,
    variant: Variant,
    data: Dataset,
    out: Path,
    opened: Opened | None = None,
) -> tuple[Variant, dict[str, str]]:
    """Write the variant at `out`, load and run it; leave out the nodes that break it.

    `opened` is how the model is opened, in ONNX Runtime unless given. Returns what was written and
    why each node was left out. Raises StageError: it does not load or run, and no node alone is to
    blame.
    """

    def fault(nodes: Sequence[str], *, bare: bool = False) -> str | None:
        made = shop.write(replace(variant, nodes=tuple(nodes)), out, bare=bare)
        return _fault(made, data.first(SAMPLES), opened or _in_ort)

    def guilty(nodes: Sequence[str]) -> dict[str, str]:
        """Nodes that break the model without the others of `nodes`, by bisection."""
        try:
            reason = fault(nodes, bare=True)
        except AnswerIsNo:
            return {}
        if reason is None:
            return {}
        if len(nodes) == 1:
            return {nodes[0]: f"breaks the model: {reason}"}
        half = len(nodes) // 2
        return guilty(nodes[:half]) | guilty(nodes[half:])

    reason = fault(variant.nodes)
    if reason is None:
        return variant, {}
    blamed = guilty(variant.nodes)
    rest = tuple(name for name in variant.nodes if name not in blamed)
    if not blamed or not rest or fault(rest):
        raise StageError(
            f"the quantized model is broken: {reason}",
            hint="leave nodes in float with --keep-float, or try another --scope",
        )
    return replace(variant, nodes=rest), blamed


def _in_ort(artifact: Artifact) -> Session:
    return open_session(artifact, "ort-cpu")


def _fault(artifact: Artifact, data: Dataset, opened: Opened) -> str | None:
    """Why the model must not be used, or None."""
    try:
        with opened(artifact) as session:
            outputs, _ = collect(session, data, batch_size=1)
    except InputError as error:
        return str(error).removeprefix(f"{artifact.path}: ")
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"output {name!r} has NaN or infinite values"
    return None
