"""What lets an ONNX file travel: no native code, and the same answers on another CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deploykit.errors import InputError
from deploykit.formats import onnx_weights

if TYPE_CHECKING:
    import onnx

NO_OVERFLOW = 64
"""Two products u8 * s8 fit in 16 bits, 2 * 255 * 64 <= 32767, for weights up to this magnitude."""


def check(model: onnx.ModelProto, path: Path) -> None:
    """Refuse what is not portable. Raises InputError."""
    if any(node.op_type == "EPContext" for node in model.graph.node):
        raise InputError(
            f"{path}: an EPContext node holds native code in a file that looks portable",
            hint="package the model that it was compiled from",
        )
    if any(prop.key == "ort_config" for prop in model.metadata_props):
        raise InputError(
            f"{path}: its metadata sets session options ('ort_config')",
            hint="remove the entry; the bundle says how the model is run",
        )


def sums_overflow(model: onnx.ModelProto, folder: Path) -> bool:
    """Whether uint8 activations meet int8 weights whose products overflow 16-bit sums.

    The model may be a shell whose weights lie in `folder`.
    """
    import onnx

    tensors = {t.name: t for t in model.graph.initializer}
    zeros = [
        tensors.get(node.input[2]) if len(node.input) > 2 else None
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    ]
    if all(zero and zero.data_type != onnx.TensorProto.UINT8 for zero in zeros):
        return False  # a zero point that is left out, or computed, counts as uint8
    weights = (
        onnx_weights.array(tensor, folder)
        for tensor in tensors.values()
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    )
    return any(
        max(int(weight.max(initial=0)), -int(weight.min(initial=0))) > NO_OVERFLOW
        for weight in weights
    )
