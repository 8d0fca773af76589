"""A PyTorch model as plain files: a folder without pickle.

`model.json` names the factory, its arguments and the pruning edits; `factory.py` is a copy of the
factory's file (a factory of an installed package is named only); `weights.safetensors` holds the
parameters and buffers.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from deploykit._code import load_function, neighbours, split_reference
from deploykit._lazy import needs
from deploykit.errors import InputError, StageError
from deploykit.store import read_json
from deploykit.values import Array, Artifact, Json, TensorSpec, Value, parse

if TYPE_CHECKING:
    import torch
    from torch import nn

DESCRIPTION, WEIGHTS, FACTORY = "model.json", "weights.safetensors", "factory.py"


class Description(Value):
    """What `model.json` holds."""

    schema_: Literal["deploykit.torch/1"] = Field(default="deploykit.torch/1", alias="schema")
    factory: str
    arguments: Json = {}
    edits: tuple[tuple[str, bool, tuple[int, ...]], ...] = ()
    """Channels removed, in order: module, whether output channels, indices (torch-pruning)."""
    attributes: dict[str, int] = {}
    """What the removal changed beside parameters, by `module.attribute`: numbers of heads."""
    sparse: tuple[str, ...] = ()
    """Parameters whose zeros stay zero in training."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def describe(folder: Path) -> Description:
    """Read `model.json`. Raises InputError."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise InputError(
            f"{folder}: no torch artifact ({DESCRIPTION} is missing)",
            hint="give a folder that deploykit wrote, or file.py:factory",
        )
    return parse(Description, read_json(path), str(path))


def load(artifact: Artifact) -> nn.Module:
    """Build the model from its folder: factory, edits, weights; in evaluation mode."""
    with needs("torch"):
        import torch
    folder = artifact.path
    description = describe(folder)
    with torch.inference_mode(mode=False):  # a caller's inference mode would forbid gradients
        module = construct(reference_in(folder, description), description.arguments)
        replay(module, description)
    load_weights(module, folder / WEIGHTS)
    return module.eval()


def reference_in(folder: Path, description: Description) -> str:
    """The factory's reference, resolved to the copy in the folder."""
    file, name = factory_file(folder, description), split_reference(description.factory)[1]
    return f"{file}:{name}" if file else description.factory


def factory_file(folder: Path, description: Description) -> Path | None:
    """The copy of the factory's file; None for a factory of an installed package."""
    is_file = split_reference(description.factory)[0].suffix == ".py"
    return folder / FACTORY if is_file else None


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


def replay(module: nn.Module, description: Description) -> None:
    """Remove the channels that the edits name. Raises InputError: they do not fit the model."""
    if not description.edits:
        return
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    graph = dependency_graph(module, description.inputs)
    try:
        graph.load_pruning_history([(n, o, list(i)) for n, o, i in description.edits])
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise InputError(
            f"the pruning edits do not fit the factory {description.factory}: {error}",
            hint="use the factory that the model was pruned with",
        ) from error
    set_attributes(module, description.attributes)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained)


def set_attributes(module: nn.Module, attributes: Mapping[str, int]) -> None:
    """Set whole numbers that modules keep, by `module.attribute`. Raises InputError: none such."""
    for place, value in attributes.items():
        name, _, attribute = place.rpartition(".")
        try:
            layer = module.get_submodule(name)
        except AttributeError:
            layer = None
        if layer is None or type(getattr(layer, attribute, None)) is not int:
            raise InputError(
                f"the model has no number {place!r} that pruning changed",
                hint="use the factory that the model was pruned with",
            )
        setattr(layer, attribute, value)


