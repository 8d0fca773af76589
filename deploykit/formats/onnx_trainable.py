"""What of ONNX can be trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from deploykit.errors import InputError
from deploykit.formats.onnx_operators import DTYPES, operators

if TYPE_CHECKING:
    import onnx

PAIR = ("QuantizeLinear", "DequantizeLinear")


def check(nodes: Iterable[onnx.NodeProto], tensors: Iterable[onnx.TensorProto], name: str) -> None:
    """Raises InputError: operators or types that no gradient goes through here."""
    import onnx

    odd = sorted({problem for node in nodes for problem in _problems(node)})
    kinds = {t.data_type for t in tensors} - set(DTYPES)
    odd += [f"constants in {onnx.TensorProto.DataType.Name(kind)}" for kind in sorted(kinds)]
    if odd:
        raise InputError(
            f"{name} cannot be trained: {', '.join(odd)}",
            hint="train the PyTorch model before the export",
        )


def _problems(node: onnx.NodeProto) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"{node.domain}::{node.op_type}"
    elif node.op_type not in operators() and node.op_type not in PAIR:
        yield node.op_type
    elif node.op_type in PAIR and any(a.name == "block_size" and a.i for a in node.attribute):
        yield "weights in blocks (int4)"
