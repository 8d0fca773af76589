"""The nouns: frozen values that every room speaks. No framework here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deploykit.errors import InputError, did_you_mean

Array = NDArray[Any]
Feed = Mapping[str, Array]
"""One batch: input or output names to arrays whose first axis is the sample."""

Json = dict[str, Any]
Format = Literal["torch", "onnx", "engine"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]

BATCH = "batch"
"""The name of the dynamic dimension that counts samples."""


class Value(BaseModel):
    """Base of the nouns: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


V = TypeVar("V", bound=Value)


def parse(kind: type[V], data: object, where: str) -> V:
    """Make a value from plain data. Raises InputError: what is wrong, where, and what was meant."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _input_error(kind, error, where) from error


def _input_error(kind: type[Value], error: ValidationError, where: str) -> InputError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or kind.__name__
    if first["type"] == "extra_forbidden":
        known = _fields_at(kind, first["loc"][:-1])
        return InputError(
            f"{where}: unknown key {place!r}", hint=did_you_mean(str(first["loc"][-1]), known)
        )
    if first["type"] == "missing":
        return InputError(f"{where}: {place!r} is missing", hint=f"add {first['loc'][-1]!r}")
    value = f" (got {first['input']!r})" if not isinstance(first["input"], dict) else ""
    message = first["msg"].removeprefix("Value error, ")
    return InputError(f"{where}: {place!r}: {message}{value}", hint="correct this value")


def _fields_at(kind: type[Value], path: tuple[int | str, ...]) -> Iterable[str]:
    """Field names of the value nested at `path`; dictionaries and list positions are passed."""
    fields = kind.model_fields
    for part in path:
        if str(part) in fields:
            inner = _value_types(fields[str(part)].annotation)
            fields = inner[0].model_fields if inner else {}
    return fields


def _value_types(annotation: object) -> list[type[Value]]:
    if isinstance(annotation, type) and issubclass(annotation, Value):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [found for argument in arguments for found in _value_types(argument)]


class TensorSpec(Value):
    """Name, dtype and shape of an input or output.

    A string in the shape is a dynamic dimension: `("batch", 3, 224, 224)`.
    """

    name: str
    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)] | str, ...]

    def fixed(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with each dynamic dimension replaced by its size; one not named becomes 1."""
        return tuple(sizes.get(d, 1) if isinstance(d, str) else d for d in self.shape)

    def misfit(self, array: Array) -> str | None:
        """Say why `array` does not fit this tensor, or None if it does."""
        if array.dtype != np.dtype(self.dtype):
            return f"dtype is {array.dtype}, the model wants {self.dtype}"
        fits = array.ndim == len(self.shape) and all(
            isinstance(want, str) or want == have
            for want, have in zip(self.shape, array.shape, strict=False)
        )
        return None if fits else f"shape is {array.shape}, the model wants {self}"

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(d) for d in self.shape)}]"


