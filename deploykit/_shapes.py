"""Shapes as they are written on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from deploykit.errors import UsageError, did_you_mean
from deploykit.values import BATCH, Array, Dimension, TensorSpec

Shape = tuple[int, ...]
DTYPES = ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")


def parse_shape(text: str) -> tuple[str, Shape]:
    """`name:1x3x224x224`, as trtexec writes it, to the name and the shape. Raises UsageError."""
    match = re.fullmatch(r"(.+):(\d+(?:x\d+)*)", text)
    if not match:
        raise UsageError(f"{text!r} is no shape", hint="write name:1x3x224x224")
    return match[1], tuple(int(part) for part in match[2].split("x"))


def parse_inputs(shapes: Iterable[str]) -> tuple[TensorSpec, ...]:
    """Inputs from `name:1x3x224x224` or `name:1x128:int64`.

    The first axis of every input counts samples and is dynamic. Raises UsageError: not of that
    form, an unknown dtype, two shapes of one input.
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
    return tuple(specs.values())


_AXIS = re.compile(r"(.+):(\d+)=([A-Za-z_]\w*)(?:\[(\d+)?\.\.(\d+)?\])?")
Specs = tuple[TensorSpec, ...]
Dimensions = tuple[Dimension, ...]


def name_axes(specs: Specs, axes: Iterable[str]) -> tuple[Specs, Dimensions]:
    """Inputs with the axes `name:1=sequence[1..512]` made dynamic, and all dynamic dimensions.

    The range may be left out, or open at an end. The usual size is the one that the axis had.
    Raises UsageError: not of that form, an empty range, two ranges of one dimension, an axis of an
    input that is not there or has not so many.
    """
    named = {spec.name: spec for spec in specs}
    dimensions: dict[str, Dimension] = {}
    for text in axes:
        match = _AXIS.fullmatch(text)
        if not match:
            raise UsageError(
                f"{text!r} is no dynamic axis",
                hint="write name:axis=dimension or name:1=d[1..512]",
            )
        name, axis = match[1], int(match[2])
        if name not in named:
            raise UsageError(
                f"the dynamic axis {text!r} is of an input that is not there",
                hint=f"give --input-shape {name}:1x...; {did_you_mean(name, named)}",
            )
        spec = named[name]
        if axis >= len(spec.shape):
            raise UsageError(
                f"{spec} has no axis {axis}", hint=f"axes count from 0 to {len(spec.shape) - 1}"
            )
        dimension = _dimension(text, match, spec.shape[axis])
        dimensions[dimension.name] = _same(text, dimension, dimensions.get(dimension.name))
        shape = tuple(dimension.name if i == axis else d for i, d in enumerate(spec.shape))
        named[name] = spec.model_copy(update={"shape": shape})
    every = dict.fromkeys(d for s in named.values() for d in s.shape if isinstance(d, str))
    return tuple(named.values()), tuple(dimensions.get(d) or Dimension(name=d) for d in every)


def _dimension(text: str, match: re.Match[str], had: int | str) -> Dimension:
    low, high = max(1, int(match[4] or 1)), int(match[5]) if match[5] else None
    if high is not None and high < low:
        raise UsageError(f"{text!r}: the range is empty", hint="write [smallest..largest]")
    made = Dimension(name=match[3], low=low, high=high)
    return made.model_copy(update={"usual": made.nearest(had if isinstance(had, int) else 2)})


def _same(text: str, new: Dimension, old: Dimension | None) -> Dimension:
    """One dimension on several axes: the range may be said at any of them."""
    if old is None or old == new:
        return new
    bare = [d for d in (new, old) if d.low == 1 and d.high is None]
    if not bare:
        raise UsageError(f"{text!r}: {old.name} is {old} already", hint="give one range")
    return old if bare[0] is new else new


def resized(array: Array, shape: tuple[int, ...]) -> Array:
    """Cut, or repeated from its start, along each axis to `shape` (of as many axes)."""
    for axis, size in enumerate(shape):
        if array.shape[axis] != size:
            array = array.take(np.arange(size) % max(1, array.shape[axis]), axis=axis)
    return array
