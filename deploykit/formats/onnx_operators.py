"""ONNX operators by PyTorch, with gradients: what a graph is run by while it is trained.

Each is called with the node's attributes and its inputs, None for one that is left out.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Attributes = Mapping[str, Any]
Operator = Callable[..., Any]

DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 16: "bfloat16",
}  # fmt: skip
"""By the number that ONNX gives a type."""


def _numbers(attributes: Attributes, name: str, given: Tensor | None) -> list[int] | None:
    """What older operator sets have as an attribute and newer ones as an input."""
    if given is not None:
        return [int(n) for n in given.reshape(-1).tolist()]
    found = attributes.get(name)
    return None if found is None else [int(n) for n in found]


def _pads(x: Tensor, attributes: Attributes, kernel: Sequence[int]) -> list[int]:
    """The pads of a window: all begins, then all ends."""
    dims = len(kernel)
    kind = attributes.get("auto_pad", b"NOTSET").decode()
    if kind in ("NOTSET", "VALID"):
        return [int(n) for n in attributes.get("pads", [0] * 2 * dims)]
    strides = attributes.get("strides", [1] * dims)
    dilations = attributes.get("dilations", [1] * dims)
    begins, ends = [], []
    for size, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        begins.append(more if kind == "SAME_LOWER" else less)
        ends.append(less if kind == "SAME_LOWER" else more)
    return begins + ends


def _padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> Tensor:
    from torch.nn import functional

    dims = len(pads) // 2
    pairs = [(pads[i], pads[i + dims]) for i in reversed(range(dims))]
    flat = [n for pair in pairs for n in pair]
    return functional.pad(x, flat, value=value) if any(flat) else x


def _conv(a: Attributes, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    from torch.nn import functional

    dims = w.ndim - 2
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
    x = _padded(x, _pads(x, a, w.shape[2:]))
    ones = [1] * dims
    stride, dilation = tuple(a.get("strides", ones)), tuple(a.get("dilations", ones))
    return convolve(x, w, b, stride, 0, dilation, a.get("group", 1))


def _gemm(a: Attributes, x: Tensor, w: Tensor, c: Tensor | None = None) -> Tensor:
    x = x.t() if a.get("transA", 0) else x
    w = w.t() if a.get("transB", 0) else w
    product = (x @ w) * float(a.get("alpha", 1.0))
    return product if c is None else product + c * float(a.get("beta", 1.0))


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    from torch.nn import functional

    kernel = a["kernel_shape"]
    pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[len(kernel) - 1]
    x = _padded(x, _pads(x, a, kernel), -math.inf)
    ones = [1] * len(kernel)
    strides, dilations = tuple(a.get("strides", ones)), tuple(a.get("dilations", ones))
    return pool(x, tuple(kernel), strides, 0, dilations, bool(a.get("ceil_mode", 0)))


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    import torch
    from torch.nn import functional

    kernel = tuple(a["kernel_shape"])
    pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(kernel) - 1]
    strides, ceil = tuple(a.get("strides", [1] * len(kernel))), bool(a.get("ceil_mode", 0))
    pads = _pads(x, a, kernel)
    if a.get("count_include_pad", 0) or not any(pads):
        return pool(_padded(x, pads), kernel, strides, 0, ceil)
    ones = _padded(torch.ones_like(x[:1, :1]), pads)
    share = pool(ones, kernel, strides, 0, ceil)
    return pool(_padded(x, pads), kernel, strides, 0, ceil) / share


def _batch_norm(
    a: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    from torch.nn import functional

    return functional.batch_norm(x, mean, var, scale, bias, eps=a.get("epsilon", 1e-5))


def _layer_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    from torch.nn import functional

    shape = x.shape[a.get("axis", -1) % x.ndim :]
    found = functional.layer_norm(x, tuple(shape), eps=a.get("epsilon", 1e-5)) * scale
    return found if bias is None else found + bias


def _clip(
    a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    import torch

    least = low if low is not None else a.get("min")
    most = high if high is not None else a.get("max")
    if least is not None:
        x = torch.clamp(x, min=float(least))
    return x if most is None else torch.clamp(x, max=float(most))


def _reduced(reduce: Callable[..., Tensor]) -> Operator:
    def run(a: Attributes, x: Tensor, given: Tensor | None = None) -> Tensor:
        axes = _numbers(a, "axes", given)
        if not axes:
            if a.get("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.ndim))
        return reduce(x, dim=tuple(axes), keepdim=bool(a.get("keepdims", 1)))

    return run


def _reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes = [int(n) for n in shape.tolist()]
    if not a.get("allowzero", 0):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = int(a.get("axis", 1))
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _squeeze(a: Attributes, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = _numbers(a, "axes", given)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _unsqueeze(a: Attributes, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = _numbers(a, "axes", given) or []
    dims = x.ndim + len(axes)
    for axis in sorted(axis % dims for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _slice(
    a: Attributes, x: Tensor, starts: Tensor | None = None, ends: Tensor | None = None,
    axes: Tensor | None = None, steps: Tensor | None = None,
) -> Tensor:  # fmt: skip
    firsts, lasts = _numbers(a, "starts", starts) or [], _numbers(a, "ends", ends) or []
    where = _numbers(a, "axes", axes) or list(range(len(firsts)))
    strides = _numbers({}, "", steps) or [1] * len(firsts)
    if any(step < 1 for step in strides):
        raise NotImplementedError("Slice backwards")
    index = [slice(None)] * x.ndim
    for axis, first, last, step in zip(where, firsts, lasts, strides, strict=True):
        index[axis] = slice(first, last, step)
    return x[tuple(index)]


def _gather(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    import torch

    axis = int(a.get("axis", 0)) % x.ndim
    number = torch.where(index < 0, index + x.shape[axis], index).long()
    found = x.index_select(axis, number.reshape(-1))
    return found.reshape(*x.shape[:axis], *number.shape, *x.shape[axis + 1 :])


def _split(a: Attributes, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...]:
    import torch

    axis, sizes = int(a.get("axis", 0)), _numbers(a, "split", given)
    if sizes is None:
        part = math.ceil(x.shape[axis] / a["outputs"])
        sizes = [part] * (a["outputs"] - 1)
    ends = list(itertools.accumulate(sizes[: a["outputs"] - 1]))
    return torch.tensor_split(x, ends, axis)


def _pad(
    a: Attributes, x: Tensor, given: Tensor | None = None, value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if a.get("mode", b"constant") != b"constant" or axes is not None:
        raise NotImplementedError("Pad that is not constant, or of some axes")
    pads = _numbers(a, "pads", given) or []
    return _padded(x, pads, 0.0 if value is None else float(value))


def _resize(
    a: Attributes, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None,
    sizes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from torch.nn import functional

    del roi
    if sizes is not None:
        target = [int(n) for n in sizes.tolist()]
    else:
        assert scales is not None  # noqa: S101 - ONNX demands one of them
        pairs = zip(x.shape, scales.tolist(), strict=True)
        target = [math.floor(size * scale) for size, scale in pairs]
    mode, where = a.get("mode", b"nearest"), a.get("coordinate_transformation_mode", b"half_pixel")
    if mode == b"nearest" and all(n % m == 0 for n, m in zip(target, x.shape, strict=True)):
        return functional.interpolate(x, target[2:], mode="nearest")
    if mode == b"linear" and x.ndim == 4 and where in (b"half_pixel", b"align_corners"):
        corners = where == b"align_corners"
        return functional.interpolate(x, target[2:], mode="bilinear", align_corners=corners)
    raise NotImplementedError(f"Resize {mode.decode()} with {where.decode()}")


def _cast(a: Attributes, x: Tensor) -> Tensor:
    import torch

    return x.to(getattr(torch, DTYPES[a["to"]]))


def _constant_of_shape(a: Attributes, shape: Tensor) -> Tensor:
    import torch

    value = a.get("value", torch.zeros(1))
    return torch.full([int(n) for n in shape.tolist()], value.item(), dtype=value.dtype)


def _hard_sigmoid(a: Attributes, x: Tensor) -> Tensor:
    import torch

    return torch.clamp(a.get("alpha", 0.2) * x + a.get("beta", 0.5), 0.0, 1.0)


def _hard_swish(a: Attributes, x: Tensor) -> Tensor:
    import torch

    del a
    return x * torch.clamp(x / 6 + 0.5, 0.0, 1.0)


def _gelu(a: Attributes, x: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.gelu(x, approximate=a.get("approximate", b"none").decode())


def _expand(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    import torch

    del a
    return x * torch.ones([int(n) for n in shape.tolist()], dtype=x.dtype)


def _shape(a: Attributes, x: Tensor) -> Tensor:
    import torch

    return torch.tensor(x.shape)[a.get("start", 0) : a.get("end")]


def _prelu(a: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    import torch

    del a
    return torch.where(x < 0, x * slope, x)


def _divide(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    import torch

    del a
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _plain(function: Callable[..., Any]) -> Operator:
    return lambda _, *inputs: function(*inputs)


@cache
def operators() -> dict[str, Operator]:
    """By the name of the operator."""
    import torch
    from torch.nn import functional

    return {
        "Conv": _conv, "Gemm": _gemm, "MatMul": _plain(torch.matmul),
        "Add": _plain(torch.add), "Sub": _plain(torch.sub), "Mul": _plain(torch.mul),
        "Div": _divide,
        "Pow": _plain(torch.pow), "Sqrt": _plain(torch.sqrt), "Exp": _plain(torch.exp),
        "Log": _plain(torch.log), "Neg": _plain(torch.neg), "Abs": _plain(torch.abs),
        "Erf": _plain(torch.erf), "Reciprocal": _plain(torch.reciprocal),
        "Not": _plain(torch.logical_not),
        "Equal": _plain(torch.eq), "Less": _plain(torch.lt), "Greater": _plain(torch.gt),
        "LessOrEqual": _plain(torch.le), "GreaterOrEqual": _plain(torch.ge),
        "And": _plain(torch.logical_and), "Or": _plain(torch.logical_or),
        "Where": _plain(torch.where),
        "Min": _plain(lambda *x: functools.reduce(torch.minimum, x)),
        "Max": _plain(lambda *x: functools.reduce(torch.maximum, x)),
        "Relu": _plain(torch.relu), "Sigmoid": _plain(torch.sigmoid), "Tanh": _plain(torch.tanh),
        "HardSigmoid": _hard_sigmoid, "HardSwish": _hard_swish, "Gelu": _gelu, "PRelu": _prelu,
        "LeakyRelu": lambda a, x: functional.leaky_relu(x, a.get("alpha", 0.01)),
        "Elu": lambda a, x: functional.elu(x, a.get("alpha", 1.0)),
        "Softplus": _plain(functional.softplus), "Clip": _clip,
        "Softmax": lambda a, x: torch.softmax(x, a.get("axis", -1)),
        "LogSoftmax": lambda a, x: torch.log_softmax(x, a.get("axis", -1)),
        "BatchNormalization": _batch_norm, "LayerNormalization": _layer_norm,
        "GlobalAveragePool": _plain(lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True)),
        "GlobalMaxPool": _plain(lambda x: x.amax(tuple(range(2, x.ndim)), keepdim=True)),
        "MaxPool": _max_pool, "AveragePool": _average_pool,
        "ReduceMean": _reduced(torch.mean), "ReduceSum": _reduced(torch.sum),
        "ReduceMax": _reduced(torch.amax), "ReduceMin": _reduced(torch.amin),
        "Reshape": _reshape, "Flatten": _flatten, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
        "Transpose": lambda a, x: x.permute(a.get("perm", list(reversed(range(x.ndim))))),
        "Concat": lambda a, *x: torch.cat(x, a["axis"]), "Slice": _slice, "Gather": _gather,
        "Split": _split, "Pad": _pad, "Resize": _resize, "Expand": _expand, "Shape": _shape,
        "Cast": _cast, "ConstantOfShape": _constant_of_shape, "Identity": _plain(lambda x: x),
        "Dropout": _plain(lambda x, *_: x),
    }  # fmt: skip
