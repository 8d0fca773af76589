from __future__ import annotations

import io

import numpy as np
from rich.console import Console

from deploykit import environment
from deploykit.measure import BenchOptions, BenchResult
from deploykit.report import timings
from deploykit.values import Measurement, Placement, SessionOptions


def timed(
    name: str, ms: float, *, batch: int = 1, calls: int = 20, invalid: str | None = None
) -> Measurement:
    """Four processes of ten blocks around a known time, of real spread."""
    rng = np.random.default_rng(len(name) + batch)
    times = (rng.normal(1, 0.01, (40, calls)) * ms * 1e6).astype(int)
    return Measurement(
        name=name, backend="b", batch_size=batch, options=SessionOptions(), load_ns=7_000_000,
        first_run_ns=8_000_000, warmup_runs=5, blocks_ns=tuple(map(tuple, times.tolist())),
        process_blocks=(10,) * 4, placement=Placement(provider="p", precisions={"int8": 5}),
        peak_rss_bytes=99_000_000, invalid=invalid,
    )  # fmt: skip


def shown(*measurements: Measurement, width: int = 250) -> str:
    result = BenchResult(
        baseline="base", control="base (again)", measurements=measurements,
        options=BenchOptions(batch_sizes=tuple({m.batch_size for m in measurements})),
        inputs="real", data_digest=None, environment=environment.read(), load_average_after=0.1,
        steal_share=None, notes=("a note [of] brackets",),
    )  # fmt: skip
    text = io.StringIO()
    timings.show(result, Console(file=text, width=width, highlight=False))
    return text.getvalue()


BASE = (timed("base", 2), timed("base (again)", 2))


def test_each_claim_has_its_p_value_and_the_baseline_its_name_and_time() -> None:
    text = shown(*BASE, timed("fast", 1), timed("same", 2), timed("slow", 3))
    rows = {line.split("  ")[0]: line.strip() for line in reversed(text.splitlines())}
    assert rows["base"].endswith("baseline")
    assert rows["base (again)"].endswith("control")
    assert rows["fast"].endswith("faster, p < 0.001")
    assert rows["slow"].endswith("slower, p < 0.001")
    assert "no difference, p = " in rows["same"]
    assert "Batch 1: speed-up over base, 2.00" in text
    assert " ms; noise floor 1.00" in text
    assert "a note [of] brackets." in text


def test_energy_and_gpu_memory_are_told_where_the_machine_tells_them() -> None:
    told = {"energy_uj": {"CPU packages": (20 * 4000,) * 40}, "device_memory_bytes": 3_000_000}
    base, control = (m.model_copy(update=told) for m in BASE)
    text = shown(base, control, timed("quiet", 2))
    assert "GPU memory  mJ/sample, CPU packages" in text
    row = next(line for line in text.splitlines() if line.startswith("base ") and "3.0 MB" in line)
    assert row.rstrip().endswith("4.00 [4.00, 4.00]")
    assert "Energy is that of the whole device" in text
    assert "GPU memory is what was in use" in text
    text = shown(*BASE)
    assert "Energy is not told by this machine." in text
    assert "GPU memory" not in text
    assert "a server's are not among them" in text


def test_loading_the_first_run_and_memory_are_told_apart() -> None:
    rows = [line.split() for line in shown(*BASE).splitlines()]
    assert ["base", "1", "7.0", "8.0", "99.0", "MB", "4", "800"] in rows


def test_every_batch_size_has_a_baseline_of_its_own() -> None:
    text = shown(*BASE, timed("base", 9, batch=8), timed("base (again)", 9, batch=8))
    assert "Batch 8: speed-up over base, 9.0" in text or "Batch 8: speed-up over base, 8.9" in text


def test_what_must_not_be_used_has_a_reason_and_no_number() -> None:
    text = shown(*BASE, timed("bad", 1, invalid="it [crashed]"))
    (row,) = (line for line in text.splitlines() if line.startswith("bad "))
    assert set(row.split()) == {"bad", "1", "INVALID", "-"}
    assert "INVALID bad (batch 1): it [crashed]." in text


def test_without_a_valid_baseline_nothing_is_claimed() -> None:
    text = shown(timed("base", 2, invalid="gone"), BASE[1], timed("fast", 1))
    assert "Batch 1: no speed-up and no noise floor: base is invalid." in text
    assert "faster" not in text


def test_too_few_calls_for_a_percentile_give_its_bound() -> None:
    text = shown(timed("base", 2, calls=10), BASE[1])  # 400 calls, p99 needs 459
    row = next(line for line in text.splitlines() if line.startswith("base "))
    assert ">= 2.0" in row


def test_a_narrow_terminal_still_has_every_number() -> None:
    text = shown(*BASE, timed("fast", 1), width=100)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
