"""TensorRT's refusals as the node or the resource that they are about, and a way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit._lazy import needs
from deploykit.errors import DeploykitError, MissingError, ResourceError, StageError, UsageError
from deploykit.stages.build.exchange import Request

if TYPE_CHECKING:
    import onnx

MORE_MEMORY = "smaller --max-shapes, fewer profiles, --workspace-mib, or a machine with more memory"
PRESET = "quantize the float model with `deploykit quantize --target tensorrt`"
_PAIRS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_SAID = (
    (r"out ?of ?memory|bad_alloc|MEM_ALLOC|cudaErrorMemoryAllocation", ResourceError, MORE_MEMORY),
    (
        r"libnvinfer_lean|lean runtime",
        MissingError,
        "leave --version-compatible out, or install the lean runtime",
    ),
    (
        r"insufficient driver|error 35|CUDA initialization failure",
        MissingError,
        "build on a GPU host, or with --flavour tensorrt-rtx, which needs no GPU",
    ),
    (
        r"no optimization profile has been defined",
        UsageError,
        "give --opt-shapes (and --min-shapes, --max-shapes)",
    ),
    (
        r"hw-specific datatypes|does not support .*(fp8|int4|fp4|bf16)",
        UsageError,
        "name newer GPUs with --gpu, or take another precision",
    ),
    (
        r"[Rr]eshape|volume mismatch|IShuffleLayer|dimensions? (mismatch|not equal)|broadcast",
        UsageError,
        "the model does not take these shapes: give real ones, or --shapes-from DATA",
    ),
)
"""What a builder's message means: pattern, kind of error, way out."""


def of_builder(told: str, request: Request) -> DeploykitError:
    """The error for a build that gave nothing, by TensorRT's last message."""
    kind: type[DeploykitError] = StageError
    hint = "try another --optimization-level, or shapes that the model takes"
    for pattern, meant, way_out in _SAID:
        if re.search(pattern, told, re.IGNORECASE):
            kind, hint = meant, way_out
            break
    name = request.module.replace("_", "-")
    return kind(f"{name} cannot build {request.onnx}: {told}", hint=hint)


def of_parser(parser: Any, path: Path) -> StageError:
    """The error for a model that the parser refuses: which node, why, and what would do."""
    with needs("onnx"):
        import onnx
    error = parser.get_error(0) if parser.num_errors else None
    if error is None:
        return StageError(f"TensorRT's parser refuses {path}", hint="check the file: inspect it")
    graph = onnx.load(path, load_external_data=False).graph
    node = _node(graph, error)
    where = f" at {_name(node)}" if node else ""
    what, hint = _reason(graph, node, str(error.desc()))
    return StageError(f"TensorRT's parser refuses {path}{where}: {what}", hint=hint)


def _node(graph: onnx.GraphProto, error: Any) -> onnx.NodeProto | None:
    """The node that a parser error is about: by its name, by its number, or not known."""
    name, number = str(error.node_name() or ""), int(error.node())
    nodes: list[onnx.NodeProto] = list(graph.node)
    for node in nodes:
        if name and node.name == name:
            return node
    if 0 <= number < len(nodes) and nodes[number].op_type == error.node_operator():
        return nodes[number]
    return None


def _name(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {(node.name or node.output[0])!r}"


def _reason(graph: onnx.GraphProto, node: onnx.NodeProto | None, told: str) -> tuple[str, str]:
    """What is wrong and the way out; the parser's own words where we know no better."""
    if node is not None and node.op_type in _PAIRS:
        if found := _pair_fault(graph, node):
            return found, PRESET
        return _line(told), PRESET
    line = _line(told)
    if node is not None and re.search(r"no importer|unsupported operator|Plugin not found", told):
        return (
            f"no support for the operator {node.domain or 'ai.onnx'}.{node.op_type}",
            "export without it, or give a library that has it with --plugins",
        )
    return line, "export with another opset, or leave out what it names"


def _pair_fault(graph: onnx.GraphProto, node: onnx.NodeProto) -> str | None:
    """Why TensorRT refuses a quantize or dequantize node: the tensor at fault and its type."""
    import onnx

    constants = {tensor.name: tensor for tensor in graph.initializer}
    made = {name: n for n in graph.node for name in n.output}
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    source = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
    if source is not None and source.data_type == onnx.TensorProto.INT32:
        return f"the bias {source.name!r} is int32, TensorRT takes it in float only"
    if zero is None:
        return None
    kind = onnx.TensorProto.DataType.Name(zero.data_type).lower()
    tensor = node.input[0]
    if node.op_type == "DequantizeLinear" and tensor in made:
        tensor = made[tensor].input[0]
    if zero.data_type not in _taken():
        return f"{tensor!r} is quantized to {kind}, TensorRT takes int8 and float8e4m3fn"
    if kind == "int8" and onnx.numpy_helper.to_array(zero).any():
        return f"{tensor!r} has a zero point that is not 0, TensorRT takes symmetric int8 only"
    return None


def _taken() -> frozenset[int]:
    import onnx

    kinds = onnx.TensorProto
    return frozenset({kinds.INT8, kinds.FLOAT8E4M3FN, kinds.INT4, kinds.FLOAT4E2M1})


def _line(told: str) -> str:
    """The last sentence of a parser's message: the reason, without its source location."""
    lines = [line.strip() for line in told.splitlines() if line.strip()] or ["no reason given"]
    return re.sub(r"^.*?Assertion failed: ", "", lines[0])
