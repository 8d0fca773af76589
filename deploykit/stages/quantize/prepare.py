"""A graph that quantization can work on: opset lifted, constants and batch norms folded, shapes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from deploykit import _files
from deploykit._lazy import needs
from deploykit.formats import onnx_file, onnx_lift, onnx_weights
from deploykit.formats.onnx_graph import drop_unused, name_nodes, subgraph_nodes

if TYPE_CHECKING:
    import onnx

NOT_FOLDED = "not folded: ONNX Runtime's pass fails on it"
"""Batch norms stay apart from their convolutions, constants are computed at each call."""
TOO_LARGE = "not folded, and no correction tried: the weights are too large to be held twice"


def prepare(path: Path, *, opset: int = 13) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The float graph with names on all nodes, and what was done to it, one sentence each.

    `opset` is the lowest that will do. Raises InputError: not a sound ONNX file, or one that cannot
    be lifted. One that is too large for one file stays a shell of weights that lie beside `path`.
    """
    import onnx

    model = onnx_file.shell(path)
    if onnx_weights.total_bytes(model) > onnx_weights.LARGEST:
        return _large(model, opset, path)
    onnx_weights.load(model, path.parent)
    model, told = onnx_lift.lift(model, opset, path)
    if count := _affine(model):
        told.append(f"{count} Sub and Div by a constant written as Add and Mul")
    with _files.scratch() as folder:
        source = path
        if told:
            source = folder / "changed.onnx"
            onnx.save(model, source)
        del model
        prepared, way = _folded(source, folder / "prepared.onnx")
    name_nodes(prepared)
    return prepared, (*told, way)


def _large(
    model: onnx.ModelProto, opset: int, path: Path
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """As `prepare`, with the weights left in their files and nothing folded."""
    model, told = onnx_lift.lift(model, opset, path)
    model, who = onnx_lift.infer(model)
    name_nodes(model)
    return model, (*told, who, TOO_LARGE)


def _affine(model: onnx.ModelProto) -> int:
    """Write x - c as x + (-c) and x / c as x * (1 / c), in place; how many.

    ONNX Runtime folds Add and Mul into the convolution before them, Sub and Div not: an unfused
    batch norm would keep its convolution's range, and a pair, apart from what follows.
    """
    import onnx

    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    changed, taken = 0, _names(model)
    for node in model.graph.node:
        taken |= {name for inner in subgraph_nodes(node) for name in inner.output}
    for node in model.graph.node:
        tensor = constants.get(node.input[1]) if node.op_type in ("Sub", "Div") else None
        if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        value = onnx.numpy_helper.to_array(tensor)
        if node.op_type == "Div" and not value.all():
            continue
        name = f"{node.output[0]}_{node.op_type.lower()}"
        while name in taken:
            name += "_"
        taken.add(name)
        turned = -value if node.op_type == "Sub" else 1 / value
        model.graph.initializer.append(onnx.numpy_helper.from_array(turned, name))
        node.op_type = "Add" if node.op_type == "Sub" else "Mul"
        node.input[1] = name
        changed += 1
    if changed:
        drop_unused(model)
    return changed


def _folded(source: Path, target: Path) -> tuple[onnx.ModelProto, str]:
    """ONNX Runtime's own preparation; its symbolic shape inference fails on several real models."""
    import onnx

    source = source.resolve()  # the folder changes below
    names = _names(onnx.load(source, load_external_data=False))
    with needs("onnxruntime"), _quiet():
        from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
        from onnxruntime.quantization.shape_inference import quant_pre_process
    for way, skip in (("symbolic shapes", False), ("without symbolic shapes", True)):
        try:
            with _quiet(), chdir(target.parent):  # where it fails it leaves a file in the folder
                quant_pre_process(source, target, skip_symbolic_shape=skip)
                model = load_model_with_shape_infer(target)
        except Exception:  # noqa: BLE001, S112 - it raises many kinds; the way taken is a fact
            continue
        _rename(model, names)
        return model, f"folded, {way}"
    model = onnx.shape_inference.infer_shapes(onnx.load(source))
    return model, NOT_FOLDED


def _names(model: onnx.ModelProto) -> set[str]:
    """Of the tensors of the main graph."""
    made = {name for node in model.graph.node for name in node.output}
    return made | {t.name for t in (*model.graph.initializer, *model.graph.input)}


def _rename(model: onnx.ModelProto, known: set[str]) -> None:
    """Give tensors that ONNX Runtime has added names that it will not choose again, in place.

    When it loads a model it names what its fusions add without a look at what is there.
    """
    added, end = {name for name in _names(model) - known if name}, "_folded"
    while any(name + end in known for name in added):
        end += "_"
    new = {name: name + end for name in added}
    nodes = list(model.graph.node)
    inner = [one for node in nodes for one in subgraph_nodes(node)]
    for node in [*nodes, *inner]:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = new.get(name, name)
    for item in (*model.graph.initializer, *model.graph.value_info):
        item.name = new.get(item.name, item.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tools' prints and root-logger lines off the user's terminal."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        root.setLevel(level)
