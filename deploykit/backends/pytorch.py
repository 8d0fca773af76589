"""PyTorch, eager, on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from deploykit.backends._common import check_feed, missing_library
from deploykit.formats import torch_folder, torch_module
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


class PyTorchSession:
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
        names = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
        kinds = Counter(
            names.get(dtype := str(p[0].dtype).removeprefix("torch."), dtype)
            for m in self._module.modules()
            if (p := list(m.parameters(recurse=False)))
        )
        return Placement(provider="CPU", precisions=dict(kinds))

    def kernels(self, feed: Feed, runs: int) -> tuple[Kernel, ...]:
        """None: modules do not say how long they take."""
        del feed, runs
        return ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del self._module
