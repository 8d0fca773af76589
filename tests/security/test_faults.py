"""Rows 24 to 26 of SECURITY.md: no space, many processes, caches that went bad."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from deploykit import store
from deploykit.bundle import PackageOptions, package, publish
from deploykit.dataset import Dataset
from deploykit.values import Artifact
from tests.cli.conftest import Command
from tests.fixtures_core import python, told
from tests.security.conftest import unchanged

LIMITED = """
import resource, sys
most = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
from deploykit.__main__ import main
main()
"""


def limited(most: int, *words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that may write no file of more than so many bytes: as on a full disk."""
    scratch = folder.parent / f"{folder.name}-scratch"
    scratch.mkdir(exist_ok=True)
    env = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-B", "-c", LIMITED, str(most), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    left = {path.name for path in scratch.iterdir()}
    assert left <= {".ses"}  # of ONNX Runtime
    return done


@pytest.fixture
def made(tmp_path: Path, linear: Artifact, data: Dataset) -> Path:
    """A folder with data, a key and two bundles, the first of them published."""
    folder = tmp_path / "made"
    folder.mkdir()
    for version in (1, 2):
        options = PackageOptions(name="net", layout="triton", version=version)
        package([(linear, "ort-cpu")], options, out=folder / f"v{version}", data=data)
    publish(folder / "v1", folder / "repository")
    return folder


@pytest.mark.parametrize("name", ["sign", "publish", "package", "bench"])
def test_a_full_disk(name: str, made: Path, linear: Artifact) -> None:
    """Prune, export and quantize: tests/cli/test_bad_input.py."""
    np.savez(made / "d.npz", x=np.random.default_rng(0).random((64, 3), np.float32))
    words: tuple[object, ...] = {
        "package": ("package", linear.path, "--data", made / "d.npz", "-o", made / "v1", "--force",
                    "--layout", "triton", "--name", "net", "--version", "9"),
        "publish": ("publish", made / "v2", made / "repository"),
        "sign": ("sign", made / "v1", "--private-key", made / "key.pem"),
        "bench": ("bench", linear.path, "--data", made / "d.npz", "--backend", "ort-cpu",
                  "--preset", "quick", "-o", made / "bench.json"),
    }[name]  # fmt: skip
    if name == "sign":
        pytest.importorskip("model_signing", reason="model-signing is not installed")
        from cryptography.hazmat.primitives.asymmetric import ec

        from tests.bundle.test_signature import write_key

        write_key(made / "key.pem", ec.generate_private_key(ec.SECP256R1()))
    with unchanged(made):
        done = limited(300, *words, folder=made)
    assert done.returncode == 6, done.stderr
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_place_that_takes_no_files(made: Path, deploykit: Command) -> None:
    with unchanged(made):
        told_ = deploykit("publish", made / "v2", "/proc/repository")
    assert told_.code == 2, told_.err
    assert "/proc/repository" in told_.lines[0]


# --- many processes, one key

ONE_KEY = """
import sys, time
from pathlib import Path
from deploykit import store
from deploykit.store import Job, Made
from deploykit.values import Interval
out = Path(sys.argv[1])
def work(path):
    with open(out.parent / "built", "a") as file:
        file.write("x")
    time.sleep(0.3)
    path.write_bytes(b"m" * 300_000)
    return Made(format="torch", precision="fp32", inputs=(), outputs=(), facts={})
print("ready", flush=True); input()
job = Job(stage="make", source=None, options=Interval(value=1, low=2, high=3))
print(store.produce(job, work, out=out).sha256)
"""


def test_of_many_processes_one_builds_and_all_read_it_whole(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    processes = [python(ONE_KEY, out, wait=False) for _ in range(6)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = {told(process)[0] for process in processes}
    found = store.read(out)
    assert found is not None
    assert answers == {f"{found.sha256}\n"}
    assert (tmp_path / "built").read_text() == "x"
    assert {p.name for p in tmp_path.iterdir()} == {"built", "model.onnx", "model.onnx.record.json"}


def test_the_lock_of_a_killed_builder_is_free(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    builder = python(ONE_KEY, out, wait=False)
    assert builder.stdin is not None
    builder.stdin.write("\n")
    builder.stdin.flush()
    while not (tmp_path / "built").exists():
        time.sleep(0.01)
    builder.send_signal(signal.SIGKILL)
    told(builder)
    other = python(ONE_KEY, out, wait=False)
    assert other.communicate("\n", timeout=60)[0].startswith("ready\n")
    assert (tmp_path / "built").read_text() == "xx"
    assert {p.name for p in tmp_path.iterdir()} == {"built", "model.onnx", "model.onnx.record.json"}


# --- caches


@pytest.mark.parametrize("fault", ["torn", "empty", "of other versions"])
def test_a_calibration_cache_that_went_bad_is_made_again(
    fault: str, tmp_path: Path, linear: Artifact, deploykit: Command
) -> None:
    x = np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    cache = tmp_path / "cache.json"
    given = ("--calibration-data", tmp_path / "d.npz", "--calibration-cache", cache)
    assert deploykit("quantize", linear.path, *given, "-o", tmp_path / "a.onnx").code == 0
    whole, text = (tmp_path / "a.onnx").read_bytes(), cache.read_text()
    if fault == "of other versions":
        cache.write_text(json.dumps({**json.loads(text), "key": "another"}))
    else:
        cache.write_text({"torn": text[:-9], "empty": ""}[fault])
    told_ = deploykit("quantize", linear.path, *given, "-o", tmp_path / "b.onnx")
    assert told_.code == 0, told_.err
    assert (tmp_path / "b.onnx").read_bytes() == whole
    assert cache.read_text() == text


def test_a_kept_model_with_a_flipped_bit_is_not_taken(tmp_path: Path, deploykit: Command) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\ndef net():\n    return nn.Tanh()\n")
    words = ("export", f"{tmp_path / 'net.py'}:net", "--input-shape", "input:1x3", "-o")
    out = tmp_path / "m.onnx"
    assert deploykit(*words, out).code == 0
    whole = out.read_bytes()
    out.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert deploykit(*words, out).code == 2  # in the way: it is not what was made
    assert deploykit(*words, out, "--force").code == 0
    assert out.read_bytes() == whole
