"""When a part of the evaluation data is enough to say no."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from deploykit.backends import open_session
from deploykit.dataset import open_dataset
from deploykit.stages.quantize import Promise
from deploykit.stages.quantize.lab import Lab
from deploykit.stages.quantize.promise import looks
from deploykit.values import Interval, Score
from tests.formats.test_onnx_graph import normal, parsed, stored
from tests.stages.quantize.test_search import point


def top1(right: int, samples: int) -> Score:
    share = right / samples
    return Score(
        metric="top1",
        score=Interval(value=share, low=share, high=share),
        samples=samples,
        per_sample=(1.0,) * right + (0.0,) * (samples - right),
    )


class FakeLook:
    """A look with a known answer."""

    def __init__(self, lost: int, samples: int) -> None:
        self.score, self.found = top1(samples, samples), top1(samples - lost, samples)

    def at(self, session: object, metric: str) -> Score:
        assert metric == "top1"
        return self.found


@pytest.mark.parametrize(("lost", "samples"), [(3, 640), (8, 640), (20, 80)])
def test_only_what_is_beyond_doubt_is_refused_on_a_part(lost: int, samples: int) -> None:
    """Of 80 samples 3 or 8 lost can be chance where 1 in 100 may be; 20 cannot."""
    fake = SimpleNamespace(
        promise=SimpleNamespace(metric="top1", limit=lambda reference: 0.01),
        looks=[FakeLook(lost, 80), FakeLook(0, 640)],
        float_score=top1(640, 640),
        _open=lambda artifact: nullcontext(),
        know=lambda point: point,
    )
    fake._judged = lambda *judged: Lab._judged(cast("Any", fake), *judged)
    scored = Lab.scored(cast("Any", fake), point("x", None, None))
    assert scored.scored_samples == samples


@pytest.mark.parametrize(("samples", "parts"), [(511, [511]), (512, [64, 512]), (640, [80, 640])])
def test_a_part_is_looked_at_first_where_it_is_large_enough(
    samples: int, parts: list[int], tmp_path: Path
) -> None:
    text = "(float[N,8] x) => (float[N,4] y) { y = MatMul(x, w) }"
    source, _ = stored(parsed(text, w=normal(8, 4)), tmp_path, x=normal(4, 8))
    np.savez(tmp_path / "many.npz", x=normal(samples, 8))
    promise = Promise(open_dataset(tmp_path / "many.npz"), "cosine", 0.01)
    with open_session(source, "ort-cpu") as session:
        found = looks(session, promise)
    assert [look.score.samples for look in found] == parts
    for look in found:
        (feed, _), *_ = look.data.batches(len(look.data))
        np.testing.assert_allclose(look.outputs["y"], feed["x"] @ normal(8, 4), 1e-4, 1e-5)
