"""What is asked of a benchmark, and what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import ConfigDict, Field

from deploykit import _files, _json
from deploykit.environment import Environment
from deploykit.errors import UsageError, did_you_mean
from deploykit.measure.protocol import Scenario
from deploykit.values import Artifact, Interval, Measurement, Score, Value, parse

MIN_BLOCKS = 15
"""Fewer blocks carry no interval (google-benchmark and criterion take 15 and more)."""

Preset = Literal["quick", "standard", "full"]


class Effort(NamedTuple):
    """How many processes an engine gets, and how long they are timed in all."""

    blocks: int
    block_ms: float
    warmup_ms: float
    """Of each process."""
    processes: int


PRESETS: dict[Preset, Effort] = {
    "quick": Effort(blocks=21, block_ms=50, warmup_ms=150, processes=3),
    "standard": Effort(blocks=96, block_ms=100, warmup_ms=300, processes=8),
    "full": Effort(blocks=320, block_ms=500, warmup_ms=1000, processes=16),
}
"""For one candidate beside the baseline and its control: about 10, 60 and 600 seconds."""


class Candidate(Value):
    """A model and the backend to run it on; names are unique in a run."""

    name: str
    artifact: Artifact
    backend: str
    family: str = ""
    """Models that should agree: outputs are held against the first candidate of the family."""


class BenchOptions(Value):
    """How to measure."""

    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1,), min_length=1, description="Samples in one call; each size is measured apart."
    )
    instances: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="How many at the same time, for throughput: each number is measured apart."
    )
    scenarios: tuple[Scenario, ...] = Field(
        (),
        description="Played by MLPerf LoadGen after that, for the preset's time each: "
        "single-stream, multi-stream, offline, server. No MLPerf results.",
    )
    slo: str | None = Field(
        None,
        description="As in p99=5ms: find the highest rate of Poisson arrivals that holds it.",
    )
    threads: int = Field(1, ge=1, description="Threads and CPU cores of each model.")
    preset: Preset = Field(
        "standard",
        description="About 10, 60 or 600 seconds for one candidate beside the baseline. Numbers "
        "of quick are not to be compared with those of another run.",
    )
    processes: int | None = Field(
        None,
        ge=1,
        description="Fresh processes for each model, one after the other, instead of the preset's; "
        "they share the blocks. The interval of 1 misses what another process would give.",
    )
    blocks: int | None = Field(
        None, ge=MIN_BLOCKS, description="Blocks of calls for each model, instead of the preset's."
    )
    block_ms: float | None = Field(
        None, gt=0, description="Length of a block in milliseconds, instead of the preset's."
    )
    warmup_ms: float | None = Field(
        None, gt=0, description="Least warm-up in milliseconds, instead of the preset's."
    )
    max_seconds: float = Field(
        120.0,
        gt=0,
        description="Time for a model to load, and to be silent beyond what it was asked to do; "
        "then it is stopped.",
    )
    seed: int = Field(0, ge=0, description="Seed of the order of blocks and of random inputs.")

    @property
    def effort(self) -> Effort:
        """The preset with what was given instead."""
        preset = PRESETS[self.preset]
        return Effort(
            self.blocks or preset.blocks,
            self.block_ms or preset.block_ms,
            self.warmup_ms or preset.warmup_ms,
            self.processes or preset.processes,
        )


class Instances(Value):
    """Blocks of several instances of one engine that ran at the same time."""

    name: str
    batch_size: int
    blocks_ns: tuple[tuple[tuple[int, ...], ...], ...]
    """`[i][j][k]` is call k of block j of instance i; blocks of equal index ran at once."""
    affinity: tuple[tuple[int, ...], ...]
    shared: bool
    """Whether the instances had to share cores."""
    invalid: str | None = None


class ScenarioRun(Value):
    """One scenario, as LoadGen tells it; latency is a query's, from when it was scheduled."""

    name: str
    batch_size: int
    """Samples in one call; a query of the server scenario has one."""
    scenario: Scenario
    seconds: float
    seed: int
    rate: float | None
    """Samples a second that were to arrive, of the server scenario."""
    affinity: tuple[int, ...]
    queries: int = 0
    samples_per_second: float | None = None
    """Completed; LoadGen does not tell it of every scenario."""
    latencies_ms: dict[str, float] = {}
    """By percentile, as in `p99`, where the queries are enough to tell it."""
    late: int = 0
    """Queries over the latency bound."""
    valid: bool = False
    reason: str = ""
    early_stopping: str = ""
    """LoadGen's verdict, and why."""
    loadgen: str = ""
    """Its version."""
    invalid: str | None = None
    """Why there is no result: a crash, a hang, outputs that changed."""


