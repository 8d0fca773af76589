"""Take a PyTorch model in: factory and weights become a torch artifact folder."""

from __future__ import annotations

from pathlib import Path

from pydantic import field_validator

from deploykit import _files, store
from deploykit._code import split_reference
from deploykit.errors import InputError
from deploykit.formats import checkpoint, torch_folder, torch_module
from deploykit.formats.torch_folder import Description
from deploykit.store import Job, Made
from deploykit.values import BATCH, Artifact, Json, TensorSpec, Value

LIBRARIES = ("torch",)


class TakeOptions(Value):
    """Where the model comes from and what it takes."""

    factory: str
    """`file.py:function` or `package.module:function`."""
    arguments: Json = {}
    weights: Path | None = None
    """A `.safetensors` or state-dict checkpoint; None keeps what the factory sets."""
    inputs: tuple[TensorSpec, ...]
    """In the order of the arguments of `forward`."""
    outputs: tuple[str, ...] = ()
    """Names; by default `output`, or `output_0`, `output_1`, ..."""

    @field_validator("inputs")
    @classmethod
    def _some(cls, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        if not inputs:
            raise ValueError("a model made by a factory needs the names and shapes of its inputs")
        return inputs


def take(options: TakeOptions, *, out: Path, force: bool = False) -> Artifact:
    """Build the model, load its weights, and write it as a torch artifact folder.

    Raises InputError: the factory or the checkpoint is bad, or the model does not run on inputs of
    the given shapes. StageError: the folder does not give the same model back.
    """
    place, name = split_reference(options.factory)
    source = place if place.suffix == ".py" else None
    digests = {}
    for role, path in (("factory", source), ("weights", options.weights)):
        if path and not path.is_file():
            raise InputError(f"{path}: no such {role}", hint=f"correct the path of the {role}")
        if path:
            digests[role] = _files.sha256(path)

    def work(folder: Path) -> Made:
        module = torch_module.construct(options.factory, options.arguments)
        if options.weights:
            checkpoint.load_weights(module, options.weights)
        outputs = output_specs(module.eval(), options.inputs, options.outputs)
        description = Description(
            factory=f"{torch_folder.FACTORY}:{name}" if source else options.factory,
            arguments=options.arguments,
            inputs=options.inputs,
            outputs=outputs,
        )
        torch_folder.write(module, description, source, folder)
        parameters = sum(p.numel() for p in module.parameters())
        facts = {
            "parameters": parameters,
            "weights": "checkpoint" if options.weights else "factory",
        }
        return Made(
            format="torch", precision="fp32", inputs=options.inputs, outputs=outputs, facts=facts
        )

    # Paths are no part of the work's identity: the digests are.
    identity = options.model_copy(
        update={"factory": place.name + ":" + name, "weights": None}
        if source
        else {"weights": None}
    )
    job = Job(stage="take", source=None, options=identity, others=digests, libraries=LIBRARIES)
    return store.produce(job, work, out=out, force=force)


def output_specs(
    module: object, inputs: tuple[TensorSpec, ...], names: tuple[str, ...]
) -> tuple[TensorSpec, ...]:
    """Names, dtypes and shapes of the outputs, by running the model at two batch sizes.

    A first axis that follows the batch is dynamic. Raises InputError: the model does not run on
    such inputs, or has another number of outputs than names.
    """
    import torch

    assert isinstance(module, torch.nn.Module)  # noqa: S101
    shapes: list[list[tuple[int, ...]]] = []
    tensors: tuple[torch.Tensor, ...] = ()
    for batch in (2, 3):
        examples = torch_module.examples(inputs, batch=batch)
        try:
            with torch.inference_mode():
                found = module(*examples)
        except Exception as error:
            takes = ", ".join(str(spec) for spec in inputs)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"the model does not run on {takes}: {reason}",
                hint="correct the inputs: order, shapes and dtypes of forward's arguments; "
                "integers are written name:1x128:int64",
            ) from error
        tensors = torch_module.output_tensors(found)
        shapes.append([tuple(t.shape) for t in tensors])
    if names and len(names) != len(tensors):
        raise InputError(
            f"the model has {len(tensors)} outputs, {len(names)} names were given: {list(names)}",
            hint="give one name for each output, or none",
        )
    default = [f"output_{i}" for i in range(len(tensors))] if len(tensors) > 1 else ["output"]
    return tuple(
        TensorSpec(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=(BATCH, *two[1:]) if two[:1] == (2,) and three[:1] == (3,) else two,
        )
        for name, tensor, two, three in zip(names or default, tensors, *shapes, strict=True)
    )
