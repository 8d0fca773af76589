"""Which node a runtime's kernels are for."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from deploykit.backends import open_session
from deploykit.stages.quantize.clock import node_times
from deploykit.values import Kernel
from tests.formats.test_onnx_graph import CONV, graph_of, normal, parsed, stored

TEXT = f"""(float[N,3,8,8] x) => (float[N,5] y) {{
    [conv] h = {CONV}(x, w, b)
    [relu] r = Relu(h)
    [flat] f = Flatten(r)
    [gemm] y = Gemm(f, v, c)
}}"""
WEIGHTS = {"w": normal(8, 3, 3, 3), "b": normal(8), "v": normal(512, 5), "c": normal(5)}


def kernel(*names: str, operator: str = "") -> Kernel:
    return Kernel(names=names, operator=operator, microseconds=2.0)


@pytest.mark.parametrize(
    ("kernels", "times"),
    [
        ([kernel("conv")], {"conv": 2.0}),
        ([kernel("relu")], {"relu": 2.0}),
        ([kernel("r")], {"relu": 2.0}),  # by the tensor
        ([kernel("r", operator="Conv")], {"conv": 2.0}),  # ONNX Runtime's fused convolution
        ([kernel("conv", "relu")], {"conv": 2.0}),
        ([kernel("conv"), kernel("h", operator="Conv")], {"conv": 4.0}),
        ([kernel("conv", "gemm")], {}),  # whose is it?
        ([kernel("relu", "flat")], {}),
        ([kernel("made_up"), kernel()], {}),
    ],
)
def test_a_kernel_counts_for_one_node_or_none(
    kernels: list[Kernel], times: dict[str, float]
) -> None:
    assert node_times(graph_of(TEXT, **WEIGHTS), kernels) == times


def test_a_relu_that_others_look_behind_is_no_part_of_the_convolution() -> None:
    graph = graph_of(f"""(float[N,3,8,8] x) => (float[N,8,8,8] h, float[N,8,8,8] r) {{
        [conv] h = {CONV}(x, w, b) [relu] r = Relu(h)
    }}""", **{name: WEIGHTS[name] for name in "wb"})  # fmt: skip
    assert node_times(graph, [kernel("r", operator="Conv")]) == {"relu": 2.0}


@pytest.mark.parametrize("runtime", ["ort-cpu", "openvino"])
def test_what_computes_has_a_time_on_a_real_runtime(runtime: str, tmp_path: Path) -> None:
    source, data = stored(parsed(TEXT, **WEIGHTS), tmp_path, x=normal(4, 3, 8, 8))
    feed, _ = next(data.matching(source.inputs).batches(1))
    with open_session(source, runtime) as session:
        kernels = session.kernels(feed, 5)
    from deploykit.formats.onnx_graph import Graph

    times = node_times(Graph(onnx.load(source.path)), kernels)
    assert {"conv", "gemm"} <= set(times)
    assert "relu" not in times  # both fuse it
