"""The bench held against backends of known behaviour: is the truth recovered?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ConfigDict, Field

from deploykit.measure import statistics
from deploykit.measure.fake_worker import SLOWER, STALL_MS, WORKER
from deploykit.measure.result import BenchOptions, BenchResult, Candidate
from deploykit.measure.run import Progress, bench
from deploykit.values import Artifact, Interval, Measurement, TensorSpec, Value

MS = 1.0
"""What a call of the fakes takes."""
ERROR = 0.1
"""Share by which a recovered time may be off, beyond its interval."""
OPTIONS = BenchOptions(
    preset="quick", processes=5, blocks=30, block_ms=60, warmup_ms=200, max_seconds=5
)
BASE, CONTROL = "constant", "constant (again)"


class Check(Value):
    """One behaviour: what is true of it, and what the bench said."""

    behaviour: str
    truth: str
    found: str
    passed: bool


class SelfTest(Value):
    """All checks of a run."""

    schema_: Literal["deploykit.self-test/1"] = Field(
        default="deploykit.self-test/1", alias="schema"
    )
    checks: tuple[Check, ...]
    disturbances: tuple[str, ...]
    """What made the machine noisy meanwhile."""

    model_config = ConfigDict(populate_by_name=True)


class Case(NamedTuple):
    """A fake, and how to tell whether it was seen as what it is."""

    behaviour: str
    truth: str
    look: Callable[[BenchResult, Measurement], tuple[str, bool]]
    milliseconds: float = MS
    fake: str = ""
    """The behaviour of the worker, where it has another name."""


def self_test(progress: Progress | None = None) -> SelfTest:
    """Bench all fakes side by side, as models are benched, and look at what was found."""
    candidates = [_candidate(case) for case in CASES if case.behaviour != CONTROL]
    result = bench(candidates, OPTIONS, data=None, progress=progress, worker=WORKER)
    return SelfTest(
        checks=tuple(_checked(case, result) for case in CASES), disturbances=result.disturbances
    )


def _checked(case: Case, result: BenchResult) -> Check:
    measured = result.of(case.behaviour, 1)
    if measured.invalid and case.look is not _invalid:
        found, passed = f"INVALID: {measured.invalid}", False
    else:
        found, passed = case.look(result, measured)
    return Check(behaviour=case.behaviour, truth=case.truth, found=found, passed=passed)


def _candidate(case: Case) -> Candidate:
    artifact = Artifact(
        path=Path("no-file"),
        format="onnx",
        precision="fp32",
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 16)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 16)),),
        sha256="0" * 64,
    )
    fake = case.fake or case.behaviour
    return Candidate(
        name=case.behaviour, artifact=artifact, backend=f"fake:{fake}:{case.milliseconds}"
    )


def _percentiles(**truth: float) -> Callable[[BenchResult, Measurement], tuple[str, bool]]:
    """Whether percentiles, `p50=1.0` in ms, were recovered."""

    def look(result: BenchResult, measured: Measurement) -> tuple[str, bool]:
        del result
        found = {p: statistics.percentile_interval_ms(measured, float(p[1:])) for p in truth}
        passed = all(_covers(interval, truth[p]) for p, interval in found.items())
        told = [f"{p} {i.value:.3f} ms" if i else f"{p} not told" for p, i in found.items()]
        return ", ".join(told), passed

    return look


def _covers(interval: Interval | None, truth: float) -> bool:
    """Whether the truth is in the interval, or no more than ERROR beside it."""
    if interval is None:
        return False
    return interval.low * (1 - ERROR) <= truth <= interval.high * (1 + ERROR)


def _ratio(truth: float, claim: str) -> Callable[[BenchResult, Measurement], tuple[str, bool]]:
    """Whether the speed-up over the constant fake was recovered, and claimed."""

    def look(result: BenchResult, measured: Measurement) -> tuple[str, bool]:
        found = statistics.compare_speed(result, measured.name, 1)
        ratio = found.speedup
        told = f"{found.claim}, {ratio.value:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}]"
        return told, _covers(ratio, truth) and found.claim == claim

    return look


def _invalid(result: BenchResult, measured: Measurement) -> tuple[str, bool]:
    del result
    return f"INVALID: {measured.invalid}" if measured.invalid else "valid", bool(measured.invalid)


CASES = (
    Case(BASE, f"p50 {MS:g} ms", _percentiles(p50=MS), fake="steady"),
    Case(CONTROL, "no difference to itself", _ratio(1, "no difference")),
    Case("equal", "no difference", _ratio(1, "no difference"), fake="steady"),
    Case("twice", "slower, 0.5x", _ratio(0.5, "slower"), milliseconds=2 * MS, fake="steady"),
    Case(
        "bimodal",
        f"p50 {MS:g} ms, p90 {SLOWER * MS:g} ms",
        _percentiles(p50=MS, p90=SLOWER * MS),
    ),
    Case(
        "stall",
        f"p50 {MS:g} ms, p99 {MS + STALL_MS:g} ms",
        _percentiles(p50=MS, p99=MS + STALL_MS),
    ),
    Case("drift", "no steady state", _invalid),
    Case("wrong output", "void", _invalid, fake="negated"),
    Case("output that changes", "void", _invalid, fake="forgetful"),
    Case("NaN", "void", _invalid, fake="nan"),
    Case("another provider", "void", _invalid, fake="fallen"),
    Case("another precision", "void", _invalid, fake="halved"),
    Case("crash", "void", _invalid),
    Case("hang", "void", _invalid),
    Case("lost completion", "void", _invalid, fake="lost"),
)
