"""How fast a bundle is verified, and how soon a published one is ready on a real Triton.

    python -m benchmarks.serving --triton ENV --output benchmarks/results/serving.json

ENV is a virtual environment with nvidia-pytriton==0.7.0 and onnxruntime. Files are in the page
cache: it is the work that is timed, not the disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import onnx
from cryptography.hazmat.primitives.asymmetric import ec
from onnx import TensorProto, helper, numpy_helper

from deploykit import environment
from deploykit.bundle import (
    PackageOptions,
    PublishOptions,
    integrity,
    package,
    publish,
    sign,
    verify,
)
from deploykit.dataset import open_dataset
from deploykit.formats import open_model
from tests.bundle.test_signature import write_key
from tests.bundle.triton_server import running

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "bundle-2"
ROUNDS = 7


def large(folder: Path, mebibytes: int) -> Path:
    """A bundle of one matrix of this size."""
    rows = mebibytes * (1 << 20) // 4 // 1024
    weights = np.random.default_rng(0).standard_normal((1024, rows), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1024])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", rows])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "large.onnx")
    np.savez(folder / "d.npz", x=np.ones((2, 1024), np.float32))
    options = PackageOptions(golden_samples=1)
    models = [(open_model(folder / "large.onnx"), "ort-cpu")]
    package(models, options, out=folder / "large", data=open_dataset(folder / "d.npz"))
    return folder / "large"


def seconds(work: object, *arguments: object) -> float:
    """Time of one call."""
    began = perf_counter()
    work(*arguments)  # type: ignore[operator]
    return perf_counter() - began


def raw(bundle: Path) -> None:
    """Read and hash every file, and nothing else."""
    for path in sorted(bundle.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")


def verifying(folder: Path, mebibytes: int) -> dict[str, object]:
    """Interleaved rounds of sha256 alone, of the check of files, and of the whole command."""
    bundle = large(folder, mebibytes)
    works = {"sha256_s": raw, "files_checked_s": integrity.check, "verified_s": verify}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            times[name].append(seconds(work, bundle))
    share = median(a / b for a, b in zip(times["sha256_s"], times["files_checked_s"], strict=True))
    return {"bundle_mebibytes": mebibytes, **times, "share_of_sha256_speed": share}


def publishing(folder: Path, triton: Path) -> dict[str, object]:
    """From the call to the answers of the server, which is ready: of the demo model, signed.

    One that nobody signed is first read by a process with limits, which takes its time.
    """
    model = open_model(next(GOLDEN.glob("*/2/model.onnx")))
    data = open_dataset(ROOT / "calibration_data" / "fashion_mnist" / "calibration.npz")
    key = write_key(folder / "key.pem", ec.generate_private_key(ec.SECP256R1()))
    found, alone, unsigned = [], [], []
    (folder / "server").mkdir()
    with running(triton, folder / "server") as server:
        for version in range(1, ROUNDS + 1):
            out = folder / f"v{version}"
            options = PackageOptions(name="demo", layout="triton", version=version)
            package([(model, "ort-cpu")], options, out=out, data=data)
            unsigned.append(seconds(lambda out=out: publish(out, folder / "unsigned")))
            sign(out, key)
            to, by = PublishOptions(url=server.grpc), {"public_key": key.with_suffix(".pub")}
            found.append(
                seconds(lambda out=out, to=to, by=by: publish(out, server.repository, to, **by))
            )
            alone.append(seconds(lambda out=out, by=by: publish(out, folder / "no-server", **by)))
    return {
        "publish_to_ready_s": found,
        "of_which_deploykit_s": alone,
        "unsigned_without_server_s": unsigned,
        "median_s": median(found),
        "median_of_deploykit_s": median(alone),
        "median_unsigned_without_server_s": median(unsigned),
    }


def main() -> None:
    """Measure, print, and keep the result with its environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--triton", type=Path, required=True)
    parser.add_argument("--mebibytes", type=int, default=256)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "schema": "deploykit.benchmark.serving/1",
            "verify": verifying(Path(folder), asked.mebibytes),
            "publish": publishing(Path(folder), asked.triton),
            "environment": environment.read().model_dump(mode="json"),
        }
    asked.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=1))


if __name__ == "__main__":
    main()
