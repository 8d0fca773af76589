"""What the channels of activations are like, against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.dataset import Dataset
from deploykit.stages.quantize.channels import FEW, observe_channels
from deploykit.values import Array
from tests.formats.test_onnx_graph import CONV, graph_of, normal, outputs


def in_memory(**arrays: Array) -> Dataset:
    samples = len(next(iter(arrays.values())))
    return Dataset("memory", samples, "", lambda: iter([arrays]))


@pytest.mark.parametrize("batch", ["N", "4"])
def test_mean_and_largest_of_each_channel(batch: str) -> None:
    text = f"""(float[{batch},3,8,8] x) => (float[{batch},4,8,5] y) {{
        [conv] h = {CONV}(x, w, b) r = Relu(h) [product] y = MatMul(r, v)
    }}"""
    graph, x = graph_of(text, w=normal(4, 3, 3, 3), b=normal(4), v=normal(8, 5)), normal(8, 3, 8, 8)
    seen = observe_channels(graph, in_memory(x=x))
    r = np.concatenate([outputs(graph.model, "r", x=part)["r"] for part in (x[:4], x[4:])])
    assert list(seen) == ["conv", "product"]
    np.testing.assert_allclose(seen["conv"].mean, x.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(seen["conv"].largest, np.abs(x).max((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(seen["product"].mean, r.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(seen["product"].largest, r.max((0, 1, 2)), rtol=1e-5)
    assert seen["conv"].mean.dtype == seen["product"].largest.dtype == np.float64


def test_only_the_first_samples_are_looked_at() -> None:
    graph, x = (
        graph_of("(float[N,4] x) => (float[N,2] y) { y = MatMul(x, w) }", w=normal(4, 2)),
        (normal(FEW + 1, 4)),
    )
    x[-1] = 1e6
    (seen,) = observe_channels(graph, in_memory(x=x)).values()
    np.testing.assert_allclose(seen.largest, np.abs(x[:-1]).max(0))
    np.testing.assert_allclose(seen.mean, x[:-1].mean(0), rtol=1e-4, atol=1e-6)


def test_a_tensor_that_is_read_along_two_axes() -> None:
    text = """(float[N,3,8,8] x) => (float[N,4,8,8] y, float[N,3,8,5] z) {
        [conv] y = Conv(x, w) [product] z = MatMul(x, v)
    }"""
    graph, x = graph_of(text, w=normal(4, 3, 1, 1), v=normal(8, 5)), normal(8, 3, 8, 8)
    seen = observe_channels(graph, in_memory(x=x))
    np.testing.assert_allclose(seen["conv"].mean, x.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(seen["product"].mean, x.mean((0, 1, 2)), atol=1e-6)


def test_a_graph_without_weights_has_none() -> None:
    text = "(float[N,4,4] x) => (float[N,4,4] y) { y = MatMul(x, x) }"
    assert observe_channels(graph_of(text), in_memory(x=normal(4, 4, 4))) == {}
