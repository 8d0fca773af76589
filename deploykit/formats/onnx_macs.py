"""How many multiply-accumulates a node of an ONNX graph takes, by the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

RECURRENT = ("LSTM", "GRU", "RNN")
"""They compute too, in float: a product with the weights and one with the state, at each step."""
CONVOLUTIONS = ("Conv", "ConvTranspose", "ConvInteger", "FusedConv")
PRODUCTS = ("MatMul", "Gemm", "MatMulInteger", "FusedMatMul", "FusedGemm", "DynamicQuantizeMatMul",
            "MatMulIntegerToFloat", "Einsum", "MatMulNBits")  # fmt: skip
INTEGER = frozenset({
    "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QGemm", "QAttention",
    "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "DynamicQuantizeLSTM",
})  # fmt: skip
"""Operators that compute in 8-bit integers without Q/DQ pairs around them."""
UNCOUNTED = frozenset({
    "Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "QAttention",
    "PackedMultiHeadAttention", "DecoderMaskedMultiHeadAttention", "QGemm", "DynamicQuantizeLSTM",
    "DeformConv", "MatMulBnb4", "QMoE", "MoE", "LinearAttention",
})  # fmt: skip
"""Operators that compute, and how much is not worked out here."""
COMPUTING = frozenset({*RECURRENT, *CONVOLUTIONS, *PRODUCTS, *INTEGER, *UNCOUNTED})
Sizes = Mapping[str, Sequence[int]]


def macs(node: onnx.NodeProto, sizes: Sizes) -> int | None:
    """Multiply-accumulates of one run of a node; 0 if it computes nothing, None if not known.

    `sizes` are the shapes by tensor name; a tensor whose shape is not known is left out.
    """
    kind = node.op_type
    if kind not in COMPUTING:
        return 0
    if kind in UNCOUNTED:
        return None
    if kind in RECURRENT:
        return _recurrent(node, sizes)
    return _einsum(node, sizes) if kind == "Einsum" else _product(node, sizes)


def _product(node: onnx.NodeProto, sizes: Sizes) -> int | None:
    """For each value of the output (of the input where it is turned round), one dot product."""
    kind = node.op_type
    second = 3 if kind.startswith("QLinear") else 1  # behind a scale and a zero point
    names = (*node.input, "", "", "", "")
    left, right = sizes.get(names[0]), sizes.get(names[second])
    out = sizes.get(node.output[0])
    if kind == "MatMulNBits":
        return None if out is None else prod(out) * _attribute(node, "K", 0)
    if not left or not right or out is None:
        return None
    if kind == "ConvTranspose":
        return prod(left) * prod(right[1:])
    if "Conv" in kind:
        return prod(out) * prod(right[1:])
    return prod(out) * left[0 if _attribute(node, "transA", 0) else -1]


def _recurrent(node: onnx.NodeProto, sizes: Sizes) -> int | None:
    """Weights and recurrent weights once for each step and sample."""
    found = [sizes.get(name) for name in node.input[:3]]
    if len(found) < 3 or any(size is None for size in found):
        return None
    data, weights, state = (size or () for size in found)
    return prod(data[:2]) * (prod(weights) + prod(state))


def _einsum(node: onnx.NodeProto, sizes: Sizes) -> int | None:
    """The product of the sizes of all indices, as if it were done in one loop."""
    text = next((a.s.decode() for a in node.attribute if a.name == "equation"), "")
    known: dict[str, int] = {}
    for term, name in zip(
        text.replace(" ", "").split("->")[0].split(","), node.input, strict=False
    ):
        shape = sizes.get(name)
        if shape is None or "." in term or len(term) != len(shape):
            return None
        known |= dict(zip(term, shape, strict=True))
    return prod(known.values()) if len(node.input) > 1 else 0


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)
