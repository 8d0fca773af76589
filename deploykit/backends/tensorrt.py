"""TensorRT and TensorRT for RTX: engines on the first GPU, through PyCUDA or cuda-python."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import numpy as np

from deploykit._lazy import needs
from deploykit._tensorrt import MODULES, logger
from deploykit.backends import _cuda
from deploykit.backends._common import check_feed, missing_library
from deploykit.backends._cuda import Cuda, Graph
from deploykit.backends._tensorrt_buffers import Buffers
from deploykit.errors import InputError, ResourceError
from deploykit.formats import engine_file, engine_layers
from deploykit.session import Closing
from deploykit.values import Array, Artifact, Feed, Format, Kernel, Placement, SessionOptions

_CONTEXTS = 4
"""Execution contexts that are kept for shapes seen before, besides those that are prepared."""


class TensorRt:
    """Backend for engines of one flavour."""

    formats: frozenset[Format] = frozenset({"engine"})

    def __init__(self, name: str) -> None:
        self.name = name

    def unavailable(self) -> str | None:
        """Why no engine of this flavour can run here, or None; nothing is imported."""
        return missing_library(MODULES[self.name]) or _cuda.unavailable()

    def open(self, artifact: Artifact, options: SessionOptions) -> TensorRtSession:
        """Deserialize an engine that fits this machine and was built here.

        Raises MissingError: it does not fit. IntegrityError: it is altered, or of another machine.
        """
        plan = engine_file.read_plan(artifact)
        with needs(MODULES[self.name]):
            trt = importlib.import_module(MODULES[self.name])
        return TensorRtSession(artifact, options, trt=trt, cuda=_cuda.connect(), plan=plan)


class TensorRtSession(Closing):
    """A deserialized engine, with an execution context for each set of input shapes."""

    def __init__(
        self, artifact: Artifact, options: SessionOptions, *, trt: Any, cuda: Cuda, plan: bytes
    ) -> None:
        """Raises InputError: TensorRT does not take the plan."""
        self.inputs, self.outputs = artifact.inputs, artifact.outputs
        self._artifact, self._options, self._trt, self._cuda = artifact, options, trt, cuda
        self._log = logger(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise InputError(
                f"{artifact.path}: TensorRT does not load it: {self._log.told()}",
                hint=engine_file.BUILD_AGAIN,
            )
        self._buffers: dict[tuple[object, ...], Buffers] = {}
        self._prepared: set[tuple[object, ...]] = set()
        self._graphs: list[Graph] = []

    def run(self, feed: Feed) -> dict[str, Array]:
        """Run one batch; the outputs are copies. Raises InputError: outside every profile."""
        buffers = self._buffers_for(feed)
        outputs = buffers.run(buffers.stage(feed))
        return {spec.name: outputs[spec.name].copy() for spec in self.outputs}

    def prepare(self, feed: Feed) -> Callable[[], Mapping[str, Array]]:
        """Put the feed in pinned memory once; each call copies it in, runs, and copies out."""
        buffers = self._buffers_for(feed)
        self._prepared.add(_key(feed))
        staged = buffers.stage(feed)
        if self._options.cuda_graph:
            return self._captured(buffers, staged)

        def call() -> Mapping[str, Array]:
            return buffers.run(staged)

        return call

    def placement(self, feed: Feed) -> Placement:
        """Run the feed, and read the engine's layers from TensorRT's inspector."""
        self.run(feed)
        inspector = self._engine.create_engine_inspector()
        as_json = self._trt.LayerInformationFormat.JSON
        found = engine_layers.account(inspector.get_engine_information(as_json))
        flavour = self._artifact.facts["flavour"]
        return Placement(
            provider=f"{flavour} {self._trt.__version__} by {self._cuda.name}",
            precisions=found["engine_layers_by_precision"],
            detail={"reformats": len(found["reformats"]), "cuda_graph": self._options.cuda_graph},
        )

    def kernels(self, feed: Feed, runs: int) -> tuple[Kernel, ...]:
        """Median time of each layer, from TensorRT's own profiler."""
        buffers = self._buffers_for(feed)
        staged = buffers.stage(feed)
        times: dict[str, list[float]] = defaultdict(list)
        buffers.context.profiler = _profiler(self._trt, times)
        for _ in range(runs):
            buffers.run(staged)
        del self._buffers[_key(feed)]  # a context keeps its profiler: the next run gets another
        return tuple(
            Kernel(names=(name,), operator="layer", microseconds=1000 * median(each))
            for name, each in times.items()
        )

    def _buffers_for(self, feed: Feed) -> Buffers:
        """Context and memory for the feed's shapes; those not used lately are given back."""
        check_feed(feed, self.inputs)
        key = _key(feed)
        if key not in self._buffers:
            spare = [k for k in self._buffers if k not in self._prepared]
            for old in spare[: max(0, len(spare) - _CONTEXTS + 1)]:
                self._buffers.pop(old).close()
            self._buffers[key] = self._new_buffers(feed)
        return self._buffers[key]

    def _new_buffers(self, feed: Feed) -> Buffers:
        profile = self._profile_for(feed)
        context = self._engine.create_execution_context()
        if context is None:
            raise ResourceError(
                f"{self._artifact.path}: no execution context: {self._log.told()}",
                hint="other work may hold the GPU's memory; or build with smaller --max-shapes",
            )
        if profile and not context.set_optimization_profile_async(profile, self._cuda.stream):
            raise InputError(
                f"{self._artifact.path}: profile {profile} cannot be taken: {self._log.told()}",
                hint=engine_file.BUILD_AGAIN,
            )
        return Buffers(self._trt, self._cuda, self._engine, context, feed)

    def _profile_for(self, feed: Feed) -> int:
        """The profile whose optimal shapes these are, else the first that takes them."""
        host, taking = self._trt.TensorLocation.HOST, []
        names = [n for n in feed if self._engine.get_tensor_location(n) != host]
        shapes = [feed[name].shape for name in names]
        for index in range(self._engine.num_optimization_profiles):
            bounds = [self._bounds(name, index) for name in names]
            if all(_within(shape, bound) for shape, bound in zip(shapes, bounds, strict=True)):
                taking.append((tuple(shapes) != tuple(bound[1] for bound in bounds), index))
        if not taking:
            raise self._outside(feed)
        return min(taking)[1]

    def _bounds(self, name: str, index: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(s) for s in self._engine.get_tensor_profile_shape(name, index))

    def _outside(self, feed: Feed) -> InputError:
        count = self._engine.num_optimization_profiles
        name = next(
            (n for n, a in feed.items()
             if not any(_within(a.shape, self._bounds(n, i)) for i in range(count))),
            next(iter(feed)),
        )  # fmt: skip
        spans = [
            f"{_text(low)} to {_text(high)}"
            for low, _, high in (self._bounds(name, i) for i in range(count))
        ]
        return InputError(
            f"input {name!r} is {_text(feed[name].shape)}, the engine takes {' or '.join(spans)}",
            hint="give other shapes, or build again with wider --min-shapes and --max-shapes",
        )

    def _captured(self, buffers: Buffers, staged: Feed) -> Callable[[], Mapping[str, Array]]:
        """The run as one CUDA graph. Raises InputError: an output's size depends on the data."""
        if buffers.data_dependent:
            raise InputError(
                f"{self._artifact.path}: the size of {buffers.data_dependent[0]!r} depends on the "
                "data, which no CUDA graph can hold",
                hint="open it without cuda_graph in its SessionOptions",
            )
        buffers.run(staged)  # what TensorRT does once must not be captured
        graph = Graph(self._cuda.stream, lambda: buffers.enqueue(staged))
        self._graphs.append(graph)
        cuda, outputs = self._cuda, buffers.outputs

        def call() -> Mapping[str, Array]:
            graph.launch()
            cuda.synchronize()
            return outputs

        return call

    def close(self) -> None:
        """Free the graphs, the buffers and the engine, in this order."""
        for graph in self._graphs:
            graph.close()
        for buffers in self._buffers.values():
            buffers.close()
        self._buffers.clear()
        del self._engine, self._runtime
        self._cuda.close()


def _profiler(trt: Any, times: dict[str, list[float]]) -> Any:
    """Adds each layer's time, in milliseconds, to `times`."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name].append(ms)

    return Profiler()


def _key(feed: Feed) -> tuple[object, ...]:
    return tuple(sorted((name, np.shape(array)) for name, array in feed.items()))


def _within(shape: tuple[int, ...], bounds: tuple[tuple[int, ...], ...]) -> bool:
    low, _, high = bounds
    return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
