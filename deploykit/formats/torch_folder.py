"""A PyTorch model as plain files: a folder without pickle.

`model.json` names the factory, its arguments and the pruning edits; `factory.py` is a copy of the
factory's file (a factory of an installed package is named only); `weights.safetensors` holds the
parameters and buffers; `examples.safetensors` the user's own example inputs, if there are any. An
exported program is a copy of its file, `program.pt2`, in place of factory and weights.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from deploykit import _json
from deploykit._code import neighbours, split_reference
from deploykit._lazy import needs
from deploykit.errors import InputError, StageError
from deploykit.formats import program_file
from deploykit.formats.checkpoint import LARGE, load_weights
from deploykit.formats.torch_edits import Edits, replay, set_attributes
from deploykit.formats.torch_module import call, construct, examples, output_tensors
from deploykit.values import Artifact, Dimension, Json, TensorSpec, Value, parse

if TYPE_CHECKING:
    import torch
    from torch import nn

DESCRIPTION, WEIGHTS, EXAMPLES = "model.json", "weights.safetensors", "examples.safetensors"
FACTORY, PROGRAM = "factory.py", "program.pt2"


class Description(Value):
    """What `model.json` holds."""

    schema_: Literal["deploykit.torch/1"] = Field(default="deploykit.torch/1", alias="schema")
    factory: str
    """`factory.py:function`, `package.module:function`, or `program.pt2`."""
    arguments: Json = {}
    edits: Edits = ()
    attributes: dict[str, int] = {}
    """What the removal changed beside parameters, by `module.attribute`: numbers of heads."""
    sparse: tuple[str, ...] = ()
    """Parameters whose zeros stay zero in training."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dimensions: tuple[Dimension, ...] = ()
    """The dynamic dimensions of which more is known than the name."""

    @property
    def every_dimension(self) -> tuple[Dimension, ...]:
        """All dynamic dimensions of the inputs."""
        known = {d.name: d for d in self.dimensions}
        names = dict.fromkeys(d for s in self.inputs for d in s.shape if isinstance(d, str))
        return tuple(known.get(name) or Dimension(name=name) for name in names)


def describe(folder: Path) -> Description:
    """Read `model.json`. Raises InputError."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise InputError(
            f"{folder}: no torch artifact ({DESCRIPTION} is missing)",
            hint="give a folder that deploykit wrote, or file.py:factory",
        )
    return parse(Description, _json.read(path), str(path))


def load(artifact: Artifact) -> nn.Module:
    """Build the model from its folder: factory, edits, weights; in evaluation mode."""
    with needs("torch"):
        import torch
    folder = artifact.path
    description = describe(folder)
    if description.factory == PROGRAM:
        return program_file.load(folder / PROGRAM)
    with torch.inference_mode(mode=False):  # a caller's inference mode would forbid gradients
        module = construct(reference_in(folder, description), description.arguments)
        replay(module, description.edits, description.inputs, description.factory)
        set_attributes(module, description.attributes)
    load_weights(module, folder / WEIGHTS)
    return module.eval()


def reference_in(folder: Path, description: Description) -> str:
    """The factory's reference, resolved to the copy in the folder."""
    file, name = factory_file(folder, description), split_reference(description.factory)[1]
    return f"{file}:{name}" if file else description.factory


def factory_file(folder: Path, description: Description) -> Path | None:
    """The copy of the factory's file; None for a factory of an installed package."""
    if description.factory == PROGRAM:
        return folder / PROGRAM
    is_file = split_reference(description.factory)[0].suffix == ".py"
    return folder / FACTORY if is_file else None


def own_examples(folder: Path) -> dict[str, torch.Tensor]:
    """The user's example inputs by name; {} if there are none."""
    from safetensors.torch import load_file

    path = folder / EXAMPLES
    return load_file(path) if path.is_file() else {}


def probe(
    folder: Path,
    *,
    seed: int = 0,
    inputs: tuple[TensorSpec, ...] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> tuple[torch.Tensor, ...]:
    """Inputs for tracing and self-checks, of the usual sizes where `sizes` says no other.

    `inputs` are the folder's, or these with some dimensions fixed.
    """
    description = describe(folder)
    usual = {d.name: d.usual for d in description.every_dimension}
    return examples(
        inputs or description.inputs,
        batch=2,
        seed=seed,
        sizes={**usual, **(sizes or {})},
        like=own_examples(folder),
    )


def write(
    module: nn.Module,
    description: Description,
    factory_source: Path | None,
    folder: Path,
    own: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the folder, load it again, and check that its outputs are equal to the bit.

    A module of more than LARGE bytes is used up: its memory is given back for that check.
    `factory_source` is the file of the factory or program, None for a factory of a package; `own`
    are the user's example inputs. Raises StageError: the folder does not give the same model
    (attributes outside factory, edits and weights matter), or the factory imports what lies beside
    it.
    """
    from safetensors.torch import save_file

    program = description.factory == PROGRAM
    if factory_source and not program and (near := neighbours(factory_source)):
        raise StageError(
            f"{factory_source} imports its neighbour {near[0]!r}, which does not come along",
            hint="put the model into one file, or into a package (package.module:factory)",
        )
    folder.mkdir()
    if factory_source:
        shutil.copyfile(factory_source, folder / (PROGRAM if program else FACTORY))
    text = json.dumps(description.model_dump(mode="json", by_alias=True), indent=1)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    if not program:
        save_file(_unshared(module), folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)
    if own:
        save_file({name: t.detach().contiguous() for name, t in own.items()}, folder / EXAMPLES)
        (folder / EXAMPLES).chmod(0o644)
    _check_reload(module, description, folder)


def _unshared(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with each shared tensor once, contiguous, each on memory of its own."""
    seen: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    for key, tensor in state.items():
        seen.setdefault(id(tensor), key)
    kept = {key: state[key].detach() for key in seen.values()}
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in kept.values())

    def alone(tensor: torch.Tensor) -> torch.Tensor:
        shared = owners[tensor.untyped_storage().data_ptr()] > 1
        return (tensor.clone() if shared else tensor).contiguous()

    return {key: alone(tensor) for key, tensor in kept.items()}


def _check_reload(module: nn.Module, description: Description, folder: Path) -> None:
    import torch

    large = sum(t.nbytes for t in module.state_dict().values()) > LARGE
    artifact = Artifact(
        path=folder, format="torch", precision="fp32",
        inputs=description.inputs, outputs=description.outputs, sha256="",
    )  # fmt: skip
    given = probe(folder)
    training = module.training
    with torch.inference_mode():
        want = output_tensors(call(module.eval(), description.inputs, given))
        if large:  # not twice in memory
            module.to("meta")
        have = output_tensors(call(load(artifact), description.inputs, given))
    module.train(training)
    if len(want) != len(have) or not all(map(_identical, want, have)):
        raise StageError(
            "the model does not come back from its factory, edits and weights: outputs differ",
            hint="keep all state in parameters and buffers, and all settings in the arguments",
        )


def _identical(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal to the bit; NaN is equal to itself here."""
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = (t.flatten().contiguous().view(torch.uint8) for t in (one, other))
    return torch.equal(*bits)
