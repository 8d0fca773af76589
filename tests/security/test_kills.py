"""Row 23 of SECURITY.md: killed at random moments, each command leaves the old thing or the new.

DEPLOYKIT_KILLS is how many in all; the nightly run takes 200 and more.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from deploykit import _json, store
from deploykit.bundle import PackageOptions, package, sign, verify
from deploykit.bundle.publishing import served_versions
from deploykit.dataset import Dataset
from deploykit.stages import build as building
from deploykit.values import Artifact
from tests.conftest import ROOT

KILLS = int(os.environ.get("DEPLOYKIT_KILLS", "20"))
NET = """
from torch import nn
def net():
    layers = nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    return nn.Sequential(*layers)
"""
Run = Callable[..., tuple[str, float]]


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a command in a fork, and kills it after a while; exit code or `killed`, and seconds."""
    scratch = tmp_path_factory.mktemp("scratch")
    env = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
           "XDG_STATE_HOME": str(scratch / "state")}  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.security.forks"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env,
    )  # fmt: skip

    def run(*words: object, kill_after_s: float = -1.0) -> tuple[str, float]:
        assert process.stdin is not None
        assert process.stdout is not None
        began = time.monotonic()
        process.stdin.write(json.dumps([kill_after_s, *map(str, words)]) + "\n")
        process.stdin.flush()
        return process.stdout.readline().strip(), time.monotonic() - began

    with process:
        yield run
        process.stdin.close()  # type: ignore[union-attr]
    left = [path.name for path in scratch.iterdir() if path.name.startswith(".deploykit")]
    assert len(left) <= 1  # a next process sweeps it


@pytest.fixture
def place(tmp_path: Path, linear: Artifact) -> Path:
    """A model to prune, data, and the model in ONNX."""
    (tmp_path / "net.py").write_text(NET)
    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x, target=np.arange(64) % 4)
    np.savez(tmp_path / "input.npz", input=x, target=np.arange(64) % 4)
    shutil.copy(linear.path, tmp_path / "linear.onnx")
    (tmp_path / "results").mkdir()
    return tmp_path


def stage(name: str, place: Path, *, second: bool) -> tuple[object, ...]:
    """The words of a stage, with options that give the first or the second result."""
    net = (f"{place / 'net.py'}:net", "--input-shape", "input:1x3")
    model, data = place / "linear.onnx", place / "d.npz"
    return {
        "prune": ("prune", *net, "--ratio", "0.5" if second else "0.25"),
        "export": ("export", *net, "--opset", "19" if second else "18"),
        "distill": ("distill", *net, "--teacher", net[0], "--data", place / "input.npz",
                    "--epochs", "1", "--seed", str(int(second))),
        "convert": ("convert", model, "--data", data, "--precision", "fp16",
                    "--opset", "17" if second else "18"),
        "quantize": ("quantize", model, "--calibration-data", data, "--calibration-samples",
                     "32" if second else "64"),
        "build": ("build", model, "--shapes-from", data, "--optimization-level", int(second)),
    }[name]  # fmt: skip


