"""Starts a fake worker, says its pid once it works (or idles), and waits to be killed."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from deploykit.measure import feeds
from deploykit.measure.child import Child, ChildError
from deploykit.measure.fake_worker import WORKER
from deploykit.measure.protocol import Open, Opened, Time, Timed
from deploykit.values import Artifact, SessionOptions, TensorSpec

folder, busy = Path(sys.argv[1]), sys.argv[2] == "True"
feeds.write(folder / "pool.npz", [{"x": np.ones((1, 16), np.float32)}])
spec = TensorSpec(name="x", dtype="float32", shape=(1, 16))
artifact = Artifact(
    path=folder, format="onnx", precision="fp32", inputs=(spec,), outputs=(spec,), sha256=""
)
request = Open(
    artifact=artifact, backend="fake:hang", options=SessionOptions(), affinity=(),
    feeds=folder / "pool.npz", outputs=folder / "before.npz",
)  # fmt: skip
with Child(WORKER, folder, threads=1) as child:
    child.ask(request, Opened, 60)
    if busy:  # the twentieth call never ends
        with suppress(ChildError):
            child.ask(Time(start=0, budget_ns=10**12), Timed, 1)
    sys.stdout.write(f"{child.pid}\n")
    sys.stdout.flush()
    time.sleep(1e6)
