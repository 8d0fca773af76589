"""What a model is made of, as lines to read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from deploykit.formats.onnx_anatomy import Anatomy, Part
from deploykit.report.summary import size

LISTED = 3
"""Native nodes that are named."""
WIDTH = 96


def lines(found: Anatomy) -> Iterator[str]:
    """One fact a line; what is not there has none."""
    made = f", made by {found.producer}" if found.producer else ""
    yield f"opset       {_opsets(found)}, IR {found.ir_version}{made}"
    if found.dynamic:
        places = (f"{name} ({', '.join(at)})" for name, at in found.dynamic.items())
        yield f"dynamic     {', '.join(places)}"
    yield f"parameters  {found.parameters:,}: {_weights(found)}"
    if found.files:
        files = (f"{name} {size(count)}" for name, count in found.files.items())
        yield f"weights in  {', '.join(files)}"
    yield from _work(found)
    yield from _wrapped(f"operators   {sum(found.operators.values()):,}: ", found.operators)
    if found.nodes_in_subgraphs:
        yield f"            {found.nodes_in_subgraphs:,} of them in branches and loop bodies"
    if odd := found.native_nodes:
        more = f" and {len(odd) - LISTED} more" if len(odd) > LISTED else ""
        yield f"native code {', '.join(odd[:LISTED])}{more}: only code of others runs them"


def _opsets(found: Anatomy) -> str:
    others = (f"{name} {version}" for name, version in found.domains.items() if name != "ai.onnx")
    return ", ".join((str(found.opset), *others))


def _weights(found: Anatomy) -> str:
    names = {"float": "float32", "double": "float64"}
    held = found.weights.items()
    return ", ".join(f"{names.get(name, name)} {size(each.bytes)}" for name, each in held)


def _work(found: Anatomy) -> Iterator[str]:
    at = ", ".join(f"{name} {list(shape)}" for name, shape in found.shapes.items())
    total = found.multiply_accumulates
    yield f"work        {short(total)} multiply-accumulates ({total:,}) at {at}"
    for part in found.parts:
        yield f"            {_part(part, total)}"
    nodes, work = found.quantized
    if nodes:
        computing = sum(part.nodes for part in found.parts)
        yield (
            f"quantized   {nodes} of {computing} computing nodes, {share(work, total)} of the work"
        )
    if found.uncounted:
        kinds = ", ".join(f"{name} {count}" for name, count in found.uncounted.items())
        why = f" ({found.problem}; --input-shape name:1x3x224x224 says others)"
        yield f"NOT COUNTED {kinds}{why if found.problem else ''}"


def _part(part: Part, total: int) -> str:
    return f"{part.precision}: {part.nodes} nodes, {share(part.multiply_accumulates, total)}"


def share(part: int, whole: int) -> str:
    """`98.2 %`; 100 % and 0 % for nothing but all and none."""
    if part in (0, whole):
        return "100 %" if part else "0 %"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.1f} %"


def short(count: int) -> str:
    """`1.43 G`: three digits and a unit."""
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def _wrapped(head: str, counts: Mapping[str, int]) -> Iterator[str]:
    """A long list over several lines, indented alike."""
    line, indent = head, " " * 12
    for index, (name, count) in enumerate(counts.items()):
        word = f"{name} {count}" + (", " if index < len(counts) - 1 else "")
        if len(line) + len(word) > WIDTH and line.strip():
            yield line.rstrip()
            line = indent
        line += word
    yield line.rstrip()
