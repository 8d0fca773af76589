"""Can the bench be trusted? False alarms, a planted slow-down, and what its own loop costs.

    python benchmarks/bench/trust.py OUT.json [--runs 200] [--preset standard] [--planted 1.05]

- A/A: two engines that are the same, beside the baseline; a claim of either is a false alarm.
- planted: an engine that takes so many times as long as the baseline: found where it is claimed.
- overhead: nanoseconds a call of the timed loop beyond a bare loop around the same call, in pairs.

Engines are fakes of a known latency (1 ms) in worker processes as models are, so that the truth is
known; the machine's noise is real. The result tells the machine and its load.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import repeat
from pathlib import Path
from time import perf_counter_ns

from deploykit.environment import read
from deploykit.measure import BenchOptions, BenchResult, Candidate, bench, compare_speed
from deploykit.measure.fake_worker import WORKER
from deploykit.measure.timing import time_block
from deploykit.values import Artifact, TensorSpec

CALLS, PAIRS = 2000, 51


def candidate(name: str, milliseconds: float) -> Candidate:
    spec = {
        tensor: TensorSpec(name=tensor, dtype="float32", shape=("batch", 16)) for tensor in "xy"
    }
    artifact = Artifact(
        path=Path("no-file"),
        format="onnx",
        precision="fp32",
        inputs=(spec["x"],),
        outputs=(spec["y"],),
        sha256="0" * 64,
    )
    return Candidate(name=name, artifact=artifact, backend=f"fake:steady:{milliseconds}")


def run(preset: str, seed: int, others: dict[str, float]) -> BenchResult:
    engines = [candidate("base", 1.0), *(candidate(n, ms) for n, ms in others.items())]
    options = BenchOptions(preset=preset, seed=seed)
    return bench(engines, options, data=None, worker=WORKER)


def told(result: BenchResult, names: dict[str, float]) -> dict[str, object]:
    found = {name: compare_speed(result, name, 1).model_dump(mode="json") for name in names}
    return {
        "claims": found,
        "invalid": {m.name: m.invalid for m in result.measurements if m.invalid},
        "load_average": [result.environment.load_average, result.load_average_after],
        "others_share": result.others_share,
        "steal_share": result.steal_share,
    }


def overhead() -> dict[str, float]:
    """Median nanoseconds a call beyond a bare loop, of pairs that take turns."""

    def nothing() -> None:
        pass

    def bare() -> float:
        began = perf_counter_ns()
        for _ in repeat(None, CALLS):
            nothing()
        return (perf_counter_ns() - began) / CALLS

    def timed() -> float:
        began = perf_counter_ns()
        calls = len(time_block([nothing], 0, 10**9, perf_counter_ns))
        return (perf_counter_ns() - began) / (2 * calls)  # the untimed ramp is as long

    gaps, reported = [], []
    for _ in range(PAIRS):
        gaps.append(timed() - bare())
        reported += time_block([nothing], 0, 10**8, perf_counter_ns)
    return {
        "loop_ns_a_call": statistics.median(gaps),
        "reported_for_nothing_ns": statistics.median(reported),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--preset", default="standard", choices=("quick", "standard", "full"))
    parser.add_argument("--planted", type=float, default=1.05)
    given = parser.parse_args()
    names = {"same": 1.0, "same too": 1.0, "slower": given.planted}
    document = {
        "schema": "deploykit.bench-trust/1",
        "preset": given.preset,
        "planted": given.planted,
        "environment": read().model_dump(mode="json"),
        "overhead": overhead(),
        "runs": [],
    }
    for seed in range(given.runs):
        document["runs"].append(told(run(given.preset, seed, names), names))
        valid = [r["claims"] for r in document["runs"] if not r["invalid"]]
        claim = "claim"
        alarms = [
            any(c[n][claim] != "no difference" for n in names if n != "slower") for c in valid
        ]
        document["false_alarms"] = sum(alarms)
        document["planted_found"] = sum(c["slower"][claim] == "slower" for c in valid)
        document["valid_runs"] = len(valid)
        given.out.write_text(json.dumps(document, indent=1) + "\n")
        print(f"{len(valid)} runs: {sum(alarms)} false alarms, {document['planted_found']} found")


if __name__ == "__main__":
    main()
