"""Take a PyTorch model in: factory and weights become a torch artifact folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit import _files, store
from deploykit._code import split_reference
from deploykit._shapes import name_axes
from deploykit.errors import InputError, UsageError
from deploykit.formats import program_file, torch_folder, torch_module
from deploykit.formats.checkpoint import load_weights
from deploykit.formats.torch_folder import FACTORY, PROGRAM, Description
from deploykit.store import Job, Made
from deploykit.values import Artifact, Dimension, Json, TensorSpec, Value

if TYPE_CHECKING:
    import torch
    from torch import nn

LIBRARIES = ("torch",)


class TakeOptions(Value):
    """Where the model comes from and what it takes."""

    factory: str
    """`file.py:function`, `package.module:function`, or the path of a program (`.pt2`)."""
    arguments: Json = {}
    weights: Path | None = None
    """A `.safetensors` or state-dict checkpoint; None keeps what the factory sets."""
    inputs: tuple[TensorSpec, ...] = ()
    """By the names of `forward`'s arguments, or in their order. By default what `example_inputs()`
    beside the factory gives."""
    dynamic_axes: tuple[str, ...] = ()
    """Further dynamic axes: `input_ids:1=sequence[1..512]`."""
    outputs: tuple[str, ...] = ()
    """Names; by default the model's own, or `output`, or `output_0`, `output_1`, ..."""


def take(options: TakeOptions, *, out: Path, force: bool = False) -> Artifact:
    """Build the model, load its weights, and write it as a torch artifact folder.

    Raises InputError: the factory, program or checkpoint is bad, or the model does not run on
    inputs of the given shapes. UsageError: its inputs are not known. StageError: the folder does
    not give the same model back.
    """
    source, digests = _source(options), {}
    for role, path in (("factory", source), ("weights", options.weights)):
        if path and not path.is_file():
            raise InputError(f"{path}: no such {role}", hint=f"correct the path of the {role}")
        if path:
            digests[role] = _files.sha256(path)

    def work(folder: Path) -> Made:
        if is_program(options.factory):
            return _write_program(options, folder)
        return _write_factory(options, source, folder)

    # Paths are no part of the work's identity: the digests are.
    name = split_reference(options.factory)[1]
    identity = options.model_copy(
        update={"factory": f"{source.name}:{name}" if source else options.factory, "weights": None}
    )
    job = Job(stage="take", source=None, options=identity, others=digests, libraries=LIBRARIES)
    return store.produce(job, work, out=out, force=force)


def is_program(reference: str) -> bool:
    """Whether a reference is the path of an exported program."""
    return reference.endswith(program_file.SUFFIX)


def _source(options: TakeOptions) -> Path | None:
    """The file that the model comes from. Raises UsageError: a program is told what it knows."""
    if not is_program(options.factory):
        place, _ = split_reference(options.factory)
        return place if place.suffix == ".py" else None
    if options.weights or options.arguments or options.inputs or options.dynamic_axes:
        raise UsageError(
            f"{options.factory} is an exported program: its weights and inputs are in it",
            hint="leave --weights, --model-args, --input-shape and --dynamic-axis out",
        )
    return Path(options.factory)


def _write_program(options: TakeOptions, folder: Path) -> Made:
    path = Path(options.factory)
    inputs, dimensions = program_file.described(path)
    module = program_file.load(path)
    outputs = output_specs(module, inputs, options.outputs, dimensions=dimensions)
    description = Description(
        factory=PROGRAM, inputs=inputs, outputs=outputs, dimensions=dimensions
    )
    torch_folder.write(module, description, path, folder)
    return _made(module, description, "program")


def _write_factory(options: TakeOptions, source: Path | None, folder: Path) -> Made:
    module = torch_module.construct(options.factory, options.arguments)
    own = {} if options.inputs else torch_module.given_examples(options.factory, module)
    inputs = options.inputs or torch_module.specs_of(own)
    if not inputs:
        raise UsageError(
            f"{options.factory} is a factory and its inputs are not known",
            hint="give --input-shape name:1x3x224x224, or --data, or a function example_inputs() "
            "beside the factory",
        )
    inputs, dimensions = name_axes(inputs, options.dynamic_axes)
    if options.weights:
        load_weights(module, options.weights)
    outputs = output_specs(module.eval(), inputs, options.outputs, dimensions=dimensions, own=own)
    name = split_reference(options.factory)[1]
    description = Description(
        factory=f"{FACTORY}:{name}" if source else options.factory,
        arguments=options.arguments,
        inputs=inputs,
        outputs=outputs,
        dimensions=dimensions,
    )
    torch_folder.write(module, description, source, folder, own)
    return _made(module, description, "checkpoint" if options.weights else "factory")


