"""A foreign graph made fit to work on: its opset lifted, its shapes inferred."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploykit._lazy import needs
from deploykit.errors import InputError
from deploykit.formats import onnx_file

if TYPE_CHECKING:
    import onnx

OPSET = 17
"""Models of too low an opset are lifted to this at least."""


def lift(model: onnx.ModelProto, least: int, path: Path) -> tuple[onnx.ModelProto, list[str]]:
    """The model with weights that are no inputs and at least this opset, and what was done.

    The model may be a shell. Raises InputError: onnx's version converter cannot lift it.
    """
    told: list[str] = []
    if count := _weights_are_no_inputs(model):
        told.append(f"{count} weights are no inputs any more")
    if (before := onnx_file.opset(model)) < least:
        model = _lifted(model, max(least, OPSET), path)
        told.append(f"opset lifted from {before} to {onnx_file.opset(model)}")
    return model, told


def _weights_are_no_inputs(model: onnx.ModelProto) -> int:
    """Take weights out of the inputs, where IR 3 wants them, in place; how many.

    The tools take those for inputs without a value.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    listed = [value for value in model.graph.input if value.name in weights]
    for value in listed:
        model.graph.input.remove(value)
    if listed:
        model.ir_version = max(model.ir_version, 4)
    return len(listed)


def _lifted(model: onnx.ModelProto, opset: int, path: Path) -> onnx.ModelProto:
    import onnx
    import onnx.version_converter

    try:
        lifted = onnx.version_converter.convert_version(model, opset)
    except (RuntimeError, onnx.version_converter.ConvertError) as error:
        raise InputError(
            f"{path}: cannot be lifted from opset {onnx_file.opset(model)} to {opset}: "
            f"{str(error).strip().splitlines()[-1]}",
            hint=f"export it with opset {opset}",
        ) from error
    if opset > OPSET:  # types that older IR versions do not have
        least = onnx.helper.find_min_ir_version_for(lifted.opset_import, ignore_unknown=True)
        lifted.ir_version = max(lifted.ir_version, least)
    return lifted


def infer(model: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """The model with the types and shapes of what lies between, and who inferred them.

    onnx first; where that fails or leaves types open, ONNX Runtime's symbolic inference. The model
    may be a shell.
    """
    import onnx

    best, who = model, "shapes not inferred: neither onnx nor onnxruntime can"
    for name, way in (("onnx", _by_onnx), ("onnxruntime", _by_onnxruntime)):
        try:
            found = way(model)
        except Exception:  # noqa: BLE001, S112 - both raise many kinds; the way taken is told
            continue
        if untyped(found) < untyped(best) or (best is model and not untyped(found)):
            best, who = found, f"shapes inferred by {name}"
        if not untyped(best):
            break
    if left := untyped(best):
        who += f", {left} tensors have no type"
    assert isinstance(best, onnx.ModelProto)  # noqa: S101
    return best, who


def untyped(model: onnx.ModelProto) -> int:
    """How many tensors of the main graph have no known type."""
    graph = model.graph
    known = {v.name for v in (*graph.value_info, *graph.input, *graph.output)}
    known |= {tensor.name for tensor in graph.initializer}
    made = {name for node in graph.node for name in node.output if name}
    return len(made - known)


def _by_onnx(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _by_onnxruntime(model: onnx.ModelProto) -> onnx.ModelProto:
    with needs("onnxruntime"):
        from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    found: onnx.ModelProto = SymbolicShapeInference.infer_shapes(model, auto_merge=True)
    return found
