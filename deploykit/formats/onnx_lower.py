"""A float32 graph, or a part of it, written in a 16-bit float type; or made to round like it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from deploykit.formats import onnx_weights
from deploykit.formats.onnx_graph import Graph, subgraph_nodes
from deploykit.values import Array

if TYPE_CHECKING:
    import onnx

Half = Literal["fp16", "bf16"]
TYPES = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}
SCHEMA_TYPES = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}
LARGEST = {"fp16": 65504.0, "bf16": 3.3895e38}
SMALLEST_NORMAL = {"fp16": 2.0**-14, "bf16": 2.0**-126}
CASTS = frozenset({"Cast", "CastLike"})
"""Their types are what they say."""
SWITCH = "deploykit_rounded"
"""Input of a simulated graph: for each node that may be lowered whether it is."""


@dataclass(frozen=True)
class Slots:
    """The float32 inputs and outputs of a node that change their type together."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def slots(graph: Graph, kind: Half, opset: int) -> dict[str, Slots | str]:
    """By node: what would be lowered, or why nothing can; nodes without float32 are left out."""
    floats = graph.floats | {n for n in graph.constants if graph.is_float(n)}
    found: dict[str, Slots | str] = {}
    for name, node in graph.nodes.items():
        ins = [i for i, tensor in enumerate(node.input) if tensor in floats]
        outs = [i for i, tensor in enumerate(node.output) if tensor in floats]
        if not ins and not outs:
            continue
        if any(True for _ in subgraph_nodes(node)):
            found[name] = "holds branches or loops, which stay in float32"
        elif node.op_type not in CASTS and (outs or node.op_type == "QuantizeLinear"):
            found[name] = _fitting(node, ins, outs, kind, opset)
    return found


def _fitting(
    node: onnx.NodeProto, ins: list[int], outs: list[int], kind: Half, opset: int
) -> Slots | str:
    """What of a node's tensors its operator takes in this type."""
    import onnx

    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return f"an operator of {node.domain or 'no known domain'}"
    params = {p.type_param_str for p in schema.type_constraints
              if SCHEMA_TYPES[kind] in p.allowed_type_strs}  # fmt: skip
    lowered = [i for i in ins if _param(schema.inputs, i) in params]
    bound = {_param(schema.inputs, i) for i in lowered}
    made = [i for i in outs if _param(schema.outputs, i) in bound]
    if node.op_type == "DequantizeLinear" and lowered:  # its output has the type of its scale
        made = outs
    if not lowered or (outs and not made):
        return f"{node.op_type} of opset {opset} has no {kind.upper()} form"
    return Slots(tuple(lowered), tuple(made))


def _param(formal: Collection[object], index: int) -> str:
    """The type of an input or output in the schema; the last one may stand for many."""
    listed = list(formal)
    return str(listed[min(index, len(listed) - 1)].type_str)  # type: ignore[attr-defined]


def constants_out(model: onnx.ModelProto) -> None:
    """Make initializers of the Constant nodes that hold a tensor, in place."""
    kept = []
    for node in model.graph.node:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type != "Constant" or value is None:
            kept.append(node)
            continue
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
    if len(kept) < len(model.graph.node):
        copies = [type(node).FromString(node.SerializeToString()) for node in kept]
        del model.graph.node[:]
        model.graph.node.extend(copies)


def lower(graph: Graph, chosen: Mapping[str, Slots], kind: Half, folder: Path) -> onnx.ModelProto:
    """A copy of the model with these nodes in the type, and Casts where types meet.

    `folder` is where weights in other files lie. Inputs and outputs of the model stay as they are.
    """
    writer = _Writer(graph, chosen, kind, folder)
    for node in graph.model.graph.node:
        writer.add(node)
    return writer.model()


