"""Every name of TensorRT that deploykit writes is in the bindings of 10.16, of 11.4 and of RTX.

The names of the first two were listed from the real bindings over stub libraries, by
`surface/make.py`: this says that the names exist, not that they do what is thought of them. What a
version has and another has not must be asked for by name (`member`, `getattr`) in the code.
"""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import pytest

from deploykit._lazy import installed
from deploykit.stages.build.configure import _flags
from deploykit.stages.build.exchange import Request
from deploykit.stages.build.options import BuildOptions
from tests.conftest import ROOT

SURFACE = Path(__file__).parent / "surface"
VERSIONS = ("10.16.1.11", "11.4.0.106")
USERS = [
    *sorted((ROOT / "deploykit" / "stages" / "build").glob("*.py")),
    *sorted((ROOT / "deploykit" / "backends").glob("tensorrt*.py")),
    *sorted((ROOT / "deploykit" / "backends" / "tensorrt").glob("*.py")),
]
CLASSES = {
    "builder": "Builder", "config": "IBuilderConfig", "network": "INetworkDefinition",
    "parser": "OnnxParser", "shapes": "IOptimizationProfile", "ours": "ITimingCache",
    "engine": "ICudaEngine", "_engine": "ICudaEngine", "context": "IExecutionContext",
    "_context": "IExecutionContext", "runtime": "Runtime", "log": "ILogger",
}  # fmt: skip
"""What the code calls an object of TensorRT, and its class."""
OWN = {("log", name) for name in ("told", "warnings", "errors", "append")} | {
    ("shapes", "items"), ("shapes", "most_common"), ("shapes", "get"), ("network", "unfused"),
}  # fmt: skip
"""Attributes that are ours, of objects of the same name."""
RTX_ONLY = {
    "trt.ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}
"""Used behind a branch for TensorRT for RTX alone."""
LAYERS = ("IConvolutionLayer", "IDeconvolutionLayer", "IMatrixMultiplyLayer")


def used() -> tuple[set[tuple[str, ...]], set[tuple[str, str]]]:
    """`trt.A.B` as (A, B), and attributes of objects as (class, name)."""
    module: set[tuple[str, ...]] = set()
    objects: set[tuple[str, str]] = set()
    for path in USERS:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            chain = ast.unparse(node).split(".")
            if chain[0] == "trt" and all(part.isidentifier() for part in chain):
                module.add(tuple(chain[1:3]))
            owner = node.value
            name = getattr(owner, "id", None) or getattr(owner, "attr", None)
            if name in CLASSES and (name, node.attr) not in OWN:
                objects.add((CLASSES[name], node.attr))
    return module, objects


def surfaces() -> dict[str, dict[str, list[str]]]:
    found = {v: json.loads((SURFACE / f"{v}.json").read_text())["classes"] for v in VERSIONS}
    if installed("tensorrt_rtx"):
        trt = importlib.import_module("tensorrt_rtx")
        classes = {n: getattr(trt, n) for n in dir(trt) if isinstance(getattr(trt, n), type)}
        found["rtx"] = {
            n: [*getattr(v, "__members__", ()), *(a for a in dir(v) if not a.startswith("__"))]
            for n, v in classes.items()
        }
    return found


@pytest.mark.parametrize("version", surfaces())
def test_every_name_that_is_written_is_in_the_bindings(version: str) -> None:
    classes = surfaces()[version]
    module, objects = used()
    assert len(module) > 10
    assert len(objects) > 20
    absent = {f"trt.{n[0]}" for n in module if n[0][0].isupper() and n[0] not in classes}
    for kind, name in {n for n in module if len(n) == 2 and n[0] in classes}:
        if not name.startswith("__") and name not in classes[kind]:
            absent.add(f"trt.{kind}.{name}")
    absent |= {f"{kind}.{name}" for kind, name in objects if name not in classes[kind]}
    assert absent == (set() if version == "rtx" else RTX_ONLY)


@pytest.mark.parametrize("version", surfaces())
def test_flags_choices_and_layers_are_in_the_bindings(version: str) -> None:
    classes = surfaces()[version]
    request = Request(
        onnx=Path("m"), plan=Path("p"), module="tensorrt", precision="fp32",
        options=BuildOptions(), profiles=(),
    )  # fmt: skip
    assert set(_flags(request)) <= set(classes["BuilderFlag"])
    assert {"NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"} <= set(
        classes["HardwareCompatibilityLevel"]
    )
    assert {"NONE", "FAST", "MODERATE", "FULL"} <= set(classes["TilingOptimizationLevel"])
    assert set(LAYERS) <= set(classes)
    for kind in LAYERS[:2]:
        assert {"kernel_size_nd", "num_groups"} <= set(classes[kind])
    assert {"op0"} <= set(classes["IMatrixMultiplyLayer"])


def test_the_surfaces_are_of_different_versions() -> None:
    """What TensorRT 11 took away is in the one and not in the other: the lists are real."""
    old, new = (surfaces()[version] for version in VERSIONS)
    assert {"FP16", "INT8"} <= set(old["BuilderFlag"]) - set(new["BuilderFlag"])
    assert "IInt8EntropyCalibrator2" in old
    assert "IInt8EntropyCalibrator2" not in new
