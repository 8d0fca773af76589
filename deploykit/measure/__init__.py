"""The benchmark: models in, raw times and honest comparisons out."""

from __future__ import annotations

from deploykit.measure.result import (
    BenchOptions,
    BenchResult,
    Candidate,
    read_result,
    write_result,
)
from deploykit.measure.run import bench
from deploykit.measure.statistics import (
    Comparison,
    compare_speed,
    faster,
    noise_floor,
    percentile_interval_ms,
    percentile_ms,
    speedup,
    throughput,
)

__all__ = [
    "BenchOptions",
    "BenchResult",
    "Candidate",
    "Comparison",
    "bench",
    "compare_speed",
    "faster",
    "noise_floor",
    "percentile_interval_ms",
    "percentile_ms",
    "read_result",
    "speedup",
    "throughput",
    "write_result",
]
