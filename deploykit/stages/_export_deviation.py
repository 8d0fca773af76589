"""Where an exported model first leaves the way of PyTorch: compared inside, value by value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deploykit import _files
from deploykit._lazy import needs
from deploykit.backends import open_session
from deploykit.formats import onnx_weights, torch_module
from deploykit.stages._export_proof import apart
from deploykit.values import Array, Artifact, Feed, SessionOptions, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import fx, nn
    from torch.export import ExportedProgram

Specs = tuple[TensorSpec, ...]


def first_deviation(
    module: nn.Module, program: ExportedProgram, artifact: Artifact, feed: Feed, tolerance: float
) -> str:
    """A sentence that names the first module whose output differs, and its operator.

    The module is compared with its traced program, submodule by submodule; then the program with
    the ONNX file, node by node, without the runtime's optimizations. `tolerance` is of the largest
    value of what is compared.
    """
    import torch

    graph = program.module(check_guards=False).graph
    tensors = [torch.from_numpy(feed[spec.name].copy()) for spec in artifact.inputs]
    values = _program_values(program, tensors)
    nodes = [node for node in graph.nodes if node.name in values]
    finals = dict(zip((spec.name for spec in artifact.outputs), _returned(graph), strict=True))
    if name := _traced_otherwise(module, (artifact.inputs, tensors), nodes, values, tolerance):
        return f"the first module whose output differs is {name}: it is traced as something else"
    have = _onnx_values(artifact, feed, [n.name for n in nodes])
    have |= {finals[name]: array for name, array in have.items() if name in finals}
    for node in nodes:
        if node.name in have and apart(values[node.name], have[node.name], tolerance):
            return f"the first module whose output differs is {_module_of(node)} ({node.target})"
    if any(apart(values[n], have[n], tolerance) for n in finals.values() if n in values):
        return "no module differs by so much itself: small differences add up"
    return "no module differs: only ONNX Runtime's graph optimizations make it so"


def _program_values(program: ExportedProgram, tensors: Sequence[torch.Tensor]) -> dict[str, Array]:
    """Every tensor that the program computes, by the name of its node."""
    import torch

    values: dict[str, Array] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.op == "call_function" and isinstance(result, torch.Tensor):
                values[n.name] = result.detach().numpy().copy()
            return result

    with torch.no_grad():
        module = program.module(check_guards=False)
        Recorder(module).run(*tensors, enable_io_processing=False)
    return values


def _returned(graph: fx.Graph) -> list[str]:
    """The names of the nodes that a graph returns, in their order."""
    output = next(node for node in graph.nodes if node.op == "output")
    return [getattr(leaf, "name", "") for leaf in _leaves(output.args)]


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _leaves(item)]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    return [value]


def _onnx_values(artifact: Artifact, feed: Feed, names: Sequence[str]) -> dict[str, Array]:
    """Those values of the ONNX file that have such names, and its outputs."""
    with needs("onnx"):
        import onnx
    model = onnx.load(artifact.path, load_external_data=False)
    there = {name for node in model.graph.node for name in node.output}
    own = [spec.name for spec in artifact.outputs]
    shown = [name for name in names if name in there and name not in own]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in shown)
    outputs = tuple(TensorSpec(name=n, dtype="float32", shape=()) for n in (*own, *shown))
    with _files.scratch() as folder:
        path = folder / "shown.onnx"
        onnx_weights.lend(artifact.weights, artifact.path.parent, path.parent)
        onnx.save(model, path)
        open_wide = artifact.model_copy(update={"path": path, "outputs": outputs})
        with open_session(open_wide, "ort-cpu", SessionOptions(simulate=True)) as session:
            return session.run(feed)


def _traced_otherwise(
    module: nn.Module,
    given: tuple[Specs, Sequence[torch.Tensor]],
    nodes: Sequence[fx.Node],
    values: Mapping[str, Array],
    tolerance: float,
) -> str | None:
    """The first submodule that gives another output than the program has in its place."""
    last = {path: node.name for node in nodes for path in _path(node)}
    for path, want in _module_outputs(module, *given):
        name = last.get(path)
        if name and values[name].shape == want.shape and apart(want, values[name], tolerance):
            kind = type(module.get_submodule(path)).__name__
            return f"{path or 'the model itself'} ({kind})"
    return None


def _module_outputs(
    module: nn.Module, inputs: Specs, tensors: Sequence[torch.Tensor]
) -> list[tuple[str, Array]]:
    """The output tensor of each submodule's last call, the module's own last; inner ones first."""
    import torch

    found: dict[str, Array] = {}

    def note(path: str, output: object) -> None:
        if isinstance(output, torch.Tensor):
            found.pop(path, None)
            found[path] = output.detach().numpy().copy()

    hooks = [
        part.register_forward_hook(lambda _part, _given, output, path=path: note(path, output))
        for path, part in module.named_modules()
    ]
    try:
        with torch.no_grad():
            torch_module.call(module, inputs, tensors)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.items())


def _path(node: fx.Node) -> list[str]:
    """The modules that a node is in, outermost first; of a second call, the first one's name."""
    stack = node.meta.get("nn_module_stack") or {}
    return [str(path).partition("@")[0] for path, _ in stack.values()]


def _module_of(node: fx.Node) -> str:
    path = _path(node)
    return path[-1] if path and path[-1] else "the model itself"
