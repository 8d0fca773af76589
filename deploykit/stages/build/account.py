"""What a parsed network computes in: the share of layers and of work in each precision."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from deploykit.errors import AnswerIsNo
from deploykit.stages.build.exchange import Request
from deploykit.stages.build.profiles import Profile
from deploykit.values import Json

_OPERANDS = {"convolution": 2, "deconvolution": 2, "matrix_multiply": 2}
"""Layers that hold the work, and how many of their inputs are no bias."""
_CARRIES = frozenset({"shuffle", "identity", "squeeze", "unsqueeze"})
"""Layers that pass values on unchanged."""
_TYPES = {
    "float": "fp32", "half": "fp16", "bf16": "bf16", "int8": "int8", "fp8": "fp8", "int4": "int4",
    "fp4": "fp4",
}  # fmt: skip
_BOTH = frozenset({"int8", "fp8", "fp4"})
"""Computed in only where both operands are; 4-bit integers are for weights alone."""
_TOLD = 8
"""So many names of a list are told."""


class Network:
    """A parsed network with who makes and who reads each tensor."""

    def __init__(self, network: Any) -> None:
        self.layers = [network.get_layer(i) for i in range(network.num_layers)]
        self._makers, self._readers = {}, dict[str, list[Any]]()
        for layer in self.layers:
            for i in range(layer.num_outputs):
                self._makers[layer.get_output(i).name] = layer
            for i in range(layer.num_inputs):
                if (tensor := layer.get_input(i)) is not None:
                    self._readers.setdefault(tensor.name, []).append(layer)

    @property
    def heavy(self) -> list[Any]:
        """The layers that hold the work."""
        return [layer for layer in self.layers if kind(layer) in _OPERANDS]

    def maker(self, tensor: Any) -> Any:
        """The layer whose values a tensor has, behind those that only carry them; or None."""
        layer = self._makers.get(tensor.name) if tensor is not None else None
        while layer is not None and kind(layer) in _CARRIES:
            layer = self._makers.get(layer.get_input(0).name)
        return layer

    def readers(self, layer: Any) -> Iterable[Any]:
        """The layers that read a layer's output, behind those that only carry it."""
        for reader in self._readers.get(layer.get_output(0).name, ()):
            if kind(reader) in _CARRIES:
                yield from self.readers(reader)
            else:
                yield reader

    def precision(self, layer: Any) -> str:
        """What a layer that holds work computes in.

        As TensorRT's strong typing has it: the quantized type where each operand is dequantized
        from it (for 4-bit weights, where one is), else the type of its output.
        """
        operands = [self._stored(layer.get_input(i)) for i in range(_OPERANDS[kind(layer)])]
        if len(set(operands)) == 1 and operands[0] in _BOTH:
            return str(operands[0])
        if "int4" in operands:
            return "int4"
        return dtype(layer.get_output(0))

    def unfused(self) -> list[str]:
        """Dequantize layers of activations after which nothing computes on what was quantized.

        Neither a layer that holds work in that precision, nor one whose result is quantized again
        (TensorRT takes such into one kernel, or moves the pair past them).
        """
        return [
            layer.name
            for layer in self.layers
            if kind(layer) == "dequantize"
            and (maker := self.maker(layer.get_input(0))) is not None
            and kind(maker) == "quantize"
            and not any(self._fuses(reader) for reader in self.readers(layer))
        ]

    def _fuses(self, reader: Any) -> bool:
        if kind(reader) in _OPERANDS:
            return self.precision(reader) in _BOTH
        after = list(self.readers(reader))
        return bool(after) and all(kind(layer) == "quantize" for layer in after)

    def _stored(self, tensor: Any) -> str | None:
        """The type that a dequantized tensor was stored in; None for one that was not quantized."""
        layer = self.maker(tensor)
        if layer is None or kind(layer) != "dequantize":
            return None
        return dtype(layer.get_input(0))


