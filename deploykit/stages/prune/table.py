"""A table of layer latencies, measured on the target at the precision that will be deployed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Literal

import numpy as np

from deploykit import backends
from deploykit.errors import MissingError
from deploykit.formats import onnx_layer, torch_module
from deploykit.formats.onnx_layer import LayerShape
from deploykit.stages.prune.options import PruneOptions
from deploykit.values import SessionOptions, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCKS, BLOCK_NS = 7, 1_500_000
"""A layer is timed in so many blocks of about this length; the fastest block counts."""


def shapes(module: nn.Module, inputs: tuple[TensorSpec, ...]) -> dict[str, LayerShape]:
    """The shape of each convolution and linear layer by name, of one sample.

    A layer that runs more than once counts by its last run. Transposed and 1-d or 3-d convolutions
    are left out: their time is taken to stay.
    """
    import torch
    from torch import nn

    found: dict[str, LayerShape] = {}

    def note(name: str, layer: nn.Module, given: torch.Tensor) -> None:
        if isinstance(layer, nn.Linear):
            found[name] = LayerShape(
                operator="MatMul",
                inputs=layer.in_features,
                outputs=layer.out_features,
                around=tuple(given.shape[1:-1]),
            )
        elif isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str):
            found[name] = _convolution(layer, given)

    hooks = [
        layer.register_forward_pre_hook(lambda layer, x, name=name: note(name, layer, x[0]))
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    ]
    try:
        with torch.inference_mode():
            torch_module.call(module, inputs, torch_module.examples(inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _convolution(layer: nn.Conv2d, given: torch.Tensor) -> LayerShape:
    assert not isinstance(layer.padding, str)  # noqa: S101
    return LayerShape(
        operator="Conv",
        inputs=layer.in_channels,
        outputs=layer.out_channels,
        around=tuple(given.shape[2:]),
        kernel=layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
    )


class Table:
    """Times of layers in microseconds; each is measured when it is asked for the first time."""

    def __init__(self, options: PruneOptions) -> None:
        if reason := backends.backend(options.target).unavailable():
            raise MissingError(
                f"{options.target} cannot run here: {reason}",
                hint="take a target that runs on this machine, or prune by --ratio",
            )
        self._kind = options.target, options.precision, options.threads
        self._asked: dict[LayerShape, float] = {}

    def __len__(self) -> int:
        return len(self._asked)

    def microseconds(self, layer: LayerShape) -> float:
        """The time of a layer on one sample, without what calling the runtime costs."""
        if layer not in self._asked:
            floor = _measured(_NOTHING, *self._kind)
            self._asked[layer] = max(_measured(layer, *self._kind) - floor, 0.0)
        return self._asked[layer]


_NOTHING = LayerShape(operator="MatMul", inputs=1, outputs=1, around=(1,))
"""A layer without work: what it takes is the call."""


@cache
def _measured(
    layer: LayerShape, target: str, precision: Literal["fp32", "int8"], threads: int
) -> float:
    with tempfile.TemporaryDirectory(prefix="deploykit-layer-") as folder:
        artifact = onnx_layer.write(layer, precision, Path(folder) / "layer.onnx")
        rng = np.random.default_rng(0)
        shape = layer.input_shape
        feed = (
            rng.normal(size=shape).astype(np.float32)
            if precision == "fp32"
            else rng.integers(0, 256, shape).astype(np.uint8)
        )
        options = SessionOptions(threads=threads)
        with backends.open_session(artifact, target, options) as session:
            return fastest_block(session.prepare({"x": feed})) / 1e3


def fastest_block(
    call: Callable[[], object], clock_ns: Callable[[], int] = perf_counter_ns
) -> float:
    """The mean time of a call in the fastest of several blocks, in ns.

    What else runs on the machine only adds time: the minimum is the layer's own.
    """
    for _ in range(3):
        call()
    began = clock_ns()
    call()
    count = max(1, BLOCK_NS // max(clock_ns() - began, 1))
    means = []
    for _ in range(BLOCKS):
        began = clock_ns()
        for _ in range(count):
            call()
        means.append((clock_ns() - began) / count)
    return min(means)
