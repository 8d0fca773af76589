from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploykit.dataset import Dataset, open_dataset
from deploykit.measure import BenchOptions, Candidate
from deploykit.measure.fake_worker import WORKER
from deploykit.values import Artifact, Measurement, Placement, SessionOptions, TensorSpec

FAKE_WORKER = WORKER
FAST = BenchOptions(processes=1, blocks=15, block_ms=4, warmup_ms=15, max_seconds=60)

MakeCandidate = Callable[..., Candidate]
MakeMeasurement = Callable[..., Measurement]


@pytest.fixture(scope="session")
def fake() -> MakeCandidate:
    """Makes a candidate of the fake worker: `fake("crash")`, `fake("steady:1.5", name="slow")`."""

    def make(
        behaviour: str, name: str | None = None, batch: int | str = "batch", inputs: str = "x"
    ) -> Candidate:
        artifact = Artifact(
            path=Path("no-such-file.onnx"),
            format="onnx",
            precision="fp32",
            inputs=(TensorSpec(name=inputs, dtype="float32", shape=(batch, 16)),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=(batch, 16)),),
            sha256="0" * 64,
        )
        name = name or behaviour.split(":", maxsplit=1)[0]
        return Candidate(name=name, artifact=artifact, backend=f"fake:{behaviour}")

    return make


@pytest.fixture(scope="session")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """100 samples of `x`, float32 [16], all above 1."""
    path = tmp_path_factory.mktemp("data") / "vectors.npz"
    rng = np.random.default_rng(0)
    np.savez(path, x=1 + rng.random((100, 16), dtype=np.float32))
    return open_dataset(path)


@pytest.fixture
def measured() -> MakeMeasurement:
    """Makes a measurement from blocks of nanoseconds."""

    def make(blocks: object, name: str = "m", batch_size: int = 1, invalid: str | None = None):
        return Measurement(
            name=name,
            backend="fake",
            batch_size=batch_size,
            options=SessionOptions(),
            load_ns=1,
            first_run_ns=1,
            warmup_runs=5,
            blocks_ns=tuple(tuple(int(t) for t in block) for block in blocks),
            placement=Placement(provider="fake", precisions={}),
            peak_rss_bytes=1,
            invalid=invalid,
        )

    return make