class Dimension(Value):
    """A dynamic dimension: its name, the sizes it may have, and a usual one."""

    name: str
    low: int = Field(default=1, ge=1)
    high: int | None = None
    """None: no bound was asked for."""
    usual: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Dimension:
        if self.high is not None and self.high < self.low:
            raise ValueError(f"{self.name} ends at {self.high}, before it starts at {self.low}")
        return self

    def holds(self, size: int) -> bool:
        """Whether a size is in the range."""
        return self.low <= size and (self.high is None or size <= self.high)

    def others(self) -> tuple[int, ...]:
        """Sizes in the range beside the usual one, the likeliest to work first."""
        near = (2 * self.usual, self.usual // 2, self.usual + 1, self.usual - 1)
        return tuple(dict.fromkeys(s for s in near if self.holds(s) and s != self.usual))

    def nearest(self, size: int) -> int:
        """The size in the range that is nearest to this one."""
        return max(self.low, size if self.high is None else min(size, self.high))

    def __str__(self) -> str:
        return f"{self.name}[{self.low}..{'' if self.high is None else self.high}]"


class Preprocessing(Value):
    """From a stored 8-bit image to the array that the model takes; the server needs the same.

    In this order: resize, centre crop, colour order, `x * scale`, `(x - mean) / std`, layout.
    Sizes are (height, width) in pixels; one number for `resize` is the shorter side.
    """

    input: str = "images"
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    color: Literal["rgb", "bgr", "gray"] = "rgb"
    layout: Literal["nchw", "nhwc"] = "nchw"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @model_validator(mode="after")
    def _check(self) -> Preprocessing:
        channels = 1 if self.color == "gray" else 3
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ValueError(f"{name} has {len(values)} values, {self.color} has {channels}")
        if min(self.std) <= 0:
            raise ValueError("std must be above 0")
        return self


class StageRecord(Value):
    """What a stage did: enough to run it again, and what it found out (`facts`)."""

    stage: str
    options: Json
    facts: Json
    inputs: dict[str, str]
    """Digests of what went in, by role."""
    versions: dict[str, str]
    seconds: float
    key: str
    """Digest of stage, options, inputs and versions: equal keys, equal work."""


class Artifact(Value):
    """A model on disk: one file or folder and its history. Never a live model."""

    path: Path
    format: Format
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sha256: str
    weights: tuple[str, ...] = ()
    """Files that hold its weights, relative to its folder: the external data of an ONNX model."""
    preprocessing: Preprocessing | None = None
    history: tuple[StageRecord, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The model and the files of its weights."""
        return (self.path, *(self.path.parent / name for name in self.weights))

    @property
    def facts(self) -> Json:
        """What the last stage found out."""
        return self.history[-1].facts if self.history else {}


class Interval(Value):
    """An estimate and the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Score(Value):
    """A metric of a model on data, higher is better."""

    metric: str
    score: Interval
    samples: int
    per_sample: tuple[float, ...] | None = None
    """One value a sample where the metric is their mean: the basis of paired comparisons."""


class Difference(Value):
    """How one output of a candidate differs from the reference, over all samples."""

    output: str
    max_absolute: float
    max_relative: float
    """Largest |difference| over the largest |reference|."""
    cosine: float
    sqnr_db: float
    """Signal to quantization noise, 10 log10(sum r^2 / sum (r - c)^2), in dB."""
    agreement: float | None
    """Share of samples with the same argmax over the last axis; None for one value a sample."""


class Placement(Value):
    """What really ran: the provider, and how many nodes ran in each precision."""

    provider: str
    """That was asked for."""
    precisions: dict[str, int]
    providers: dict[str, int] = {}
    """Nodes by the provider that ran them, where the runtime has several."""
    detail: Json = {}


class Kernel(Value):
    """One piece of work of a runtime, as its own profile tells it."""

    names: tuple[str, ...]
    """Nodes and tensors of the model that it is told under; a fused one has several."""
    operator: str
    """As the runtime calls it."""
    microseconds: float
    """Typical time of one run."""
    precision: str = ""
    provider: str = ""
    """In which, and where, it ran; empty where the runtime does not say."""
    nodes: tuple[str, ...] = ()
    module: str | None = None
    """Of the ONNX file and of the PyTorch model that it is for, where the files tell."""


class SessionOptions(Value):
    """How a backend opens a model."""

    threads: Annotated[int, Field(ge=1)] = 1
    simulate: bool = False
    """Round at each Q/DQ pair and compute in float between them, as the file says: what integers
    give on a machine that sums their products exactly. ONNX Runtime only."""
    cuda_graph: bool = False
    """Capture copies and kernels once for each shape and launch them as a whole. Engines only."""


class Measurement(Value):
    """Raw times of one engine and what is needed to compare them.

    `blocks_ns[i][j]` is call j of block i, host to host, in nanoseconds. Blocks of equal index in
    one run were taken near each other in time: compare them in pairs. `load_ns` and `first_run_ns`
    are medians over the processes, the peak of memory is the largest.
    """

    name: str
    backend: str
    batch_size: int
    options: SessionOptions
    load_ns: int
    first_run_ns: int
    warmup_runs: int
    blocks_ns: tuple[tuple[int, ...], ...]
    process_blocks: tuple[int, ...] = ()
    """How many of the blocks each process gave, in order; empty for one process."""
    loads_ns: tuple[int, ...] = ()
    first_runs_ns: tuple[int, ...] = ()
    """Of each process."""
    yardsticks_ns: tuple[int, ...] = ()
    """Of each process: the time of a fixed piece of work, which tells of the machine alone."""
    placement: Placement
    peak_rss_bytes: int
    device_memory_bytes: int | None = None
    """In use on the GPUs after the first run and not before the model was opened, the largest of
    the processes; None where that is not told."""
    energy_uj: dict[str, tuple[int, ...]] = {}
    """What the machine took in each block by each meter that it has, in microjoules."""
    transfers: Literal["host to host"] = "host to host"
    affinity: tuple[int, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    """Where the time goes, from the runtime's own profile of a few more runs."""
    cosines: dict[str, float] = {}
    """Cosine of each output with that of the run's first engine on the same feeds."""
    invalid: str | None = None
    """Why the times must not be used; None for a valid measurement."""


class Verdict(Value):
    """Fit to ship or not: each gate with its number, its limit and its interval."""

    ship: str | None
    """Name of the engine to ship; None when the answer is no."""
    gates: tuple[Gate, ...]
    reason: str


class Gate(Value):
    """One condition of the verdict."""

    name: str
    engine: str
    value: Interval
    limit: float
    passed: bool


Verdict.model_rebuild()