@dataclass
class _Writer:
    graph: Graph
    chosen: Mapping[str, Slots]
    kind: Half
    folder: Path
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    added: list[onnx.TensorProto] = field(default_factory=list)
    low: dict[str, str] = field(default_factory=dict)
    """The lowered twin of a tensor, by the tensor's name."""

    def __post_init__(self) -> None:
        self.taken = set(self.graph.names)
        self.wide = self.graph.outputs | self.graph.captured
        for node in self.graph.model.graph.node:
            slot = self.chosen.get(node.name, Slots((), ()))
            self.wide |= {n for i, n in enumerate(node.input) if i not in slot.inputs}

    def add(self, node: onnx.NodeProto) -> None:
        """Write a node of the graph, lowered if it was chosen."""
        import onnx

        copy, slot = onnx.NodeProto(), self.chosen.get(node.name)
        copy.CopyFrom(node)
        if slot is None:
            self.nodes.append(copy)
            return
        for i in slot.inputs:
            copy.input[i] = self._lowered(node.input[i])
        self.nodes.append(copy)
        for i in slot.outputs:
            name = node.output[i]
            copy.output[i] = self.low[name] = self._twin(name)
            if name in self.wide:
                self._cast(copy.output[i], name, onnx.TensorProto.FLOAT)

    def _lowered(self, name: str) -> str:
        import onnx

        if name not in self.low:
            self.low[name] = twin = self._twin(name)
            if name in self.graph.constants:
                values = onnx_weights.array(self.graph.constants[name], self.folder)
                rounded = rounded_to(values, self.kind)
                self.added.append(onnx.numpy_helper.from_array(rounded, twin))
            else:
                self._cast(name, twin, onnx.TensorProto.DataType.Value(TYPES[self.kind]))
        return self.low[name]

    def _cast(self, source: str, target: str, kind: int) -> None:
        import onnx

        name = self._free(f"{target}_cast")
        self.nodes.append(onnx.helper.make_node("Cast", [source], [target], name, to=kind))

    def _twin(self, name: str) -> str:
        return self._free(f"{name}_{self.kind}")

    def _free(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def model(self) -> onnx.ModelProto:
        """The model of what was written."""
        bare = bare_of(self.graph.model)
        del bare.graph.value_info[:]
        bare.graph.node.extend(self.nodes)
        read = {n for node in self.nodes for n in node.input}
        read |= self.graph.captured | self.graph.outputs
        bare.graph.initializer.extend(t for n, t in self.graph.constants.items() if n in read)
        bare.graph.initializer.extend(self.added)
        return bare


def rounded_to(values: Array, kind: Half) -> Array:
    """Values in the type, rounded to nearest even; what is too large becomes infinite."""
    import ml_dtypes

    with np.errstate(over="ignore"):
        return values.astype(np.float16 if kind == "fp16" else ml_dtypes.bfloat16)


def simulated(graph: Graph, able: Mapping[str, Slots], kind: Half) -> onnx.ModelProto:
    """A float32 graph that rounds to the type what each node in `able` reads and writes.

    A further input, `SWITCH`, bool[len(able)], says of each node whether it does. So one session
    tells what any choice of nodes costs; products are summed in float32, as the hardware does.
    """
    import onnx

    model = bare_of(graph.model)
    model.graph.initializer.extend(graph.model.graph.initializer)
    first, half = model.graph.input, onnx.TensorProto.DataType.Value(TYPES[kind])
    first.append(onnx.helper.make_tensor_value_info(SWITCH, onnx.TensorProto.BOOL, [len(able)]))
    make, rounded = onnx.helper.make_node, set[str]()
    nodes = model.graph.node

    def switched(name: str, index: int, target: str) -> None:
        """Write `target`: a tensor, rounded where the node of this index is lowered."""
        twin = f"{name}:{SWITCH}"
        if name not in rounded:
            rounded.add(name)
            nodes.append(make("Cast", [name], [f"{twin}:half"], to=half))
            nodes.append(make("Cast", [f"{twin}:half"], [twin], to=onnx.TensorProto.FLOAT))
        nodes.append(make("Where", [f"{SWITCH}:{index}", twin, name], [target]))

    for index in range(len(able)):
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.array(index), f"{SWITCH}#{index}")
        )
        nodes.append(make("Gather", [SWITCH, f"{SWITCH}#{index}"], [f"{SWITCH}:{index}"]))
    numbers = {name: index for index, name in enumerate(able)}
    for node in graph.model.graph.node:
        copy, index = onnx.NodeProto(), numbers.get(node.name, -1)
        copy.CopyFrom(node)
        slot = able.get(node.name, Slots((), ()))
        for i in slot.inputs:
            copy.input[i] = f"{node.name}:{i}:{SWITCH}"
            switched(node.input[i], index, copy.input[i])
        for i in slot.outputs:
            copy.output[i] = f"{node.output[i]}:{SWITCH}:raw"
        nodes.append(copy)
        for i in slot.outputs:
            switched(f"{node.output[i]}:{SWITCH}:raw", index, node.output[i])
    return model


def extremes(graph: Graph, tensors: Collection[str]) -> onnx.ModelProto:
    """The model with the largest magnitude of each tensor as its only outputs, `NAME:largest`."""
    import onnx

    model, make = bare_of(graph.model), onnx.helper.make_node
    model.graph.initializer.extend(graph.model.graph.initializer)
    model.graph.node.extend(graph.model.graph.node)
    del model.graph.output[:]
    for name in tensors:
        model.graph.node.append(make("Abs", [name], [f"{name}:magnitude"]))
        model.graph.node.append(
            make("ReduceMax", [f"{name}:magnitude"], [f"{name}:largest"], keepdims=0)
        )
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(f"{name}:largest", onnx.TensorProto.FLOAT, [])
        )
    return model


def bare_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """Everything of a model but its nodes and initializers, without copying those."""
    import onnx

    bare = onnx.ModelProto()
    for name in ("ir_version", "producer_name", "producer_version", "domain", "model_version"):
        setattr(bare, name, getattr(model, name))
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    bare.metadata_props.extend(model.metadata_props)
    bare.graph.name = model.graph.name or "graph"
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    bare.graph.value_info.extend(model.graph.value_info)
    bare.graph.sparse_initializer.extend(model.graph.sparse_initializer)
    return bare
