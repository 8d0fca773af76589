"""Nothing heavy is imported before it is used."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

import deploykit

HEAVY = (
    "torch", "torch_pruning", "onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt",
    "tensorrt_rtx", "pycuda", "scipy", "matplotlib", "tritonclient", "jinja2", "PIL",
)  # fmt: skip


def loaded(code: str) -> set[str]:
    """Modules in a fresh interpreter after this code."""
    script = f"import sys, json\n{code}\nsys.stderr.write(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stderr))


def test_help_loads_no_framework_nor_numpy() -> None:
    code = (
        "from deploykit.cli import _errors, group\n"
        "assert _errors.call(group, ['--help']) == 0\n"
        "sys.stdout.flush()"
    )
    modules = loaded(code)
    assert not modules & {*HEAVY, "numpy", "pydantic", "rich"}
    assert "click" in modules


def test_the_package_loads_nothing() -> None:
    assert not loaded("import deploykit") & {*HEAVY, "numpy", "click", "pydantic"}


@pytest.mark.parametrize(
    "module",
    [
        m.name
        for m in pkgutil.walk_packages(deploykit.__path__, "deploykit.")
        if not m.name.endswith("__main__")
    ],
)
def test_no_module_loads_a_framework_at_import(module: str) -> None:
    assert not loaded(f"import {module}") & set(HEAVY)