class SloSearch(Value):
    """The highest rate at which a latency objective holds."""

    name: str
    batch_size: int
    slo: str
    rate: float | None
    """Samples a second, confirmed with another seed; None where none was."""
    runs: tuple[ScenarioRun, ...]
    invalid: str | None = None


class Slowdown(Value):
    """An engine's time beside that of an earlier run, as a ratio of medians; above 1 is slower."""

    name: str
    batch_size: int
    slowdown: Interval
    floor: float
    """What is noise: the largest of the two runs' floors and of how much the machine changed."""
    p_value: float
    """That there is no difference; corrected for all engines (Holm 1979)."""
    limit: float
    """The share that it may be slower, 0.03 for 3 %."""
    regressed: bool


class Drop(Value):
    """How much lower an engine scores than its reference."""

    name: str
    reference: str
    metric: str
    drop: Interval
    limit: float
    regressed: bool
    """Above the limit, and not by chance: the interval lies above 0."""


class BenchResult(Value):
    """All raw times of a run, and what is needed to judge them.

    The control is the baseline once more, in a process of its own: see `noise_floor`.
    """

    schema_: Literal["deploykit.bench/1"] = Field(default="deploykit.bench/1", alias="schema")
    baseline: str
    control: str
    measurements: tuple[Measurement, ...]
    instances: tuple[Instances, ...] = ()
    scenarios: tuple[ScenarioRun, ...] = ()
    slos: tuple[SloSearch, ...] = ()
    options: BenchOptions
    inputs: Literal["real", "random"]
    data_digest: str | None
    environment: Environment
    """Before the run."""
    load_average_after: float
    frequency_mhz_after: float | None = None
    others_share: float | None = None
    """Share of the machine's CPU time that other processes took during the run, if it is told."""
    disturbances: tuple[str, ...] = ()
    """Those of the notes that say what about the machine made the times noisy."""
    steal_share: float | None
    """Share of CPU time that the hypervisor gave to others during the run, where it is told."""
    scores: dict[str, Score] = {}
    """Of each engine, where a metric was asked for."""
    slowdowns: tuple[Slowdown, ...] = ()
    drops: tuple[Drop, ...] = ()
    """What a gate found beside an earlier run."""
    notes: tuple[str, ...] = ()
    """What a reader must know before using the numbers, one sentence each."""

    model_config = ConfigDict(populate_by_name=True)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Those that were measured, each once, in the order asked for."""
        return tuple(dict.fromkeys(self.options.batch_sizes))

    def of(self, name: str, batch_size: int) -> Measurement:
        """The measurement of a candidate at a batch size. Raises UsageError: there is none."""
        found = {m.name: m for m in self.measurements if m.batch_size == batch_size}
        if name not in found:
            raise UsageError(
                f"no measurement of {name!r} at batch size {batch_size}",
                hint=did_you_mean(name, found or map(str, self.options.batch_sizes)),
            )
        return found[name]


def write_result(result: BenchResult, path: Path) -> None:
    """Write a result as JSON; `read_result` gives an equal value back."""
    _files.write_text(path, result.model_dump_json(by_alias=True) + "\n")


def read_result(path: Path) -> BenchResult:
    """Read what `write_result` wrote. Raises InputError."""
    return parse(BenchResult, _json.read(path), str(path))
