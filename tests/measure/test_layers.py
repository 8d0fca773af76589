from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploykit.backends import open_session
from deploykit.formats import onnx_file, open_model
from deploykit.measure.layers import located
from deploykit.values import Artifact, Kernel

X = ("x", TensorProto.FLOAT, ["batch", 8])
Y = ("y", TensorProto.FLOAT, ["batch", 8])


def model(path: Path, *, scopes: str = "['', 'head', 'head.act', 'relu']") -> Artifact:
    """x -> MatMul -> Add -> Relu -> y; the Relu knows its module."""
    weights = np.eye(8, dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="mul"),
        helper.make_node("Add", ["m", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"], name="act"),
    ]
    entry = nodes[-1].metadata_props.add()
    entry.key, entry.value = onnx_file.SCOPES, scopes
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info(*X)], [helper.make_tensor_value_info(*Y)],
        [onnx.numpy_helper.from_array(a, n) for a, n in ((weights, "w"), (weights[0], "b"))],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(made, path)
    return open_model(str(path))


def kernel(*names: str, microseconds: float = 1) -> Kernel:
    return Kernel(names=names, operator="Work", microseconds=microseconds)


def test_a_kernel_is_found_by_node_or_by_tensor_and_the_longest_is_first(tmp_path: Path) -> None:
    artifact = model(tmp_path / "m.onnx")
    kernels = [kernel("mul", "a"), kernel("y", microseconds=5), kernel("reorder", microseconds=2)]
    relu, own, fused = located(kernels, artifact)
    assert (relu.nodes, relu.module) == (("act",), "head.act")
    assert (own.nodes, own.module) == ((), None)
    assert (fused.nodes, fused.module) == (("mul", "a"), None)


@pytest.mark.parametrize("scopes", ["no list", "[]", "['relu']", "__import__('os').getcwd()"])
def test_scopes_that_say_nothing_are_no_module(tmp_path: Path, scopes: str) -> None:
    (found,) = located([kernel("act")], model(tmp_path / "m.onnx", scopes=scopes))
    assert (found.nodes, found.module) == (("act",), None)


@pytest.mark.parametrize("backend", ["ort-cpu", "openvino"])
def test_what_a_runtime_tells_leads_back_to_the_nodes(tmp_path: Path, backend: str) -> None:
    artifact = model(tmp_path / "m.onnx")
    feed = {"x": np.ones((2, 8), np.float32)}
    with open_session(artifact, backend) as session:
        told = located(session.kernels(feed, 3), artifact)
    assert {node for k in told for node in k.nodes} & {"mul", "a", "act"}
