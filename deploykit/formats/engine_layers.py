"""What a built engine computes in, by the JSON of TensorRT's own inspector."""

from __future__ import annotations

import json
import re
from collections import Counter

from deploykit.values import Json

_KINDS = {
    "int8": r"\bint8\b",
    "fp8": r"\bfp8\b|e4m3",
    "int4": r"\bint4\b",
    "bf16": r"\bb(f|float)16\b",
    "fp16": r"\bhalf\b|\bfp16\b",
    "fp32": r"\bfloat\b|\bfp32\b",
}
_WORK = re.compile(r"conv|gemm|matmul|matrixmultiply|fc\b", re.IGNORECASE)
_NO_KERNEL = frozenset({"constant", "shape host to device", "noop", "signal", "wait"})


def account(text: str) -> Json:
    """The account of an inspector's JSON (verbosity DETAILED): layers, precisions, reformats."""
    layers = [layer for layer in json.loads(text).get("Layers", ()) if isinstance(layer, dict)]
    kernels = [lay for lay in layers if str(lay.get("LayerType", "")).lower() not in _NO_KERNEL]
    reformats = [lay for lay in kernels if "reformat" in str(lay.get("LayerType")).lower()]
    rest = [lay for lay in kernels if lay not in reformats]
    heavy = [lay for lay in rest if _WORK.search(f"{lay.get('LayerType')} {lay.get('Name')}")]
    return {
        "engine_layers": len(kernels),
        "engine_layers_by_precision": dict(Counter(map(precision, kernels)).most_common()),
        "engine_compute_layers_by_precision": dict(Counter(map(precision, heavy)).most_common()),
        "reformats": [str(lay.get("Name", "")) for lay in reformats],
        "accounted_from": "the parsed network, and the engine's inspector",
        "ran_on_gpu": True,
    }


def precision(layer: Json) -> str:
    """The narrowest type among what a layer reads: what its kernel computes in."""
    told = [str(t.get("Format/Datatype", "")) for t in layer.get("Inputs", ())] or [
        str(t.get("Format/Datatype", "")) for t in layer.get("Outputs", ())
    ]
    for name, pattern in _KINDS.items():
        if any(re.search(pattern, text, re.IGNORECASE) for text in told):
            return name
    return "other"
