"""Killed at random moments, each command leaves the old thing or the whole new one."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploykit.bundle import PackageOptions, package, publish, verify
from deploykit.bundle.publishing import served_versions
from deploykit.dataset import Dataset
from deploykit.values import Artifact

KILLS = int(os.environ.get("DEPLOYKIT_KILLS", "10"))
"""For each command; the nightly run takes 100."""
CODE = """
import sys, time
from pathlib import Path
from deploykit.bundle import publish, package, PackageOptions
from deploykit.dataset import open_dataset
from deploykit.formats import open_model
import deploykit.bundle.publishing, deploykit.backends.ort, onnxruntime, tritonclient.grpc, onnx
kind, source, data, out = sys.argv[1:]
print("ready", flush=True)
if kind == "publish":
    publish(Path(source), Path(out))
else:
    options = PackageOptions(name="net", layout="triton", version=2)
    package([(open_model(source), "ort-cpu")], options, out=Path(out), data=open_dataset(data),
            force=True)
"""


def kill_while(arguments: list[str], rng: random.Random, longest_s: float) -> bool:
    """Start, wait until it is about to work, kill after a while; whether it was still running."""
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(rng.uniform(0, longest_s))
    alive = process.poll() is None
    process.kill()
    process.wait()
    process.stdout.close()
    return alive


@pytest.mark.parametrize("kind", ["publish", "package"])
def test_a_killed_command_leaves_old_or_new(
    kind: str, linear: Artifact, data: Dataset, tmp_path: Path
):
    rng, repository = random.Random(5), tmp_path / "repository"
    made = []
    for version in (1, 2):
        options = PackageOptions(name="net", layout="triton", version=version)
        made.append(tmp_path / f"v{version}")
        package([(linear, "ort-cpu")], options, out=made[-1], data=data)
    publish(made[0], repository)
    pristine = Path(shutil.copytree(repository, tmp_path / "pristine"))
    killed = 0
    for _ in range(KILLS):
        if kind == "publish":
            shutil.rmtree(repository)
            shutil.copytree(pristine, repository)
            arguments = [kind, str(made[1]), data.reference, str(repository)]
        else:
            arguments = [kind, str(linear.path), data.reference, str(made[0])]
        killed += kill_while(arguments, rng, 0.15)
        if kind == "publish":
            net = repository / "net"
            served = served_versions(net)
            assert served in ((1,), (1, 2))
            assert all((net / str(version) / "model.onnx").is_file() for version in served)
            if served == (1,):
                assert publish(made[1], repository).versions == (1, 2)
            assert not [p for p in net.iterdir() if p.name.startswith(".") and "tmp" in p.name]
        else:
            assert verify(made[0]).version in (1, 2)
    assert killed
