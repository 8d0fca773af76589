"""Shapes as they are written on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable

from deploykit.errors import UsageError, did_you_mean
from deploykit.values import BATCH, TensorSpec

Shape = tuple[int, ...]
DTYPES = ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")


def parse_shape(text: str) -> tuple[str, Shape]:
    """`name:1x3x224x224`, as trtexec writes it, to the name and the shape. Raises UsageError."""
    match = re.fullmatch(r"(.+):(\d+(?:x\d+)*)", text)
    if not match:
        raise UsageError(f"{text!r} is no shape", hint="write name:1x3x224x224")
    return match[1], tuple(int(part) for part in match[2].split("x"))


def parse_inputs(shapes: Iterable[str], dynamic_axes: Iterable[str]) -> tuple[TensorSpec, ...]:
    """Inputs from `name:1x3x224x224` or `name:1x128:int64`, and dynamic axes `name:2=height`.

    The first axis of every input counts samples and is dynamic. Raises UsageError: not of that
    form, an unknown dtype, two shapes of one input, a dynamic axis of an input that has no shape
    or not so many axes.
    """
    specs: dict[str, TensorSpec] = {}
    for text in shapes:
        rest, _, last = text.rpartition(":")
        dtype, shape_text = ("float32", text) if re.fullmatch(r"\d+(x\d+)*", last) else (last, rest)
        if dtype not in DTYPES:
            raise UsageError(f"{text!r}: unknown dtype {dtype!r}", hint=did_you_mean(dtype, DTYPES))
        name, shape = parse_shape(shape_text)
        if name in specs:
            raise UsageError(f"{text!r}: {name!r} has a shape already", hint="give one an input")
        specs[name] = TensorSpec(name=name, dtype=dtype, shape=(BATCH, *shape[1:]))
    for text in dynamic_axes:
        match = re.fullmatch(r"(.+):(\d+)=([A-Za-z_]\w*)", text)
        if not match:
            raise UsageError(f"{text!r} is no dynamic axis", hint="write name:axis=dimension")
        name, axis, dimension = match[1], int(match[2]), match[3]
        if name not in specs:
            raise UsageError(
                f"the dynamic axis {text!r} is of an input without a shape",
                hint=f"give --input-shape {name}:1x... too",
            )
        specs[name] = _with_dimension(specs[name], axis, dimension)
    return tuple(specs.values())


def _with_dimension(spec: TensorSpec, axis: int, dimension: str) -> TensorSpec:
    if axis >= len(spec.shape):
        raise UsageError(
            f"{spec} has no axis {axis}", hint=f"axes count from 0 to {len(spec.shape) - 1}"
        )
    shape = tuple(dimension if i == axis else d for i, d in enumerate(spec.shape))
    return spec.model_copy(update={"shape": shape})
