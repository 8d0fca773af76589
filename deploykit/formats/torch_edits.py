"""Channels that pruning removed, and the graph of those that hang together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deploykit._lazy import needs
from deploykit.errors import InputError, StageError
from deploykit.formats.torch_module import call, examples, output_tensors
from deploykit.values import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

Edits = tuple[tuple[str, bool, tuple[int, ...]], ...]
"""Channels removed, in order: module, whether output channels, indices (torch-pruning)."""


def replay(module: nn.Module, edits: Edits, inputs: tuple[TensorSpec, ...], factory: str) -> None:
    """Remove the channels that the edits name. Raises InputError: they do not fit the model."""
    if not edits:
        return
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    graph = dependency_graph(module, inputs)
    try:
        graph.load_pruning_history([(n, o, list(i)) for n, o, i in edits])
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise InputError(
            f"the pruning edits do not fit the factory {factory}: {error}",
            hint="use the factory that the model was pruned with",
        ) from error
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
    probe = examples(inputs, batch=2)

    def run_flat(model: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return output_tensors(call(model, inputs, given))

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
