"""An ONNX graph as a PyTorch module: what the engine computes, with gradients.

Pairs of QuantizeLinear and DequantizeLinear become fake quantization, whose scales are learned too
(LSQ, Esser et al. 2020, arXiv:1902.08153); gradients pass the rounding as if it were not there
(Bengio et al. 2013, arXiv:1308.3432). What was learned goes back into the same graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploykit.errors import InputError
from deploykit.formats import onnx_file
from deploykit.formats.onnx_operators import operators
from deploykit.formats.onnx_trainable import PAIR, check
from deploykit.values import Array

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

LARGEST_BIAS = 2**31 - 128
"""The largest int32 that is a float32 too."""
LEARNED = {
    "Conv": (1, 2), "Gemm": (1, 2), "MatMul": (0, 1), "PRelu": (1,), "Add": (0, 1),
    "LayerNormalization": (1, 2),
}  # fmt: skip
"""Inputs that are learned where they are float constants of more than one number."""
LEVELS = {np.dtype(np.uint8): (0, 255), np.dtype(np.int8): (-128, 127)}
"""Lowest and highest integer."""
MOST_MOVED = 2.0
"""Bound of the logarithm of a scale over its first value."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A quantized constant: names of its integers and scale, and how the integers are read."""

    integers: str
    scale: str
    zero: Tensor
    axis: int | None
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Bias:
    """An int32 constant; its scale is the product of those of the input and of the weights."""

    integers: str
    scale: str
    of_input: str
    of_weights: str


