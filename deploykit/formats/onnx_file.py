"""ONNX files: reading what they declare, checking that they are sound."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deploykit import store
from deploykit._lazy import needs
from deploykit.errors import InputError
from deploykit.formats import onnx_check, onnx_weights
from deploykit.formats.onnx_check import MAKE_AGAIN
from deploykit.values import Artifact, Precision, TensorSpec

if TYPE_CHECKING:
    import onnx


def read(path: Path) -> onnx.ModelProto:
    """Load a model with its weights. Raises InputError: it is not a sound ONNX file."""
    model = shell(path)
    onnx_weights.load(model, path.parent)
    return model


def shell(path: Path) -> onnx.ModelProto:
    """Load a model; weights that lie in other files stay there, and are known to be there.

    Raises InputError: it is not a sound ONNX file, or too new for the libraries here.
    """
    with needs("onnx"):
        import onnx
        from google.protobuf.message import DecodeError
    onnx_check.look(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not an ONNX file: {line(error)}", hint=MAKE_AGAIN) from error
    if not model.graph.node and not model.graph.output:
        raise InputError(f"{path}: not an ONNX file: it holds no graph", hint=MAKE_AGAIN)
    onnx_weights.check(model, path)
    _check_versions(model, path)
    try:
        onnx.checker.check_model(str(path) if onnx_weights.files(model) else model)
    except (ValueError, onnx.checker.ValidationError) as error:
        raise InputError(f"{path}: broken ONNX model: {line(error)}", hint=MAKE_AGAIN) from error
    return model


def _check_versions(model: onnx.ModelProto, path: Path) -> None:
    """Raises InputError: an operator set or a format that is newer than the library here."""
    import onnx

    told, newest = f"{path}: this version of onnx knows", onnx.defs.onnx_opset_version()
    if (given := opset(model)) > newest:
        raise InputError(
            f"{told} opsets up to {newest}, the model is of opset {given}",
            hint=f"export it with opset {newest} or lower, or install a newer onnx",
        )
    if model.ir_version > onnx.IR_VERSION:
        raise InputError(
            f"{told} IR versions up to {onnx.IR_VERSION}, the model is of {model.ir_version}",
            hint="export it for an older version, or install a newer onnx",
        )


def open_file(path: Path, *, native: bool = False) -> Artifact:
    """The artifact of an ONNX file: by its record, or by what the file declares.

    A file without a record may come from anywhere: it is first read in a process of its own. With
    `native` it may hold nodes that only native code of others can run; see `onnx_check.check`.
    """
    if artifact := store.read(path):
        return artifact
    onnx_check.check(path, native=native)
    return declared(path)


def declared(path: Path) -> Artifact:
    """The artifact of a file by what it declares. Raises InputError: it is not sound."""
    model = shell(path)
    weights = onnx_weights.files(model)
    try:
        return Artifact(
            path=path, format="onnx", precision=precision(model), inputs=inputs(model),
            outputs=outputs(model), weights=weights, sha256=store.digest(path, weights),
        )  # fmt: skip
    except ValueError as error:  # names that are no text
        raise InputError(f"{path}: broken ONNX model: {line(error)}", hint=MAKE_AGAIN) from error


def inputs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """Inputs without a default value."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return tuple(_spec(value) for value in model.graph.input if value.name not in constants)


def outputs(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """Outputs of the graph."""
    return tuple(_spec(value) for value in model.graph.output)


def opset(model: onnx.ModelProto) -> int:
    """Version of the standard operator set."""
    return max((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), default=0)


def operators(model: onnx.ModelProto) -> dict[str, int]:
    """Operator types of the main graph and how often each occurs, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


SCOPES = "pkg.torch.onnx.name_scopes"
"""Where PyTorch's exporter keeps the modules around a node: a Python list, outermost first."""


class Origin(NamedTuple):
    """A node, and the PyTorch module that it came from where the file says so."""

    node: str
    module: str | None


def origins(model: onnx.ModelProto) -> dict[str, Origin]:
    """Each node by its own name and by those of the tensors that it makes.

    A node without a name is called by its first output.
    """
    found = {}
    for node in model.graph.node:
        origin = Origin(node.name or node.output[0], _module(node))
        found.update(dict.fromkeys(node.output, origin))
    named = {n.name: Origin(n.name, _module(n)) for n in model.graph.node if n.name}
    return {**found, **named}


def _module(node: onnx.NodeProto) -> str | None:
    """Path of the innermost module around a node; the last scope is the operation itself."""
    told = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    try:
        scopes = ast.literal_eval(told)
    except (ValueError, SyntaxError):
        return None
    inner = [str(scope) for scope in scopes[:-1] if scope]
    return inner[-1] if inner else None


def parameters(model: onnx.ModelProto) -> int:
    """Number of values in the initializers and Constant nodes of the main graph."""
    constants = [
        attribute.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    return sum(int(np.prod(tensor.dims)) for tensor in (*model.graph.initializer, *constants))


def precision(model: onnx.ModelProto) -> Precision:
    """The lowest precision that the file computes in: by Q/DQ pairs, then by its weights."""
    import onnx

    types = Counter(t.data_type for t in model.graph.initializer for _ in range(len(t.dims) > 1))
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        fp8 = {onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2}
        return "fp8" if fp8 & {t.data_type for t in model.graph.initializer} else "int8"
    if types[onnx.TensorProto.INT4]:
        return "int4"
    if types[onnx.TensorProto.FLOAT16] > types[onnx.TensorProto.FLOAT]:
        return "fp16"
    return "bf16" if types[onnx.TensorProto.BFLOAT16] > types[onnx.TensorProto.FLOAT] else "fp32"


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    import onnx

    tensor = value.type.tensor_type
    if tensor.elem_type not in onnx.helper.get_all_tensor_dtypes():
        raise InputError(
            f"{value.name!r} is no tensor of a dtype that is known here",
            hint="deploykit takes models of dense tensors",
        )
    shape = tuple(
        dim.dim_value
        if dim.HasField("dim_value") and dim.dim_value >= 0  # -1 is some tools' word for dynamic
        else dim.dim_param or f"{value.name}_{axis}"
        for axis, dim in enumerate(tensor.shape.dim)
    )
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    return TensorSpec(name=value.name, dtype=dtype, shape=shape)


def line(error: Exception) -> str:
    """The first line of what a library says that is not empty."""
    lines = [part.strip() for part in str(error).splitlines() if part.strip()]
    return lines[0] if lines else type(error).__name__
