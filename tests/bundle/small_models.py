"""Small real models, and an engine that is one by its record only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploykit import _files
from deploykit.dataset import Dataset, open_dataset
from deploykit.formats import open_model
from deploykit.values import Artifact, StageRecord, TensorSpec

RNG_SEED = 7


def save_linear(
    path: Path,
    *,
    batch: int | str = "batch",
    noise: bool = False,
    opset: int = 17,
    seed: int = RNG_SEED,
) -> Artifact:
    """y = x @ w, of [batch, 3] and [batch, 4]; with noise, y + RandomNormal."""
    rng = np.random.default_rng(seed)
    weights = numpy_helper.from_array(rng.standard_normal((3, 4)).astype(np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["clean" if noise else "y"])]
    if noise:
        nodes += [
            helper.make_node("RandomNormalLike", ["clean"], ["noise"]),
            helper.make_node("Add", ["clean", "noise"], ["y"]),
        ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4])],
        [weights],
    )
    return save(graph, path, opset=opset)


def save_int8(path: Path, *, largest_weight: int) -> Artifact:
    """uint8 activations, int8 weights of up to this magnitude, in Q/DQ pairs; 64 to 16 to 4."""
    rng = np.random.default_rng(RNG_SEED)
    nodes, constants = [], []
    value = "x"
    for layer, (rows, columns) in enumerate([(64, 16), (16, 4)]):
        weights = rng.integers(-largest_weight, largest_weight + 1, (rows, columns), dtype=np.int8)
        for name, array in {
            f"s{layer}": np.float32(0.02 if layer == 0 else 0.05),
            f"z{layer}": np.uint8(128 if layer == 0 else 0),
            f"w{layer}": weights,
            f"ws{layer}": np.float32(1 / largest_weight / 4),
            f"wz{layer}": np.int8(0),
        }.items():
            constants.append(numpy_helper.from_array(np.asarray(array), name))
        scale, weight = [f"s{layer}", f"z{layer}"], [f"w{layer}", f"ws{layer}", f"wz{layer}"]
        out = "y" if layer == 1 else "hidden"
        nodes += [
            helper.make_node("QuantizeLinear", [value, *scale], [f"q{layer}"]),
            helper.make_node("DequantizeLinear", [f"q{layer}", *scale], [f"d{layer}"]),
            helper.make_node("DequantizeLinear", weight, [f"wd{layer}"]),
            helper.make_node("MatMul", [f"d{layer}", f"wd{layer}"], [out]),
        ]
        if layer == 0:
            nodes.append(helper.make_node("Relu", ["hidden"], ["positive"]))
            value = "positive"
    graph = helper.make_graph(
        nodes,
        "int8",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        constants,
    )
    return save(graph, path)


def save(graph: onnx.GraphProto, path: Path, *, opset: int = 17) -> Artifact:
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=min(10, opset)
    )
    onnx.save(model, path)
    return open_model(path)


def save_engine(path: Path, *, flavour: str = "tensorrt") -> Artifact:
    """An engine by its record only: its bytes are none that a runtime would load."""
    path.write_bytes(b"not really a plan")
    record = StageRecord(
        stage="build",
        options={},
        facts={
            "flavour": flavour,
            "flavour_version": "11.4.0.106",
            "compute_capabilities": ["sm90"],
            "profile": {"x": [[1, 3], [4, 3], [16, 3]]},
        },
        inputs={},
        versions={flavour: "11.4.0.106"},
        seconds=1.0,
        key="k",
    )
    return Artifact(
        path=path,
        format="engine",
        precision="fp16",
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 3)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 4)),),
        sha256=_files.sha256(path),
        history=(record,),
    )


def samples(path: Path, **arrays: np.ndarray[Any, Any]) -> Dataset:
    np.savez(path, **arrays)
    return open_dataset(path)
