"""A live PyTorch module: how it is made, what it takes, what it gives."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from deploykit._code import beside, load_function
from deploykit._lazy import needs
from deploykit._shapes import resized
from deploykit.errors import InputError, did_you_mean
from deploykit.values import BATCH, Array, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

EXAMPLE_INPUTS = "example_inputs"
"""The function beside a factory that makes inputs: a tensor, a tuple of them, or a dict by name."""


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


def given_examples(reference: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """What `example_inputs()` beside the factory gives, by input name; {} if there is none.

    The tensors of a tuple are named as the arguments of `forward`. Raises InputError: it raises, or
    gives something else.
    """
    import torch

    make = beside(reference, EXAMPLE_INPUTS)
    if make is None:
        return {}
    try:
        made = make()
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{EXAMPLE_INPUTS} beside {reference} raises {type(error).__name__}: {error}",
            hint="it is called without arguments",
        ) from error
    if not isinstance(made, Mapping):
        parts = made if isinstance(made, (tuple, list)) else (made,)
        made = dict(zip(_parameters(module), parts, strict=False)) if parts else {}
        if len(made) != len(parts):
            made = {f"input_{i}": part for i, part in enumerate(parts)}
    tensors = {str(name): torch.as_tensor(value) for name, value in made.items()}
    if not tensors or not all(t.ndim for t in tensors.values()):
        raise InputError(
            f"{EXAMPLE_INPUTS} beside {reference} gives {tensors or 'nothing'}",
            hint="return a tensor, a tuple or a dict of them; the first axis counts samples",
        )
    return tensors


def specs_of(tensors: Mapping[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
    """The inputs that such tensors are; their first axis counts samples."""
    return tuple(
        TensorSpec(name=name, dtype=_dtype(t), shape=(BATCH, *t.shape[1:]))
        for name, t in tensors.items()
    )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def examples(
    inputs: tuple[TensorSpec, ...],
    *,
    batch: int = 1,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    like: Mapping[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Inputs for tracing and self-checks: the user's own, cut or repeated, where `like` has them.

    Else random: normal floats, and zeros or ones for integers; ones for those named as a mask,
    since attention that sees nothing is undefined. A dynamic dimension that `sizes`
    does not name is 1, the first axis `batch`.
    """
    import torch

    rng, own, sizes = torch.Generator().manual_seed(seed), like or {}, sizes or {}
    made = []
    for spec in inputs:
        shape = spec.fixed(sizes)
        if isinstance(spec.shape[0], str):
            shape = (sizes.get(spec.shape[0], batch), *shape[1:])
        dtype = getattr(torch, spec.dtype)
        if spec.name in own:
            made.append(torch.from_numpy(resized(own[spec.name].numpy(), shape).copy()))
        elif dtype.is_floating_point:
            made.append(torch.randn(shape, generator=rng).to(dtype))
        elif "mask" in spec.name:
            made.append(torch.ones(shape, dtype=dtype))
        else:
            made.append(torch.randint(0, 2, shape, generator=rng).to(dtype))
    return tuple(made)


def arguments(
    module: nn.Module, inputs: tuple[TensorSpec, ...], tensors: Sequence[torch.Tensor]
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Positional and keyword arguments of `forward` for these inputs.

    Inputs that are named as its arguments go by name, else all go in their order. Raises
    InputError: some are named so, and their order says otherwise.
    """
    names = [spec.name for spec in inputs]
    known = _parameters(module)
    if not known and any(p.kind is p.VAR_KEYWORD for p in _signature(module)):
        known = names
    if all(name in known for name in names):
        return (), dict(zip(names, tensors, strict=True))
    for name, place in zip(names, known, strict=False):
        if name != place and name in known:
            odd = next(n for n in names if n not in known)
            raise InputError(
                f"forward has an argument {name!r} and none named {odd!r}",
                hint=did_you_mean(odd, known),
            )
    return tuple(tensors), {}


def _signature(module: nn.Module) -> list[inspect.Parameter]:
    plain = getattr(module, "_orig_mod", module)  # of a compiled module
    try:
        return list(inspect.signature(plain.forward).parameters.values())
    except (TypeError, ValueError):
        return []


def _parameters(module: nn.Module) -> list[str]:
    """The names that `forward` takes by keyword, in order."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in _signature(module) if p.kind in named]


def call(
    module: nn.Module, inputs: tuple[TensorSpec, ...], tensors: Sequence[torch.Tensor]
) -> object:
    """Run `forward` on tensors in the order of the inputs. Raises InputError as `arguments`."""
    positional, named = arguments(module, inputs, tensors)
    return module(*positional, **named)


def output_tensors(outputs: object) -> tuple[torch.Tensor, ...]:
    """A model's output as a flat tuple. Raises InputError as `named_outputs`."""
    return tuple(named_outputs(outputs).values())


def named_outputs(outputs: object) -> dict[str, torch.Tensor]:
    """A model's output by name: keys, field names, or `output_0`, `output_1`, ...

    Names of what is nested are joined by `_`; what is None is left out. Raises InputError: it is
    no tensor, tuple, list, dict or dataclass, two get one name, or there is none.
    """
    import torch

    if isinstance(outputs, torch.Tensor):
        return {"output": outputs}
    found: dict[str, torch.Tensor] = {}
    for name, value in _leaves(outputs, ""):
        if name in found:
            raise InputError(f"two outputs are named {name!r}", hint="name them apart")
        found[name] = value
    if not found:
        raise InputError(
            f"the model gives {type(outputs).__name__}, and no tensor in it",
            hint="wrap the model so that it returns a tensor or several",
        )
    return {f"output_{name}" if name.isdigit() else name: value for name, value in found.items()}


def _leaves(value: object, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        yield from _inside(value.items(), path)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _inside(((f.name, getattr(value, f.name)) for f in fields(value)), path)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from _inside(zip(value._fields, value, strict=True), path)
    elif isinstance(value, (tuple, list)):
        yield from _inside(enumerate(value), path)
    elif value is not None:
        raise InputError(
            f"the model gives {type(value).__name__}{f' as {path!r}' if path else ''}; deploykit "
            "takes tensors, tuples, dicts and dataclasses",
            hint="wrap the model so that it returns tensors (of a Hugging Face model that caches: "
            "set config.use_cache = False)",
        )


def _inside(items: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in items:
        yield from _leaves(value, f"{path}_{key}" if path else str(key))


def run(
    module: nn.Module, inputs: tuple[TensorSpec, ...], feed: Mapping[str, Array]
) -> tuple[Array, ...]:
    """Run a module on a feed of arrays."""
    import torch

    with torch.inference_mode():
        tensors = [torch.from_numpy(feed[spec.name].copy()) for spec in inputs]
        return tuple(t.numpy() for t in output_tensors(call(module, inputs, tensors)))
