"""BUNDLE_FORMAT.md says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import deploykit
from deploykit.bundle import Bundle, Engine, FileEntry, Requirements, golden
from deploykit.bundle.manifest import GoldenInputs, GoldenOutputs
from deploykit.bundle.requirements import KNOWN_IR, KNOWN_OPSET, RUNTIMES
from deploykit.formats.onnx_portable import NO_OVERFLOW
from deploykit.values import Value

TEXT = (Path(deploykit.__file__).parent / "BUNDLE_FORMAT.md").read_text()
BLOCKS: dict[str, str] = dict(re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL))


@pytest.mark.parametrize(
    "noun", [Bundle, Engine, FileEntry, Requirements, GoldenInputs, GoldenOutputs]
)
def test_every_key_is_documented(noun: type[Value]):
    for name, field in noun.model_fields.items():
        assert f"`{field.alias or name}" in TEXT


def test_numbers_are_those_of_the_code():
    shares = golden.SHARES
    assert f"| fp32 | {shares['fp32']:.0e}".replace("e-0", "e-") in TEXT
    assert "| int8 | 1.5e-2 |" in TEXT
    assert "| int4 | 1.5e-2 |" in TEXT
    assert shares["int8"] == shares["int4"] == 1.5e-2
    assert "| fp16, bf16, fp8 | 5e-3, 3e-2, 5e-2 |" in TEXT
    assert (shares["fp16"], shares["bf16"], shares["fp8"]) == (5e-3, 3e-2, 5e-2)
    assert f"above magnitude {NO_OVERFLOW}" in TEXT
    assert f"opset is above {KNOWN_OPSET} or the IR version above {KNOWN_IR}" in TEXT
    assert all(f"`{name}`" in TEXT for name in RUNTIMES)


def run(command: list[str], text: str, folder: Path) -> subprocess.CompletedProcess[Any]:
    return subprocess.run(
        command, input=text, cwd=folder, capture_output=True, text=True, check=False
    )


def test_the_shell_commands_check_the_files(bundle: Path):
    script = BLOCKS["sh"].replace("cd BUNDLE\n", "")
    sound = run(["bash", "-e", "-o", "pipefail"], script, bundle)
    assert sound.returncode == 0, sound.stderr
    assert sound.stdout.split()[-1] == "9"
    (bundle / "evidence.json").write_text("{}")
    assert run(["bash", "-e", "-o", "pipefail"], script, bundle).returncode


def test_the_python_code_checks_the_answers(bundle: Path):
    assert run([sys.executable, "-"], BLOCKS["python"], bundle).returncode == 0
    outputs = golden.read_arrays(bundle / "golden_outputs.npz")
    golden.write_arrays(bundle / "golden_outputs.npz", {"y": outputs["y"] * 1.01})
    failed = run([sys.executable, "-"], BLOCKS["python"], bundle)
    assert "Not equal to tolerance" in failed.stderr
