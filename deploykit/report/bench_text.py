"""What a bench found, in words: rows of tables and sentences, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence

from deploykit.measure import BenchResult, Comparison, proof, statistics
from deploykit.measure.result import ScenarioRun
from deploykit.report.summary import DASH, interval, measurement, ran_as, size, speedup
from deploykit.values import Interval, Kernel, Measurement

TIMES = (
    "engine", "batch", "ran as", "p50 ms", "p90 ms", "p99 ms", "samples/s", "speed-up", "claim",
)  # fmt: skip
APART = ("engine", "batch", "load ms", "first run ms", "peak memory", "processes", "calls")
KERNELS = ("kernel", "us", "share", "ran as", "for")
HOW_TO_READ = (
    "Brackets are 95 % intervals. A claim needs p < 0.05, corrected for the number of engines "
    "(Holm), and more than the noise floor."
)
LOADGEN = (
    "Latency of scenarios is from the scheduled arrival to the end. These are no MLPerf results."
)
NOT_SERVED = (
    "Times are the engine's, host to host in its own process; a server's are not among them "
    "(`deploykit package --slo` measures those)."
)
WORTH_TELLING = 0.05
"""Share of the kernels' time."""


def times(result: BenchResult) -> list[tuple[str, ...]]:
    """A row of TIMES for each measurement."""
    rows = []
    claims = {size: statistics.compare_all(result, size) for size in result.batch_sizes}
    for m in result.measurements:
        if m.invalid:
            rows.append((m.name, str(m.batch_size), "INVALID", *[DASH] * 6))
            continue
        base = measurement(result, result.baseline, m.batch_size)
        rows.append(
            (
                m.name,
                str(m.batch_size),
                ran_as(m.placement.precisions),
                *_percentiles(m, (50, 90, 99)),
                interval(statistics.throughput(m), 0),
                interval(speedup(base, m), 2, "x"),
                _claim(m.name, result, claims[m.batch_size].get(m.name)),
            )
        )
    return rows


def apart(result: BenchResult) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """APART, with the metric if there is one, and its rows: what is none of the latency's."""
    metric = {score.metric for score in result.scores.values()}
    devices = any(m.device_memory_bytes is not None for m in result.measurements)
    meters = dict.fromkeys(
        meter for m in result.measurements if not m.invalid for meter in m.energy_uj
    )
    rows = [
        (
            m.name,
            str(m.batch_size),
            f"{m.load_ns / 1e6:.1f}",
            f"{m.first_run_ns / 1e6:.1f}",
            size(m.peak_rss_bytes),
            str(max(1, len(m.process_blocks))),
            str(sum(map(len, m.blocks_ns))),
            *([_size(m.device_memory_bytes)] if devices else []),
            *_energy(m, list(meters)),
            *([interval(_score(result, m.name), 4)] if result.scores else []),
        )
        for m in result.measurements
        if not m.invalid
    ]
    gpu = ("GPU memory",) if devices else ()
    return (*APART, *gpu, *(f"mJ/sample, {meter}" for meter in meters), *metric), rows


def _size(size_bytes: int | None) -> str:
    return DASH if size_bytes is None else size(size_bytes)


def _energy(measured: Measurement, meters: Sequence[str]) -> list[str]:
    told = statistics.energy_mj(measured) if meters else {}
    return [interval(told.get(meter), 2) for meter in meters]


def kernels(measured: Measurement, count: int) -> list[tuple[str, ...]]:
    """A row of KERNELS for each of the longest."""
    whole = sum(kernel.microseconds for kernel in measured.kernels) or 1
    return [
        (
            k.operator,
            f"{k.microseconds:.1f}",
            f"{k.microseconds / whole:.1%}",
            k.precision or DASH,
            _origin(k),
        )
        for k in measured.kernels[:count]
    ]


def sentences(result: BenchResult) -> list[str]:
    """What else there is to say, and how to read the numbers."""
    tell = (_invalid, _together, _scenarios, _floors, _overhead, _what_else, _kept)
    return [line for each in tell for line in each(result)]


def profiled(result: BenchResult) -> list[Measurement]:
    """Those whose kernels are known, at the first batch size, without the control."""
    first = result.batch_sizes[0]
    return [
        m
        for m in result.measurements
        if m.kernels and not m.invalid and m.batch_size == first and m.name != result.control
    ]


def _origin(kernel: Kernel) -> str:
    """The module and the nodes that a kernel is for, else what the runtime calls it."""
    nodes = ", ".join(kernel.nodes or kernel.names)
    known = [part for part in (kernel.module, nodes) if part]
    return ": ".join(dict.fromkeys(known)) or DASH


def _percentiles(measured: Measurement, percents: Sequence[float]) -> list[str]:
    """With intervals; where the calls are too few to tell, what they are not below."""
    return [
        interval(found, 3)
        if found
        else f">= {statistics.percentile_bound_ms(measured, percent):.3f}"
        for percent, found in zip(
            percents, statistics.percentile_intervals_ms(measured, percents), strict=True
        )
    ]


def _claim(name: str, result: BenchResult, found: Comparison | None) -> str:
    """What may be said of the speed-up, with its p-value."""
    if found:
        return f"{found.claim}, {_p(found.p_value)}"
    return {result.baseline: "baseline", result.control: "control"}.get(name, DASH)


