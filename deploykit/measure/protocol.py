"""What a benchmark and its worker processes say to each other: one JSON document a line.

The worker answers each request with the answer named in the request's docstring, or with `Failed`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from deploykit.values import Artifact, Kernel, Placement, SessionOptions, Value

Scenario = Literal["single-stream", "multi-stream", "offline", "server"]


class Open(Value):
    """Load the model, run it once, and write its outputs to `outputs`: `Opened`."""

    do: Literal["open"] = "open"
    artifact: Artifact
    backend: str
    options: SessionOptions
    affinity: tuple[int, ...]
    feeds: Path
    outputs: Path


class Opened(Value):
    """The model is loaded.

    `load_ns` is the wall time of opening the session without that of import statements: reading
    the file, building and optimizing. `first_run_ns` is the first call, host to host.
    `yardstick_ns` is the time of `timing.yardstick` before that. `device_bytes` is the memory that
    was in use on the GPUs then and not before; None where that is not told.
    """

    load_ns: int
    first_run_ns: int
    yardstick_ns: int
    affinity: tuple[int, ...]
    device_bytes: int | None = None


class WarmUp(Value):
    """Run until the times are steady: `Warmed`."""

    do: Literal["warm up"] = "warm up"
    min_runs: int
    window_ns: int
    max_ns: int


class Warmed(Value):
    """What warm-up saw: the median time of a call in each window."""

    runs: int
    steady: bool
    window_medians_ns: tuple[int, ...]


class Time(Value):
    """Run for about `budget_ns`, starting with feed `start` of the pool: `Timed`."""

    do: Literal["time"] = "time"
    start: int
    budget_ns: int


class Timed(Value):
    """The time of each call of one block, and what the machine took meanwhile by each meter."""

    calls_ns: tuple[int, ...]
    energy_uj: dict[str, int] = {}


class Drive(Value):
    """Let LoadGen run one scenario: `Driven`."""

    do: Literal["drive"] = "drive"
    scenario: Scenario
    seconds: float
    """The least time."""
    seed: int
    batch_size: int
    """Samples in one call."""
    rate: float
    """Samples a second to send (server), to have ready (offline), else queries to be expected."""
    streams: int
    percent: float
    latency_ns: int
    min_queries: int
    folder: Path
    """For LoadGen's logs."""


class Driven(Value):
    """What LoadGen says of a scenario."""

    queries: int
    per_second: float | None
    """Samples completed; LoadGen does not tell for every scenario."""
    latencies_ns: dict[str, int]
    """By percentile, of a query; none for the offline scenario."""
    late: int
    """Queries over the latency bound."""
    valid: bool
    reason: str
    early_stopping: str
    version: str


class Finish(Value):
    """Run the first feeds again and write their outputs to `outputs`: `Finished`."""

    do: Literal["finish"] = "finish"
    outputs: Path
    profile_runs: int
    """For the account of kernels; 0 for no account of what ran, which takes time."""


class Finished(Value):
    """What is known at the end.

    `peak_rss_bytes` is the process's: interpreter, libraries, pool of feeds and model.
    """

    placement: Placement
    kernels: tuple[Kernel, ...] = ()
    peak_rss_bytes: int


class Failed(Value):
    """Why the request was not done, in one line."""

    failed: str


Request = Open | WarmUp | Time | Drive | Finish
REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="do")])
