"""A result that does not load or gives NaN is never written: who is to blame stays in float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deploykit.backends import open_session
from deploykit.dataset import Dataset, padded
from deploykit.errors import AnswerIsNo, InputError, StageError
from deploykit.stages.quantize.workshop import Variant, Workshop
from deploykit.values import Artifact, Feed


def checked(
    shop: Workshop, variant: Variant, data: Dataset, out: Path
) -> tuple[Variant, dict[str, str]]:
    """Write the variant at `out`, load and run it; leave out the nodes that break it.

    Returns what was written and why each node was left out. Raises StageError: it does not load or
    run, and no node alone is to blame.
    """
    batch = shop.source.inputs[0].shape[0]
    size = batch if isinstance(batch, int) else 1
    feed, _ = next(data.batches(size))
    feed = {name: padded(array, size) for name, array in feed.items()}
    reason = _fault(shop.write(variant, out), feed)
    if reason is None:
        return variant, {}
    guilty = _guilty(shop, variant, variant.nodes, feed, out)
    rest = replace(variant, nodes=tuple(n for n in variant.nodes if n not in guilty))
    if not guilty or not rest.nodes or _fault(shop.write(rest, out), feed):
        raise StageError(
            f"the quantized model is broken: {reason}",
            hint="leave nodes in float with --keep-float, or try another --scope",
        )
    return rest, guilty


def _guilty(
    shop: Workshop, variant: Variant, nodes: Sequence[str], feed: Feed, out: Path
) -> dict[str, str]:
    """Nodes that break the model when quantized without the others of `nodes`, by bisection."""
    try:
        reason = _fault(shop.write(replace(variant, nodes=tuple(nodes)), out, bare=True), feed)
    except AnswerIsNo:
        return {}
    if reason is None:
        return {}
    if len(nodes) == 1:
        return {nodes[0]: f"breaks the model: {reason}"}
    half = len(nodes) // 2
    left = _guilty(shop, variant, nodes[:half], feed, out)
    return left | _guilty(shop, variant, nodes[half:], feed, out)


def _fault(artifact: Artifact, feed: Feed) -> str | None:
    """Why the model must not be used, or None."""
    try:
        with open_session(artifact, "ort-cpu") as session:
            for name, array in session.run(feed).items():
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    return f"output {name!r} has NaN or infinite values"
    except InputError as error:
        return str(error).removeprefix(f"{artifact.path}: ")
    return None
