"""Channels that can only be removed together, found by torch-pruning, and what forbids it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploykit.errors import StageError
from deploykit.formats import torch_module
from deploykit.values import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

Items = Any
"""A group of torch-pruning, which has no types: pairs of a dependency and indices of channels."""

OBSTACLES = {
    "MHA": "the heads of attention cannot lose single channels in",
    "LN": "a normalization over all channels changes with their number in",
    "GN": "a normalization over groups of channels changes with their number in",
    "LSTM": "the gates of a recurrent layer cannot be followed in",
    "SPLIT": "a split of the channels cannot be followed",
    "SLICE": "a slice cannot be followed",
    "UNBIND": "an unbind cannot be followed",
}
"""Kinds of nodes (torch-pruning's OPTYPE) through which channels stay as they are."""


@dataclass(frozen=True, slots=True)
class Group:
    """Layers whose output channels can only be removed together."""

    root: str
    """The layer that names the group in an edit."""
    layers: tuple[str, ...]
    channels: int
    obstacle: str | None
    """Why no channel may go; None if they may."""
    unit: int = 1
    """Channels that go together: those of a head of attention."""
    attention: str | None = None
    """The module whose heads they are."""


def find_groups(
    graph: Any,
    module: nn.Module,
    inputs: tuple[TensorSpec, ...],
) -> tuple[Group, ...]:
    """Every group with a convolution or linear layer, in the order of the model.

    Raises StageError: torch-pruning cannot follow the channels.
    """
    finder = _Finder(graph, module, inputs)
    try:
        found = [finder.group(items) for items in graph.get_all_groups()]
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise StageError(
            f"the channels cannot be followed: {type(error).__name__}: {error}",
            hint="channel shuffles and reshapes of channels are not followed; leave it unpruned",
        ) from error
    order = list(finder.names.values())
    return tuple(sorted(found, key=lambda group: order.index(group.layers[0])))


def output_layers(
    module: nn.Module, inputs: tuple[TensorSpec, ...]
) -> tuple[set[str], Counter[str]]:
    """Names of the layers that make the model's outputs, and how often each module runs.

    From each output back through the autograd graph to the first layers with channels.
    """
    import torch
    from torch import nn

    made_by: dict[Any, str] = {}
    runs: Counter[str] = Counter()

    def note(name: str, layer: nn.Module, output: object) -> None:
        runs[name] += 1
        if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)):  # noqa: SLF001
            assert isinstance(output, torch.Tensor)  # noqa: S101
            made_by[output.grad_fn] = name

    hooks = [
        layer.register_forward_hook(lambda layer, _, output, name=name: note(name, layer, output))
        for name, layer in module.named_modules()
    ]
    try:
        with torch.enable_grad():
            probe = torch_module.examples(inputs, batch=2)
            outputs = torch_module.output_tensors(torch_module.call(module, inputs, probe))
    finally:
        for hook in hooks:
            hook.remove()
    return _first_before([tensor.grad_fn for tensor in outputs], made_by), runs


def _first_before(nodes: list[Any], made_by: dict[Any, str]) -> set[str]:
    """Walk back from autograd nodes and stop at each that a layer has made."""
    found, seen = set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made_by:
            found.add(made_by[node])
        else:
            nodes.extend(child for child, _ in node.next_functions)
    return found


