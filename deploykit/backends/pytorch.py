"""PyTorch on the CPU: eager, and compiled by torch.compile."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from shutil import which
from time import perf_counter_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from deploykit.backends._common import check_feed, missing_library
from deploykit.errors import InputError
from deploykit.formats import torch_folder, torch_module
from deploykit.session import Closing
from deploykit.values import Array, Artifact, Feed, Format, Kernel, Placement, SessionOptions

if TYPE_CHECKING:
    from torch import nn


class PyTorch:
    """Backend for torch artifact folders."""

    name = "pytorch"
    formats: frozenset[Format] = frozenset({"torch"})

    def unavailable(self) -> str | None:
        """Why PyTorch cannot run here, or None."""
        return missing_library("torch")

    def open(self, artifact: Artifact, options: SessionOptions) -> PyTorchSession:
        """Build the model from its folder."""
        return PyTorchSession(artifact, options)


class PyTorchCompile:
    """Backend for torch artifact folders, through torch.compile with its default, Inductor."""

    name = "pytorch-compile"
    formats: frozenset[Format] = frozenset({"torch"})

    def unavailable(self) -> str | None:
        """Why PyTorch cannot compile here, or None."""
        if reason := missing_library("torch"):
            return reason
        if not any(which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
            return "torch.compile needs a C++ compiler: install g++ or clang++"
        return None

    def open(self, artifact: Artifact, options: SessionOptions) -> PyTorchSession:
        """Build the model from its folder; the first run of a shape compiles it."""
        return PyTorchCompileSession(artifact, options)


class PyTorchSession(Closing):
    """A module in evaluation mode. The number of threads is the process's, set at each run."""

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        self.inputs, self.outputs = artifact.inputs, artifact.outputs
        self._threads = options.threads
        self._module: nn.Module = torch_folder.load(artifact)

    def run(self, feed: Feed) -> dict[str, Array]:
        """Run one batch."""
        import torch

        check_feed(feed, self.inputs)
        torch.set_num_threads(self._threads)
        arrays = torch_module.run(self._module, self.inputs, feed)
        return {spec.name: array for spec, array in zip(self.outputs, arrays, strict=True)}

    def prepare(self, feed: Feed) -> Callable[[], object]:
        """Make the tensors once; each call runs the module."""
        import torch

        check_feed(feed, self.inputs)
        torch.set_num_threads(self._threads)
        tensors = [torch.from_numpy(feed[spec.name].copy()) for spec in self.inputs]
        module = self._module
        given, named = torch_module.arguments(module, self.inputs, tensors)

        def call() -> object:
            with torch.inference_mode():
                return module(*given, **named)

        return call

    def placement(self, feed: Feed) -> Placement:
        """Count the modules with parameters by the dtype of these."""
        del feed
        told = (_precision_of(module) for module in self._module.modules())
        kinds = Counter(precision for precision in told if precision)
        return Placement(provider="CPU", precisions=dict(kinds))

    def kernels(self, feed: Feed, runs: int) -> tuple[Kernel, ...]:
        """Mean times of the modules without children, from hooks; the rest is told as one."""
        clock = _ModuleClock(self._module)
        call = self.prepare(feed)
        call()
        clock.totals_ns.clear()
        began = perf_counter_ns()
        with clock:
            for _ in range(runs):
                call()
        rest_ns = perf_counter_ns() - began - sum(clock.totals_ns.values())
        told = [
            Kernel(
                names=(name,),
                operator=type(self._module.get_submodule(name)).__name__,
                microseconds=total / runs / 1e3,
                precision=_precision_of(self._module.get_submodule(name)),
                provider="CPU",
            )
            for name, total in clock.totals_ns.items()
        ]
        rest = Kernel(names=(), operator="between modules", microseconds=rest_ns / runs / 1e3)
        return (*told, rest)

    def close(self) -> None:
        """Let go of the module."""
        del self._module


class PyTorchCompileSession(PyTorchSession):
    """A compiled module.

    As one graph: PyTorch would run what it cannot compile in eager mode and not tell.
    """

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        super().__init__(artifact, options)
        import torch

        self._path = artifact.path
        self._module = cast("nn.Module", torch.compile(self._module, fullgraph=True, dynamic=False))

    def run(self, feed: Feed) -> dict[str, Array]:
        """Run one batch. Raises InputError: PyTorch does not compile the model as one graph."""
        try:
            return super().run(feed)
        except RuntimeError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(
                f"{self._path}: torch.compile does not compile it as one graph: {lines[0]}",
                hint="run it on the backend pytorch, or export it",
            ) from error

    def kernels(self, feed: Feed, runs: int) -> tuple[Kernel, ...]:
        """None: compiled code does not say how long its parts take."""
        del feed, runs
        return ()


class _ModuleClock:
    """Nanoseconds spent in each module without children, while it is entered."""

    def __init__(self, module: nn.Module) -> None:
        self.totals_ns: Counter[str] = Counter()
        self._began: dict[str, int] = {}
        self._leaves = {n: m for n, m in module.named_modules() if n and not any(m.children())}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for name, leaf in self._leaves.items():
            self._hooks.append(leaf.register_forward_pre_hook(partial(self._start, name)))
            self._hooks.append(leaf.register_forward_hook(partial(self._stop, name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _start(self, name: str, *_: object) -> None:
        self._began[name] = perf_counter_ns()

    def _stop(self, name: str, *_: object) -> None:
        self.totals_ns[name] += perf_counter_ns() - self._began[name]


def _precision_of(module: nn.Module) -> str:
    """The dtype of a module's own parameters; empty without any."""
    names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    own = next(module.parameters(recurse=False), None)
    dtype = str(own.dtype).removeprefix("torch.") if own is not None else ""
    return names.get(dtype, dtype)
