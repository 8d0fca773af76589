"""A live PyTorch module: how it is made, what it takes, what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deploykit._code import load_function
from deploykit._lazy import needs
from deploykit.errors import InputError
from deploykit.values import Array, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn


def construct(reference: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call the factory. Raises InputError: it is not there, raises, or gives no module."""
    with needs("torch"):
        from torch import nn
    factory = load_function(reference)
    try:
        module = factory(**arguments)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"the factory {reference} raises {type(error).__name__}: {error}",
            hint=f"call it by hand with {dict(arguments)}, and correct it or --model-args",
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(
            f"the factory {reference} gives {type(module).__name__}, not a torch.nn.Module",
            hint="return the model itself",
        )
    return module


def examples(
    inputs: tuple[TensorSpec, ...], *, batch: int = 1, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Random inputs for tracing and self-checks: normal floats, and zeros or ones for integers."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    made = []
    for spec in inputs:
        shape = (batch if isinstance(spec.shape[0], str) else spec.shape[0], *spec.fixed({})[1:])
        dtype = getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            made.append(torch.randn(shape, generator=rng).to(dtype))
        else:
            made.append(torch.randint(0, 2, shape, generator=rng).to(dtype))
    return tuple(made)


def output_tensors(outputs: object) -> tuple[torch.Tensor, ...]:
    """A model's output as a flat tuple. Raises InputError: it is no tensor, tuple, list or dict."""
    import torch

    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    values: object = tuple(outputs.values()) if isinstance(outputs, Mapping) else outputs
    if isinstance(values, (tuple, list)) and all(isinstance(v, torch.Tensor) for v in values):
        return tuple(values)
    raise InputError(
        f"the model gives {type(outputs).__name__}; deploykit takes tensors, tuples and dicts",
        hint="wrap the model so that it returns a tensor or a tuple of tensors",
    )


def run(
    module: nn.Module, inputs: tuple[TensorSpec, ...], feed: Mapping[str, Array]
) -> tuple[Array, ...]:
    """Run a module on a feed of arrays."""
    import torch

    with torch.inference_mode():
        tensors = [torch.from_numpy(feed[spec.name].copy()) for spec in inputs]
        return tuple(t.numpy() for t in output_tensors(module(*tensors)))
