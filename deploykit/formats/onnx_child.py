"""The process that reads an ONNX file first: `python -m deploykit.formats.onnx_child FILE`.

It writes one JSON object to stdout: what is wrong with the file, or {} for nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit._lazy import installed
from deploykit.errors import RESOURCE, DeploykitError, InputError, ResourceError
from deploykit.formats import onnx_check, onnx_file, onnx_weights
from deploykit.formats.onnx_check import TOO_MUCH

if TYPE_CHECKING:
    import onnx

KNOWN_DOMAINS = frozenset({
    "", "ai.onnx", "ai.onnx.ml", "ai.onnx.training", "ai.onnx.preview", "ai.onnx.preview.training",
    "com.microsoft", "com.microsoft.nchwc",
})  # fmt: skip
"""Domains whose operators ONNX Runtime brings along."""
OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate", "Cannot allocate", "bad allocation")
MENDED = "same node name"
"""What ONNX Runtime says of a model that the stages which rewrite it mend: they name its nodes."""


def examine(
    path: Path, *, native: bool = False, allow: Callable[[int], None] | None = None
) -> None:
    """Parse a file, hold it against onnx's checker and its weights, and load it in ONNX Runtime.

    `allow` is told the bytes of the model before it is loaded. Raises InputError: what is wrong
    with it. ResourceError: it takes too much memory.
    """
    model = onnx_file.shell(path)
    if allow:
        allow(onnx_weights.total_bytes(model))
    odd = list(native_nodes(model))
    if odd and not native:
        raise InputError(
            f"{path}: {len(odd)} nodes need native code of others: {', '.join(odd[:3])}",
            hint="nothing here runs them; give the model without them",
        )
    if not odd:
        _load(path)


def native_nodes(model: onnx.ModelProto) -> Iterator[str]:
    """Nodes that run code which neither the file nor the runtimes bring: compiled or of others."""
    own = {function.domain for function in model.functions}
    functions = [node for function in model.functions for node in function.node]
    for node in (*model.graph.node, *functions):
        for each in (node, *_inside(node)):
            if each.op_type == "EPContext" or each.domain not in KNOWN_DOMAINS | own:
                domain = each.domain or "ai.onnx"
                yield f"{domain}::{each.op_type} {each.name!r}"


def _inside(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                yield inner
                yield from _inside(inner)


def _load(path: Path) -> None:
    if not installed("onnxruntime"):
        return
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.disable_prepacking", "1")
    try:
        ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base
        if MENDED in str(error):
            return
        if any(words in str(error) for words in OUT_OF_MEMORY):
            raise ResourceError(
                f"{path}: ONNX Runtime runs out of memory when it loads it", hint=TOO_MUCH
            ) from error
        raise InputError(
            f"{path}: ONNX Runtime does not load it: {onnx_file.line(error)}",
            hint="export it again, or with another opset",
        ) from error


def _told(path: Path, *, native: bool) -> dict[str, object]:
    try:
        examine(path, native=native, allow=onnx_check.limit)
    except DeploykitError as error:
        return {"fact": str(error), "hint": error.hint, "exit_code": error.exit_code}
    except MemoryError:
        fact = f"{path}: reading it runs out of memory"
        return {"fact": fact, "hint": TOO_MUCH, "exit_code": RESOURCE}
    return {}


def main() -> None:
    """Examine the file that is named first."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    path = Path(sys.argv[1])
    onnx_check.limit(path.stat().st_size)
    told = _told(path, native="--native" in sys.argv[2:])
    os.write(answers, json.dumps(told).encode() + b"\n")
    os._exit(0)  # a library may hang or crash on its way out


if __name__ == "__main__":
    main()
