"""What a built engine computes in, from TensorRT's own inspector; needs a GPU."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from deploykit.errors import StageError
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


def of_plan(trt: Any, plan: Any, log: Any) -> Json:
    """Layers by precision and the reformats of a serialized engine.

    Raises StageError: the engine that was just built does not load.
    """
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise StageError(
            f"the engine does not load on the machine that built it: {log.told()}",
            hint="see `deploykit doctor`; check driver and library versions",
        )
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return of_text(text)


def of_text(text: str) -> Json:
    """The account of an inspector's JSON (verbosity DETAILED): layers, precisions, reformats."""
    layers = [layer for layer in json.loads(text).get("Layers", ()) if isinstance(layer, dict)]
    kernels = [lay for lay in layers if str(lay.get("LayerType", "")).lower() not in _NO_KERNEL]
    reformats = [lay["Name"] for lay in kernels if "reformat" in str(lay.get("LayerType")).lower()]
    heavy = [lay for lay in kernels if _WORK.search(f"{lay.get('LayerType')} {lay.get('Name')}")]
    heavy = [lay for lay in heavy if lay.get("Name") not in reformats]
    return {
        "engine_layers": len(kernels),
        "engine_layers_by_precision": dict(Counter(map(precision, kernels)).most_common()),
        "engine_compute_layers_by_precision": dict(Counter(map(precision, heavy)).most_common()),
        "reformats": reformats,
        "accounted_from": "the parsed network, and the engine's inspector",
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