class TrainedGraph:
    """A graph whose weights, and scales of Q/DQ pairs, are parameters.

    A scale is its first value times the exponential of what begins at 0 and is bounded: so it stays
    positive and sane, and weight decay draws it to what calibration found.
    """

    def __init__(self, model: onnx.ModelProto, name: str) -> None:
        """Raises InputError: it holds what cannot be trained."""
        import torch
        from onnx import numpy_helper

        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        tensors |= {
            n.output[0]: n.attribute[0].t for n in model.graph.node if n.op_type == "Constant"
        }
        self._nodes = [node for node in model.graph.node if node.op_type != "Constant"]
        check(self._nodes, tensors.values(), name)
        self._inputs = [v.name for v in model.graph.input if v.name not in tensors]
        self._outputs = [v.name for v in model.graph.output]
        self._attributes = [_attributes(node) for node in self._nodes]
        self._constants = {
            key: torch.tensor(numpy_helper.to_array(t)) for key, t in tensors.items()
        }
        self._operators = operators()
        self._learned: dict[str, nn.Parameter] = {}
        self._weights: dict[str, Weights] = {}
        self._biases: dict[str, Bias] = {}
        self._scales: set[str] = set()
        self._strides: dict[str, Tensor] = {}
        """How far one step of its parameter moves the logarithm of a scale."""
        self._read_pairs(name)
        self._read_floats()

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs in their order."""
        values = dict(zip(self._inputs, inputs, strict=True))
        for node, attributes in zip(self._nodes, self._attributes, strict=True):
            if node.op_type in PAIR:
                values[node.output[0]] = self._pair(node, values)
                continue
            given = [self._value(key, values) for key in node.input]
            made = self._operators[node.op_type](attributes, *given)
            outputs = made if isinstance(made, tuple) else (made,)
            values.update(zip(node.output, outputs, strict=False))
        return tuple(values[key] for key in self._outputs)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is learned."""
        return list(self._learned.values())

    def trained(self) -> dict[str, Array]:
        """The constants as they are now, by name: integers and scales where they are quantized."""
        import torch

        quantized = {w.integers for w in self._weights.values()}
        quantized |= {b.integers for b in self._biases.values()}
        with torch.no_grad():
            floats = self._learned.keys() - quantized - self._scales
            found: dict[str, Tensor] = {key: self._learned[key] for key in floats}
            found |= {key: self._scale(key) for key in self._scales}
            for weights in self._weights.values():
                integers = self._levels(weights, round_=torch.round)
                found[weights.integers] = integers.to(self._constants[weights.integers].dtype)
            for bias in self._biases.values():
                scale = self._scale(bias.of_input) * self._scale(bias.of_weights)
                levels = torch.round(self._learned[bias.integers].double() / scale)
                found[bias.scale] = scale
                found[bias.integers] = levels.clamp(-LARGEST_BIAS, LARGEST_BIAS).to(torch.int32)
        return {key: np.array(t.detach().numpy(), order="C") for key, t in found.items()}

    # Reading

    def _read_pairs(self, name: str) -> None:
        import torch

        readers = {node.input[2]: node for node in self._nodes if len(node.input) > 2}
        sources = {n.output[0]: n.input[1] for n in self._nodes if n.op_type == "DequantizeLinear"}
        for node, attributes in zip(self._nodes, self._attributes, strict=True):
            if node.op_type not in PAIR:
                continue
            integers = self._constants.get(node.input[0])
            if integers is None:
                if self._constants[node.input[1]].ndim:
                    raise InputError(
                        f"{name}: the activation {node.input[0]!r} has a scale for each channel",
                        hint="quantize activations per tensor",
                    )
                self._learn_scale(node.input[1])
            elif integers.dtype == torch.int32:
                pair = readers[node.output[0]].input[:2] if node.output[0] in readers else ()
                if not pair or any(key not in sources for key in pair):
                    raise InputError(
                        f"{name}: {node.input[0]!r} is int32, and no bias of a quantized node",
                        hint="train a model that deploykit has quantized",
                    )
                bias = Bias(node.input[0], node.input[1], *(sources[key] for key in pair))
                self._biases[node.output[0]] = bias
                scale = self._constants[bias.scale]
                self._learn(bias.integers, integers * scale)
            else:
                self._weights[node.output[0]] = self._read_weights(node, attributes, integers)

    def _read_weights(
        self, node: onnx.NodeProto, attributes: dict[str, Any], integers: Tensor
    ) -> Weights:
        import torch

        scale = self._constants[node.input[1]]
        zero = self._constants[node.input[2]].float() if len(node.input) > 2 else torch.zeros(())
        axis = int(attributes.get("axis", 1)) % integers.ndim if scale.ndim else None
        low, high = LEVELS[integers.numpy().dtype]
        if not zero.any() and low:
            high = int(integers.int().abs().max())  # 63 on processors whose sums overflow
            low = -high
        values = (integers - _along(zero, axis, integers)) * _along(scale, axis, integers)
        self._learn(node.input[0], values)
        self._learn_scale(node.input[1])
        made = Weights(node.input[0], node.input[1], zero, axis, low, high)
        self._set_stride(made.scale, integers.numel() // max(scale.numel(), 1), high)
        return made

    def _read_floats(self) -> None:
        import torch

        for node in self._nodes:
            for key in (
                node.input[i] for i in LEARNED.get(node.op_type, ()) if i < len(node.input)
            ):
                tensor = self._constants.get(key)
                if tensor is None or tensor.dtype != torch.float32 or tensor.numel() < 2:
                    continue
                if node.op_type != "Add" or tensor.ndim == 1:
                    self._learn(key, tensor)

    def _learn(self, key: str, start: Tensor) -> None:
        """Make a tensor a parameter, once."""
        from torch import nn

        if key not in self._learned:
            self._learned[key] = nn.Parameter(start.float().clone())

    def _learn_scale(self, key: str) -> None:
        import torch

        self._scales.add(key)
        self._learn(key, torch.zeros_like(self._constants[key]))

    # Running

    def _value(self, key: str, values: dict[str, Tensor]) -> Tensor | None:
        if key in values:
            return values[key]
        return self._learned.get(key, self._constants.get(key)) if key else None

    def _pair(self, node: onnx.NodeProto, values: dict[str, Tensor]) -> Tensor:
        """What a QuantizeLinear and its DequantizeLinear come to; the first does it all."""
        import torch

        out = node.output[0]
        if out in self._weights:
            weights = self._weights[out]
            levels = self._levels(weights, round_=_rounded)
            scale = _along(self._scale(weights.scale), weights.axis, levels)
            return (levels - _along(weights.zero, weights.axis, levels)) * scale
        if out in self._biases:
            return self._learned[self._biases[out].integers]
        x = self._value(node.input[0], values)
        assert x is not None  # noqa: S101 - onnx's checker has seen to it
        if node.op_type == "DequantizeLinear":
            return x
        point = self._constants[node.input[2]].numpy() if len(node.input) > 2 else np.uint8(0)
        low, high = LEVELS[point.dtype]
        if node.input[1] not in self._strides:
            self._set_stride(node.input[1], x[0].numel(), high)
        scale, offset = self._scale(node.input[1]), int(point)
        levels = torch.clamp(_rounded(x / scale), low - offset, high - offset)
        return levels * scale

    def _levels(self, weights: Weights, *, round_: Any) -> Tensor:
        import torch

        values = self._learned[weights.integers]
        scale = _along(self._scale(weights.scale), weights.axis, values)
        zero = _along(weights.zero, weights.axis, values)
        return torch.clamp(round_(values / scale) + zero, weights.low, weights.high)

    def _scale(self, key: str) -> Tensor:
        import torch

        stride = self._strides.get(key)
        first = self._constants[key]
        if stride is None:
            return first
        return first * torch.exp(MOST_MOVED * torch.tanh(self._learned[key] * stride / MOST_MOVED))

    def _set_stride(self, key: str, numbers: int, high: int) -> None:
        """A step of gradient descent then moves it as with LSQ's gradient scale (section 2.2)."""
        largest = self._constants[key].max()  # a dead channel's own scale would leap
        self._strides.setdefault(key, (numbers * high) ** -0.25 / largest)


def _rounded(x: Tensor) -> Tensor:
    """Half to even; the gradient passes."""
    import torch

    return x + (torch.round(x) - x).detach()


def load(path: Path) -> nn.Module:
    """Open a model for training. Raises InputError: it holds what cannot be trained."""
    return module_of(TrainedGraph(onnx_file.read(path), str(path)))


def module_of(graph: TrainedGraph) -> nn.Module:
    """The graph as a module, called with its inputs; `graph` of it is the graph."""
    from torch import nn

    class GraphModule(nn.Module):
        """A graph that runs as a module does."""

        def __init__(self) -> None:
            super().__init__()
            self.graph = graph
            for number, parameter in enumerate(graph.parameters):
                self.register_parameter(f"learned_{number}", parameter)

        def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
            return graph.run(inputs)

    return GraphModule()


def write(module: nn.Module, source: Path) -> onnx.ModelProto:
    """The model of `source` with what a module of `load` has learned."""
    from onnx import numpy_helper

    graph = module.graph
    assert isinstance(graph, TrainedGraph)  # noqa: S101 - `load` has made it
    model, learned = onnx_file.read(source), graph.trained()
    for tensor in model.graph.initializer:
        if tensor.name in learned:
            tensor.CopyFrom(numpy_helper.from_array(learned.pop(tensor.name), tensor.name))
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in learned:
            value = numpy_helper.from_array(learned.pop(node.output[0]))
            node.attribute[0].t.CopyFrom(value)
    assert not learned  # noqa: S101 - all names are of constants
    return model


def _along(tensor: Tensor, axis: int | None, like: Tensor) -> Tensor:
    """One number for each slice along an axis, shaped to fit."""
    if axis is None or tensor.ndim == 0:
        return tensor
    return tensor.reshape([-1 if i == axis else 1 for i in range(like.ndim)])


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    import onnx
    import torch
    from onnx import numpy_helper

    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    for key, value in found.items():
        if isinstance(value, onnx.TensorProto):
            found[key] = torch.tensor(numpy_helper.to_array(value))
    if node.op_type == "Split":
        found["outputs"] = len(node.output)
    return found
