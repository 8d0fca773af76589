"""Which node of a graph a runtime's kernels are for, and so the time of each node."""

from __future__ import annotations

from collections.abc import Iterable

from deploykit.formats import onnx_file, onnx_weights
from deploykit.formats.onnx_graph import COMPUTE, Graph
from deploykit.stages.quantize.lab import RUNS, Lab
from deploykit.stages.quantize.placement import FUSED
from deploykit.values import Artifact, Kernel


def times(lab: Lab, artifact: Artifact) -> tuple[dict[str, float], float | None]:
    """Microseconds of each node that has a time of its own, and of all kernels together."""
    lab.talk("time of each node", 0, 1)
    kernels = lab.kernels(artifact, RUNS)
    found = node_times(Graph(onnx_file.shell(artifact.path)), kernels)
    total = round(sum(kernel.microseconds for kernel in kernels), 1) if kernels else None
    return {name: round(time, 1) for name, time in found.items()}, total


def times_of_float(lab: Lab) -> tuple[dict[str, float], float | None]:
    """As `times`, of the prepared float model, whose nodes have names."""
    import onnx

    path = lab.folder / "float.onnx"
    graph = lab.shop.graph
    onnx_weights.lend(onnx_weights.files(graph.model), graph.folder, path.parent)
    onnx.save(graph.model, path)
    return times(lab, lab.shop.source.model_copy(update={"path": path}))


def node_times(graph: Graph, kernels: Iterable[Kernel]) -> dict[str, float]:
    """Microseconds of each node that a kernel is told under.

    A node that was fused into another has no time of its own, and a kernel that is for no node, or
    for several that compute, counts for none: no time is guessed.
    """
    found: dict[str, float] = {}
    for kernel in kernels:
        if name := _node(graph, kernel):
            found[name] = found.get(name, 0.0) + kernel.microseconds
    return found


def _node(graph: Graph, kernel: Kernel) -> str | None:
    """The one node that a kernel is for: of several, the one that computes."""
    known = dict.fromkeys(n for name in kernel.names if (n := _named(graph, name)))
    named = [_computing(graph, name) if kernel.operator in COMPUTE else name for name in known]
    heavy = [name for name in named if graph.nodes[name].op_type in COMPUTE]
    best = heavy or named
    return best[0] if len(best) == 1 else None


def _named(graph: Graph, name: str) -> str | None:
    """The node of this name, or the one that makes the tensor of this name."""
    if name in graph.nodes:
        return name
    producer = graph.producers.get(name)
    return producer.name if producer else None


def _computing(graph: Graph, name: str) -> str:
    """The node before an activation function: ONNX Runtime names the two by what comes out."""
    node = graph.nodes[name]
    before = graph.producers.get(node.input[0]) if node.op_type in FUSED else None
    return before.name if before and graph.only_consumer(node.input[0]) else name