def dependency_graph(module: nn.Module, inputs: tuple[TensorSpec, ...]) -> Any:
    """torch-pruning's graph of the channels of `module`, which it reads from the autograd graph.

    All parameters then require gradients. Raises StageError: the model cannot be traced.
    """
    with needs("torch_pruning"):
        import torch
        import torch_pruning as tp
    for parameter in module.eval().parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    probe, run_flat = examples(inputs, batch=2), lambda model, x: output_tensors(model(*x))
    try:
        with torch.enable_grad():
            return tp.DependencyGraph().build_dependency(module, probe, run_flat, verbose=False)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise StageError(
            f"the model cannot be traced for pruning: {type(error).__name__}: {reason}",
            hint="pruning follows gradients from the outputs to the inputs: no detach(), no_grad() "
            "or channel shuffles on the way; or leave the model unpruned",
        ) from error


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a checkpoint in place: `.safetensors`, or a `.pt`/`.pth` state dict without pickle.

    Raises InputError: unreadable, unsafe, or its keys or shapes are not those of the model.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint", hint="correct --weights")
    state = _read_state(path)
    try:
        missing, unknown = _assign(module, state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise InputError(
            f"{path}: {lines[-1].strip()}",
            hint="give the factory the arguments (--model-args) that this checkpoint was made with",
        ) from error
    if missing or unknown:
        kinds = (("missing", missing), ("unknown", unknown))
        parts = [f"{len(k)} {word} ({', '.join(sorted(k)[:3])})" for word, k in kinds if k]
        raise InputError(
            f"{path}: the keys are not those of the model: {'; '.join(parts)}",
            hint="give the checkpoint of this model, or the factory that made it",
        )
    _check_finite(module, path)


def _assign(module: nn.Module, state: Mapping[str, torch.Tensor]) -> tuple[set[str], set[str]]:
    """Load a state dict; a key missing only because its tensor is shared is not missing."""
    result = module.load_state_dict(state, strict=False)
    own = module.state_dict(keep_vars=True)
    loaded = {id(own[key]) for key in state if key in own}
    missing = {key for key in result.missing_keys if id(own[key]) not in loaded}
    return missing, set(result.unexpected_keys)


def _read_state(path: Path) -> Mapping[str, torch.Tensor]:
    with needs("torch"):
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load guesses at a pickle that it then refuses
            safe = path.suffix == ".safetensors"
            state = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(
            f"{path}: not a safetensors file: {error}", hint="save it again"
        ) from error
    except Exception as error:
        said = str(error).partition("WeightsUnpickler error: ")[2].strip() or str(error)
        reason = (said.splitlines() or [type(error).__name__])[0].partition(". Please ")[0][:120]
        raise InputError(
            f"{path}: refused, it is no plain state dict ({reason})",
            hint="save model.state_dict() with safetensors.torch.save_file; pickles are never run",
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise InputError(
            f"{path}: not a state dict of tensors", hint="save model.state_dict() and nothing else"
        )
    return state


def _check_finite(module: nn.Module, path: Path) -> None:
    import torch

    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(
                f"{path}: {key!r} has NaN or infinite values", hint="give a sound checkpoint"
            )


def write(
    module: nn.Module, description: Description, factory_source: Path | None, folder: Path
) -> None:
    """Write the folder, load it again, and check that its outputs are equal to the bit.

    `factory_source` is the file of the factory, None for one of a package. Raises StageError: the
    folder does not give the same model (attributes outside factory, edits and weights matter), or
    the factory imports what lies beside it.
    """
    from safetensors.torch import save_file

    if factory_source and (near := neighbours(factory_source)):
        raise StageError(
            f"{factory_source} imports its neighbour {near[0]!r}, which does not come along",
            hint="put the model into one file, or into a package (package.module:factory)",
        )
    folder.mkdir()
    if factory_source:
        shutil.copyfile(factory_source, folder / FACTORY)
    text = json.dumps(description.model_dump(mode="json", by_alias=True), indent=1)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    save_file(_unshared(module), folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)
    _check_reload(module, description, folder)


def _unshared(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with each shared tensor once, contiguous."""
    seen: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    for key, tensor in state.items():
        seen.setdefault(id(tensor), key)
    return {key: state[key].detach().clone().contiguous() for key in seen.values()}


def _check_reload(module: nn.Module, description: Description, folder: Path) -> None:
    import torch

    artifact = Artifact(
        path=folder, format="torch", precision="fp32",
        inputs=description.inputs, outputs=description.outputs, sha256="",
    )  # fmt: skip
    probe = examples(description.inputs, batch=2)
    training, again = module.training, load(artifact)
    with torch.inference_mode():
        want = output_tensors(module.eval()(*probe))
        have = output_tensors(again(*probe))
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