def _score(result: BenchResult, name: str) -> Interval | None:
    found = result.scores.get(name)
    return found.score if found else None


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _invalid(result: BenchResult) -> list[str]:
    return [
        f"INVALID {m.name} (batch {m.batch_size}): {m.invalid}."
        for m in result.measurements
        if m.invalid
    ]


def failed(result: BenchResult) -> list[str]:
    """What is a no, or must not be used, beside the measurements: a phrase each."""
    parts = (
        (sum(bool(each.invalid) for each in result.instances), "runs of instances are INVALID"),
        (sum(not run.valid for run in result.scenarios), "scenarios are INVALID"),
        (sum(search.rate is None for search in result.slos), "objectives hold at no rate"),
        (sum(each.regressed for each in result.slowdowns), "engines are slower than allowed"),
        (sum(each.regressed for each in result.drops), "engines lose more than allowed"),
    )
    return [f"{count} {what}" for count, what in parts if count]


def _together(result: BenchResult) -> list[str]:
    """Throughput of instances that ran at the same time, a line each."""
    lines = []
    for each in result.instances:
        told = f"{len(each.blocks_ns)} at once: {each.name} (batch {each.batch_size}): "
        if each.invalid:
            lines.append(f"{told}INVALID: {each.invalid}")
            continue
        rate = interval(statistics.throughput_together(each), 0)
        lines.append(f"{told}{rate} samples/s{', sharing cores' if each.shared else ''}")
    return lines


def _scenarios(result: BenchResult) -> list[str]:
    """What LoadGen says, a line each."""
    lines = [f"{run.scenario} by LoadGen: {run.name}: {_played(run)}." for run in result.scenarios]
    for search in result.slos:
        if search.invalid:
            told = f"INVALID: {search.invalid}"
        elif search.rate is None:
            told = f"no rate holds {search.slo}"
        else:
            told = (
                f"holds {search.slo} up to {search.rate:.4g} samples/s (confirmed for "
                f"{search.runs[-1].seconds:g} s with another seed: {_played(search.runs[-1])})"
            )
        lines.append(f"server by LoadGen: {search.name}: {told}.")
    return [*lines, LOADGEN] if lines else []


def _played(run: ScenarioRun) -> str:
    if run.invalid:
        return f"INVALID: {run.invalid}"
    told = [f"{run.rate:.4g}/s asked"] if run.rate else []
    if run.samples_per_second:
        told.append(f"{run.samples_per_second:.4g} samples/s")
    told += [f"{p} {time:.3f} ms" for p, time in run.latencies_ms.items()]
    told.append(f"{run.queries} queries")
    return ", ".join(told) + ("" if run.valid else f", LoadGen says INVALID: {run.reason}")


def _floors(result: BenchResult) -> list[str]:
    """What the speed-ups are over, with its time, and what is noise: a line a batch size."""
    lines = []
    for batch in result.batch_sizes:
        pair = [result.of(name, batch) for name in (result.baseline, result.control)]
        if broken := next((m for m in pair if m.invalid), None):
            lines.append(
                f"Batch {batch}: no speed-up and no noise floor: {broken.name} is invalid."
            )
            continue
        floor = interval(statistics.noise_floor(result, batch), 3, "x")
        (time,) = _percentiles(pair[0], (50,))
        lines.append(
            f"Batch {batch}: speed-up over {result.baseline}, {time} ms; noise floor {floor}."
        )
    return [*lines, HOW_TO_READ]


def _overhead(result: BenchResult) -> list[str]:
    """Engines that spend much of their time on no operator of the model."""
    lines = []
    for m in profiled(result):
        alone, moved = (proof.share_of(m.kernels, o) for o in (proof.ALONE, proof.REFORMATTING))
        parts = ((alone, "quantizing and dequantizing alone"), (moved, "reformatting and casting"))
        if told := [f"{share:.0%} on {what}" for share, what in parts if share >= WORTH_TELLING]:
            lines.append(f"{m.name}: spends {' and '.join(told)}.")
    return lines


def _what_else(result: BenchResult) -> list[str]:
    """What memory and energy are of, and what the times are not."""
    valid = [m for m in result.measurements if not m.invalid]
    if any(m.energy_uj for m in valid):
        lines = ["Energy is that of the whole device while a block ran, other programs' included."]
    else:
        lines = ["Energy is not told by this machine."]
    if any(m.device_memory_bytes is not None for m in valid):
        lines.append(
            "GPU memory is what was in use after the first run and not before the model was opened."
        )
    return [*lines, NOT_SERVED]


def _kept(result: BenchResult) -> list[str]:
    """What a gate found, a line each."""
    slower = [
        f"{s.name} (batch {s.batch_size}): {interval(s.slowdown, 3, 'x')} the time of the earlier "
        f"run, {_p(s.p_value)}, noise floor {s.floor:.3f}x: "
        f"{'REGRESSION' if s.regressed else 'no regression'} (allowed {1 + s.limit:.3f}x)."
        for s in result.slowdowns
    ]
    return slower + [
        f"{d.name}: {d.metric} {interval(d.drop, 4)} lower than {d.reference}: "
        f"{'LOST TOO MUCH' if d.regressed else 'kept'} (allowed {d.limit:g})."
        for d in result.drops
    ]