STAGES = ("prune", "export", "distill", "convert", "quantize", "build")
SHARE = -(-KILLS // (len(STAGES) + 6))
without_tensorrt = pytest.mark.skipif(
    building.unavailable() is not None, reason=str(building.unavailable())
)


@pytest.mark.parametrize("name", [*STAGES[:-1], pytest.param("build", marks=without_tensorrt)])
def test_a_stage(name: str, place: Path, forks: Run) -> None:
    out, rng = place / "results" / "made", random.Random(name)
    keys, seconds = [], 0.0
    for second in (False, True):
        code, seconds = forks(*stage(name, place, second=second), "-o", out, "--force")
        made = store.read(out)
        assert code == "0"
        assert made is not None
        keys.append(made.history[-1].key)
    assert keys[0] != keys[1]
    killed = 0
    for turn in range(SHARE):
        words = (*stage(name, place, second=turn % 2 == 1), "-o", out, "--force")
        killed += forks(*words, kill_after_s=rng.uniform(0, seconds))[0] == "killed"
        found = store.read(out)
        assert found is not None
        assert found.history[-1].key in keys
    assert killed or SHARE < 3
    found = store.read(out)
    assert found is not None
    second = found.history[-1].key == keys[0]  # the other one: it is made anew
    assert forks(*stage(name, place, second=second), "-o", out, "--force")[0] == "0"
    assert {p.name for p in out.parent.iterdir()} <= {"made", "made.record.json"}


@pytest.fixture
def bundles(place: Path, linear: Artifact, data: Dataset) -> list[Path]:
    """Versions 1 to 3 of a bundle."""
    made = []
    for version in (1, 2, 3):
        options = PackageOptions(name="net", layout="triton", version=version)
        made.append(place / f"v{version}")
        package([(linear, "ort-cpu")], options, out=made[-1], data=data)
    return made


def test_package(place: Path, forks: Run) -> None:
    out, rng = place / "results" / "bundle", random.Random(1)

    def words(version: int) -> tuple[object, ...]:
        given = ("--data", place / "d.npz", "--layout", "triton", "--name", "net")
        return ("package", place / "linear.onnx", *given, "--version", version, "-o", out)

    assert forks(*words(1))[0] == "0"
    seconds = forks(*words(2), "--force")[1]
    for turn in range(SHARE):
        forks(*words(1 + turn % 2), "--force", kill_after_s=rng.uniform(0, seconds))
        assert verify(out).version in (1, 2)
    assert forks(*words(2), "--force")[0] == "0"
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_sign(bundles: list[Path], place: Path, forks: Run) -> None:
    pytest.importorskip("model_signing", reason="model-signing is not installed: deploykit[sign]")
    from cryptography.hazmat.primitives.asymmetric import ec

    from tests.bundle.test_signature import write_key

    key, rng = (
        write_key(place / "key.pem", ec.generate_private_key(ec.SECP256R1())),
        random.Random(2),
    )
    public = key.with_suffix(".pub")
    shutil.copytree(bundles[0], place / "once")
    seconds = forks("sign", place / "once", "--private-key", key)[1]
    for turn in range(SHARE):
        bundle = Path(shutil.copytree(bundles[0], place / f"signed{turn}"))
        forks("sign", bundle, "--private-key", key, kill_after_s=rng.uniform(0, seconds))
        if (bundle / "signature.json").exists():
            assert "signature is sound" in str(verify(bundle, public_key=public))
        else:
            assert "it is not signed" in str(verify(bundle))
        sign(bundle, key, force=True)
        assert verify(bundle, public_key=public)
        assert not list(place.glob(f".signed{turn}*"))


@pytest.mark.parametrize("name", ["publish", "rollback"])
def test_the_repository(name: str, bundles: list[Path], place: Path, forks: Run) -> None:
    rng, pristine = random.Random(name), place / "pristine"
    for bundle in bundles[: 1 if name == "publish" else 2]:
        assert forks("publish", bundle, pristine)[0] == "0"
    before, after = ((1,), (1, 2)) if name == "publish" else ((1, 2), (1,))

    def words(repository: Path) -> tuple[object, ...]:
        what = (bundles[1], repository) if name == "publish" else (repository, "net")
        return (name, *what)

    once = Path(shutil.copytree(pristine, place / "once"))
    seconds = forks(*words(once))[1]
    for turn in range(SHARE):
        repository = Path(shutil.copytree(pristine, place / f"repository{turn}"))
        forks(*words(repository), kill_after_s=rng.uniform(0, seconds))
        net = repository / "net"
        served = served_versions(net)
        assert served in (before, after)
        for version in served:
            model = (bundles[version - 1] / f"net/{version}/model.onnx").read_bytes()
            assert (net / str(version) / "model.onnx").read_bytes() == model
        assert forks("publish", bundles[2], repository)[0] == "0"
        assert served_versions(net)[-1] == 3
        assert not list(net.rglob(".*.tmp-*"))


def test_bench(place: Path, forks: Run) -> None:
    out, rng = place / "results" / "bench.json", random.Random(3)

    def words(seed: int) -> tuple[object, ...]:
        short = ("--preset", "quick", "--processes", "1", "--blocks", "15", "--block-ms", "2")
        given = ("--data", place / "d.npz", "--backend", "ort-cpu", "--seed", seed)
        return ("bench", place / "linear.onnx", *given, *short, "-o", out, "--force")

    assert forks(*words(0))[0] == "0"
    seconds = forks(*words(1))[1]
    for turn in range(SHARE):
        forks(*words(turn % 2), kill_after_s=rng.uniform(0, seconds))
        found = _json.read(out)
        assert found["measurements"]
        assert found["options"]["seed"] in (0, 1)  # type: ignore[index, call-overload]
    assert forks(*words(0))[0] == "0"
    assert [path.name for path in out.parent.iterdir()] == ["bench.json"]


RECIPE = """
name = "net"
[model]
factory = "net.py:net"
inputs = [{ name = "input", dtype = "float32", shape = ["batch", 3] }]
[data]
calibration = "input.npz"
evaluation = "held.npz"
[gates]
metric = "agreement"
max_drop = 0.9
min_speedup = 0.01
[quantize]
target = "ort-cpu"
scope = "compute"
calibration_method = "minmax"
corrections = []
[bench]
preset = "quick"
processes = 1
blocks = 15
block_ms = 2
backends = ["ort-cpu"]
[package]
layout = "triton"
"""


def test_run(place: Path, forks: Run) -> None:
    """What lies in its folder is whole, and the same run again goes on to its end."""
    x = np.random.default_rng(1).standard_normal((64, 3)).astype(np.float32)
    np.savez(place / "held.npz", input=x, target=np.arange(64) % 4)
    (place / "recipe.toml").write_text(RECIPE)
    words, rng = ("run", place / "recipe.toml", "-o"), random.Random(4)
    code, seconds = forks(*words, place / "once")
    assert code in ("0", "7")  # which of two tiny models is faster is left to the machine
    for turn in range(SHARE):
        out = place / "results" / str(turn)
        forks(*words, out, kill_after_s=rng.uniform(0, seconds))
        for path in (*out.glob("work/*.onnx"), *out.glob("*.json"), *out.glob("bundle")):
            if path.suffix == ".onnx":
                assert store.read(path) is not None
            elif path.name == "bundle":
                assert verify(path)
            else:
                assert _json.read(path)
        assert forks(*words, out)[0] in ("0", "7")
        assert (out / "report.html").exists()
        assert not list(out.rglob(".*.tmp-*"))