class _Finder:
    """What is known of the module before any group is looked at."""

    def __init__(
        self,
        graph: Any,
        module: nn.Module,
        inputs: tuple[TensorSpec, ...],
    ) -> None:
        self.graph = graph
        self.names = {layer: name for name, layer in module.named_modules()}
        self.outputs, self.runs = output_layers(module, inputs)
        owners = Counter(p for _, p in module.named_parameters(remove_duplicate=False))
        self.shared = {
            name
            for name, layer in module.named_modules()
            if any(owners[p] > 1 for p in layer.parameters(recurse=False))
        }

    def group(self, items: Items) -> Group:
        root = items[0].dep.target.module
        layers = {self.names[layer] for layer in writers(items)}
        channels = self.graph.get_out_channels(root)
        unit, attention = self._head(items, channels)
        return Group(
            root=self.names[root],
            layers=tuple(name for name in self.names.values() if name in layers),
            channels=channels,
            obstacle=next(self._obstacles(items), None),
            unit=unit,
            attention=attention,
        )

    def _head(self, items: Items, channels: int) -> tuple[int, str | None]:
        """Channels of a head, as the attributes of the attention around the layers tell it."""
        if not any(word in item.dep.target.name for item in items for word in ATTENTION):
            return 1, None
        modules = {name: layer for layer, name in self.names.items()}
        for name in sorted({self.names[w].rpartition(".")[0] for w in writers(items)}):
            for unit in _head_sizes(modules[name], channels):
                if 1 < unit <= channels and channels % unit == 0:
                    return unit, name
        return 1, None

    def _obstacles(self, items: Items) -> Iterator[str]:
        makers = set(writers(items))
        for item in items:
            node = item.dep.target
            name = self.names.get(node.module, "")
            if node.module in makers and name in self.outputs:
                yield f"{name!r} makes an output of the model"
            if self.runs[name] > 1:
                yield f"{name!r} runs {self.runs[name]} times"
            if name in self.shared:
                yield f"{name!r} shares its weights"
            if (text := OBSTACLES.get(node.type.name)) is not None:
                yield f"{text} {name!r}" if name else text
            yield from self._of_layer(item, name)

    def _of_layer(self, item: Any, name: str) -> Iterator[str]:
        from torch import nn

        layer = item.dep.target.module
        if not isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):  # noqa: SLF001
            return
        if isinstance(layer, nn.Linear):
            width = max(layer.in_features, layer.out_features)
        else:
            width = max(layer.in_channels, layer.out_channels)
            if layer.groups > 1 and not layer.groups == layer.in_channels == layer.out_channels:
                yield f"{name!r} is a convolution of {layer.groups} groups"
        if max(item.idxs, default=0) >= width:
            yield f"the channels of {name!r} cannot be followed (a concatenation that is reshaped)"


ATTENTION = ("Bmm", "Softmax", "ScaledDotProduct")
"""Parts of the names of autograd's nodes in attention."""


def head_attributes(module: nn.Module) -> dict[str, int]:
    """The whole numbers that an attention module keeps of its heads and width, by name."""
    words = ("head", "embed_dim", "inner_dim", "hidden_size")
    return {
        name: value
        for name, value in vars(module).items()
        if type(value) is int and any(word in name for word in words)
    }


def _head_sizes(module: nn.Module, channels: int) -> Iterator[int]:
    """Channels of one head: what a size says first, then what a count says."""
    found = {n: v for n, v in head_attributes(module).items() if "head" in n and v > 0}
    sized = [n for n in found if n.endswith(("head_size", "head_dim", "dim_head", "size_per_head"))]
    yield from (found[name] for name in sized if "all" not in name)
    yield from (channels // found[name] for name in found if name.endswith(("heads", "nhead")))


def readers(items: Items) -> Iterator[tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    """The layers that read channels of the group: which of their inputs, and of which channel."""
    import torch
    import torch_pruning as tp

    for item in items:
        if item.dep.handler in (tp.prune_conv_in_channels, tp.prune_linear_in_channels):
            index, roots = (
                torch.tensor([int(i) for i in each]) for each in (item.idxs, item.root_idxs)
            )
            yield item.dep.target.module, index, roots


def gates(items: Items) -> list[nn.Module]:
    """Where the channels of the group come out: each layer, or the batch normalization behind."""
    from torch import nn

    found = []
    made = set(writers(items))
    for item in items:
        node = item.dep.target
        if node.module in made:
            made.discard(node.module)
            after = [n.module for n in node.outputs]
            norm = next((m for m in after if isinstance(m, nn.modules.batchnorm._BatchNorm)), None)  # noqa: SLF001
            found.append(norm or node.module)
    return found


def writers(items: Items) -> Iterator[nn.Module]:
    """The convolution and linear layers whose output channels are in the group."""
    from torch import nn

    for item in items:
        layer = item.dep.target.module
        if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):  # noqa: SLF001
            pruner = item.dep.handler.__self__
            if item.dep.handler == pruner.prune_out_channels:
                yield layer