def _made(module: nn.Module, description: Description, weights: str) -> Made:
    parameters = sum(p.numel() for p in module.parameters())
    return Made(
        format="torch",
        precision="fp32",
        inputs=description.inputs,
        outputs=description.outputs,
        facts={"parameters": parameters, "weights": weights},
    )


def output_specs(
    module: nn.Module,
    inputs: tuple[TensorSpec, ...],
    names: tuple[str, ...] = (),
    *,
    dimensions: tuple[Dimension, ...] = (),
    own: Mapping[str, torch.Tensor] | None = None,
) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of the outputs, by running the model at several sizes.

    `dimensions` are all dynamic ones. An axis that follows one has its name; an axis that depends
    on it otherwise has a name of its own. An output that would be named as an input gets `_out` at
    its end. Raises InputError: the model does not run on such inputs, or has another number of
    outputs than names.
    """
    known = {d.name: d for d in dimensions}
    first = _run(module, inputs, {d.name: d.usual for d in dimensions}, own)
    if names and len(names) != len(first):
        raise InputError(
            f"the model has {len(first)} outputs, {len(names)} names were given: {list(names)}",
            hint="give one name for each output, or none",
        )
    taken = {spec.name for spec in inputs}
    chosen = names or tuple(f"{name}_out" if name in taken else name for name in first)
    shapes: list[list[int | str]] = [list(t.shape) for t in first.values()]
    for dimension in known.values():
        other, second = _at_another(module, inputs, known, own, dimension)
        pair = (dimension.usual, other)
        for label, shape, one, two in zip(chosen, shapes, first.values(), second, strict=True):
            for axis, found in enumerate(zip(one.shape, two.shape, strict=True)):
                if found[0] != found[1]:
                    alone = found == pair and isinstance(shape[axis], int)
                    shape[axis] = dimension.name if alone else f"{label}_{axis}"
    return tuple(
        TensorSpec(name=label, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(shape))
        for label, shape, t in zip(chosen, shapes, first.values(), strict=True)
    )


def _at_another(
    module: nn.Module,
    inputs: tuple[TensorSpec, ...],
    known: Mapping[str, Dimension],
    own: Mapping[str, torch.Tensor] | None,
    dimension: Dimension,
) -> tuple[int, list[torch.Tensor]]:
    """The outputs at a size of one dimension that is not its usual one, and that size.

    Raises InputError: the model runs on none, or gives other outputs there.
    """
    first = _run(module, inputs, {d.name: d.usual for d in known.values()}, own)
    refused: InputError | None = None
    for size in dimension.others():
        sizes = {**{d.name: d.usual for d in known.values()}, dimension.name: size}
        try:
            second = _run(module, inputs, sizes, own)
        except InputError as error:
            refused = refused or error
            continue
        if [t.ndim for t in second.values()] != [t.ndim for t in first.values()]:
            raise InputError(
                f"the model gives other outputs where {dimension.name} is {size}",
                hint="deploykit takes models whose outputs have one number of axes",
            )
        return size, list(second.values())
    if refused:
        raise refused
    return dimension.usual, list(first.values())


def _run(
    module: nn.Module,
    inputs: tuple[TensorSpec, ...],
    sizes: Mapping[str, int],
    own: Mapping[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """The outputs by name. Raises InputError: the model does not run on such inputs."""
    import torch

    given = torch_module.examples(inputs, sizes=sizes, like=own)
    try:
        with torch.inference_mode():
            called = torch_module.call(module, inputs, given)
    except InputError:
        raise
    except Exception as error:
        takes = ", ".join(str(spec) for spec in inputs)
        where = ", ".join(f"{name} {size}" for name, size in sizes.items())
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the model does not run on {takes} at {where}: {reason}",
            hint="correct the inputs: names, order, shapes and dtypes of forward's arguments; "
            "integers are written name:1x128:int64",
        ) from error
    return torch_module.named_outputs(called)