def of_network(trt: Any, network: Any, profiles: tuple[Profile, ...]) -> Json:
    """Shares of a network that was built; its inputs are then fixed to the optimal shapes.

    The network is what TensorRT is told to compute, strongly typed; which kernels it took for it,
    and where it reformats, only the engine's inspector knows.
    """
    for i in range(network.num_inputs if profiles else 0):
        tensor = network.get_input(i)
        if tensor.name in profiles[0]:
            tensor.shape = profiles[0][tensor.name][1]
    known = Network(network)
    layers: Counter[str] = Counter()
    work: Counter[str] = Counter()
    for layer in known.heavy:
        precision = known.precision(layer)
        layers[precision] += 1
        work[precision] += multiply_accumulates(_downcast(trt, layer))
    quantized = _BOTH | {"int4"}
    return {
        "network_layers": dict(Counter(kind(layer) for layer in known.layers).most_common()),
        "compute_layers": layers.total(),
        "compute_layers_quantized": sum(layers[name] for name in quantized),
        "compute_layers_by_precision": dict(layers.most_common()),
        "multiply_accumulates_by_precision": dict(work.most_common()),
        "pairs_unfused": known.unfused(),
        "floats_left": [
            f"{layer.name} ({known.precision(layer)})"
            for layer in known.heavy
            if known.precision(layer) not in quantized
        ]
        if quantized & set(layers)
        else [],
        "accounted_from": "the parsed network",
        "ran_on_gpu": False,
    }


def _downcast(trt: Any, layer: Any) -> Any:
    """The layer as its own class: the bindings give every layer as the base class."""
    name = "".join(part.title() for part in kind(layer).split("_"))
    layer.__class__ = getattr(trt, f"I{name}Layer")  # as NVIDIA's own Polygraphy does
    return layer


def multiply_accumulates(layer: Any) -> int:
    """Of one run of a layer with fixed shapes; 0 where a shape is not known.

    Convolution: values of the output times kernel volume times input channels of a group; for a
    deconvolution, values of the input times kernel volume times output channels of a group. Matrix
    product: values of the output times the length that is summed over.
    """
    out: tuple[int, ...] = tuple(layer.get_output(0).shape)
    first: tuple[int, ...] = tuple(layer.get_input(0).shape)
    if min((*out, *first), default=0) < 0:
        return 0
    if kind(layer) == "matrix_multiply":
        transposed = "transpose" in str(layer.op0).lower()
        return math.prod(out) * (first[-2] if transposed and len(first) > 1 else first[-1])
    per_value, groups = math.prod(map(int, layer.kernel_size_nd)), int(layer.num_groups)
    if kind(layer) == "deconvolution":
        return math.prod(first) * per_value * (out[1] // groups)
    return math.prod(out) * per_value * (first[1] // groups)


def check(facts: Json, request: Request) -> None:
    """Hold what was asked for against what the network computes in. Raises AnswerIsNo."""
    asked, least = request.precision, request.options.min_share
    work = facts["multiply_accumulates_by_precision"] or facts["compute_layers_by_precision"]
    total = sum(work.values())
    if not total:
        return
    share = work.get(asked, 0) / total
    if share >= least and (share > 0 or asked == "fp32"):
        return
    rest = ", ".join(f"{name} {n / total:.1%}" for name, n in work.items() if name != asked)
    limit = f", at least {least:.1%} was asked" if least else ""
    named = facts["floats_left"][:_TOLD]
    raise AnswerIsNo(
        f"{share:.1%} of the multiply-accumulates of {request.onnx} are in {asked}{limit}: {rest}",
        hint=f"in float: {', '.join(named)}" if named else _remedy(asked),
    )


def _remedy(asked: str) -> str:
    if asked in ("int8", "fp8", "int4"):
        return f"deploykit quantize --target tensorrt --precision {asked} writes such a file"
    return f"precision is in the file: deploykit convert --precision {asked} writes such a file"


def kind(layer: Any) -> str:
    """The type of a layer, in lower case."""
    return str(layer.type).rsplit(".", maxsplit=1)[-1].lower()


def dtype(tensor: Any) -> str:
    """The type of a tensor by our names, or TensorRT's where we have none."""
    name = str(tensor.dtype).rsplit(".", maxsplit=1)[-1].lower()
    return _TYPES.get(name, name)
