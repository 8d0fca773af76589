"""MLPerf LoadGen around a session, in the worker's process. What it gives is no MLPerf result.

An exception in its callback ends it with a segmentation fault, and a completion that is lost makes
it wait for ever: it belongs in a process that is watched.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from math import ceil
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from deploykit._lazy import needs
from deploykit.measure.protocol import Drive, Driven
from deploykit.measure.timing import Calls
from deploykit.values import Json

DETAIL = "mlperf_log_detail.txt"
MARK = ":::MLLOG "
NAMES = {
    "single-stream": "SingleStream", "multi-stream": "MultiStream",
    "offline": "Offline", "server": "Server",
}  # fmt: skip
SHOWN = (50.0, 90.0, 95.0, 97.0, 99.0, 99.9)
"""The percentiles that LoadGen logs."""
LIBRARY_SAMPLES = 1024


def drive(calls: Calls, request: Drive) -> Driven:
    """Run one scenario: LoadGen sends samples, one thread runs them `batch_size` at a time.

    Each sample is completed once, after the call that ran it. Raises MissingError: LoadGen is not
    installed.
    """
    with needs("mlperf_loadgen"):
        import mlperf_loadgen as loadgen
    queue: SimpleQueue[list[int]] = SimpleQueue()
    Thread(target=_serve, args=(calls, request.batch_size, queue, loadgen), daemon=True).start()

    def issue(samples: list[Any]) -> None:
        queue.put([sample.id for sample in samples])

    system = loadgen.ConstructSUT(issue, _nothing)
    library = loadgen.ConstructQSL(LIBRARY_SAMPLES, LIBRARY_SAMPLES, _nothing, _nothing)
    loadgen.StartTestWithLogSettings(
        system, library, _settings(loadgen, request), _logs(loadgen, request.folder)
    )
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(system)
    return driven(read_detail(request.folder / DETAIL))


def _serve(calls: Calls, batch_size: int, queue: SimpleQueue[list[int]], loadgen: Any) -> None:
    """Run and complete what is sent; an exception ends the process, which says it."""
    turn = 0
    try:
        while True:
            ids = queue.get()
            for start in range(0, len(ids), batch_size):
                calls[turn % len(calls)]()
                turn += 1
                part = ids[start : start + batch_size]
                done = [loadgen.QuerySampleResponse(each, 0, 0) for each in part]
                loadgen.QuerySamplesComplete(done)
    except BaseException as error:  # noqa: BLE001 - LoadGen would wait for ever
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(1)


def _nothing(*_: object) -> None:
    """LoadGen's samples are not loaded: the feeds are in place."""


def _settings(loadgen: Any, request: Drive) -> Any:
    found = loadgen.TestSettings()
    found.mode = loadgen.TestMode.PerformanceOnly
    found.scenario = getattr(loadgen.TestScenario, NAMES[request.scenario])
    found.min_duration_ms = ceil(request.seconds * 1e3)
    found.min_query_count = request.min_queries
    seeds = ("qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed")
    for number, name in enumerate(seeds):
        setattr(found, name, request.seed * len(seeds) + number)
    expected_ns = max(1, int(1e9 / request.rate))
    percentile, share = request.percent / 100, "target_latency_percentile"
    match request.scenario:
        case "single-stream":
            found.single_stream_expected_latency_ns = expected_ns
            setattr(found, f"single_stream_{share}", percentile)
        case "multi-stream":
            found.multi_stream_samples_per_query = request.streams
            found.multi_stream_expected_latency_ns = expected_ns
            setattr(found, f"multi_stream_{share}", percentile)
        case "offline":
            found.offline_expected_qps = request.rate
        case "server":
            found.server_target_qps = request.rate
            found.server_target_latency_ns = request.latency_ns
            setattr(found, f"server_{share}", percentile)
    return found


def _logs(loadgen: Any, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    output = loadgen.LogOutputSettings()
    output.outdir = str(folder)
    output.copy_summary_to_stdout = False
    found = loadgen.LogSettings()
    found.log_output = output
    found.enable_trace = False
    return found


def read_detail(path: Path) -> Json:
    """What LoadGen logged, by key; of a key that comes again the values are joined by a blank."""
    found: Json = {}
    for line in path.read_text().splitlines():
        if not line.startswith(MARK):
            continue
        with suppress(ValueError):
            entry = json.loads(line.removeprefix(MARK))
            key, value = entry["key"], entry["value"]
            again = key in found and key.endswith("reason")
            found[key] = f"{found[key]}{value}" if again else value
    return found


def driven(detail: Json) -> Driven:
    """The result in LoadGen's log. Latency is per query, from the time that it was scheduled at."""
    queries = int(detail["result_query_count"])
    kind = "per_query_latency" if "result_mean_query_latency_ns" in detail else "latency"
    find: Callable[[float], Any] = lambda p: detail.get(f"result_{p:.2f}_percentile_{kind}_ns")  # noqa: E731
    offline = detail.get("effective_scenario") == "Offline"
    rates = (
        "result_samples_per_second", "result_completed_samples_per_sec",
        "result_qps_with_loadgen_overhead",
    )  # fmt: skip
    return Driven(
        queries=queries,
        per_second=next((float(detail[name]) for name in rates if name in detail), None),
        latencies_ns={} if offline else {f"{p:g}": int(t) for p in SHOWN if (t := find(p))},
        late=int(detail.get("result_overlatency_query_count", 0)),
        valid=detail.get("result_validity") == "VALID",
        reason=str(detail.get("result_invalid_reason", "")).strip(),
        early_stopping=str(detail.get("early_stopping_result", "")).strip(),
        version=str(detail.get("loadgen_version", "")),
    )
