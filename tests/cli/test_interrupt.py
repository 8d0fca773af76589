"""Ctrl-C and SIGTERM in the middle of a stage: nothing torn at a final path, exit code 130."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploykit import store
from deploykit.values import Artifact
from tests.cli.conftest import spawn
from tests.conftest import FASHION

CALIBRATION, TRAIN = FASHION / "calibration.npz", FASHION / "train.npz"


def _stages(teacher: Path, onnx: Path) -> dict[str, tuple[object, ...]]:
    return {
        "prune": ("prune", teacher, "--ratio", "0.3"),
        "distill": ("distill", teacher, "--teacher", teacher, "--data", TRAIN),
        "export": ("export", teacher),
        "quantize": ("quantize", onnx, "--calibration-data", CALIBRATION),
        "package": ("package", onnx, "--data", CALIBRATION, "--layout", "triton"),
    }  # fmt: skip


@pytest.mark.parametrize("stage", ["prune", "distill", "export", "quantize", "package"])
@pytest.mark.parametrize("delay", [1.5, 4.0])
def test_an_interrupt_leaves_the_old_result(
    stage: str, delay: float, teacher: Artifact, teacher_onnx: Artifact, tmp_path: Path
) -> None:
    out = tmp_path / "result"
    if stage != "package":  # which replaces nothing but a bundle
        out.write_text("old")
    words = _stages(teacher.path, teacher_onnx.path)[stage]
    process = spawn(*words, "-o", out, "--force", cwd=tmp_path)
    time.sleep(delay)
    process.send_signal(signal.SIGTERM if delay > 2 else signal.SIGINT)
    try:
        _, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail("the interrupt was lost")
    if process.returncode == 0:  # it was done before the signal came
        assert out.is_dir() or out.read_bytes() != b"old"
        return
    if process.returncode not in (-signal.SIGINT, -signal.SIGTERM):  # else: not yet in our code
        assert process.returncode == 130, err
        assert err.splitlines()[-2] == "error: interrupted"
    if stage != "package" and (out.is_dir() or out.read_bytes() != b"old"):
        assert store.read(out) is not None  # the signal came when all was done, record and all
        return
    assert not out.exists() if stage == "package" else out.read_text() == "old"
    leftovers = [p.name for p in tmp_path.iterdir() if p.name.startswith(".result")]
    assert not leftovers


def test_kill_9_leaves_the_old_result_and_the_next_run_sweeps(
    teacher: Artifact, tmp_path: Path
) -> None:
    out = tmp_path / "result"
    out.write_text("old")
    words = ("distill", teacher.path, "--teacher", teacher.path, "--data", TRAIN)
    process = spawn(*words, "-o", out, "--force", cwd=tmp_path)
    time.sleep(6)
    process.kill()
    process.communicate()
    assert out.read_text() == "old"
    done = spawn("prune", teacher.path, "--ratio", "0.3", "-o", out, "--force", cwd=tmp_path)
    _, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result"]


def test_an_interrupt_that_a_library_swallows_is_not_lost(
    tmp_path: Path, teacher: Artifact
) -> None:
    """The factory swallows Ctrl-C, as libraries do at import; nothing may be published."""
    code = (
        "import os, signal\n"
        "from deploykit.stages import prune\n"
        "find = prune._size\n"
        "def swallowing(*a):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
        "    return find(*a)\n"
        "prune._size = swallowing\n"
        "from deploykit.__main__ import main\n"
        "main()\n"
    )
    out = tmp_path / "result"
    words = ["prune", str(teacher.path), "--ratio", "0.3", "-o", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130, done.stderr
    assert not list(tmp_path.iterdir())
