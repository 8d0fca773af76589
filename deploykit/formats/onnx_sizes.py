"""The sizes of all tensors of an ONNX graph for given input shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit._lazy import installed
from deploykit.errors import InputError
from deploykit.formats import onnx_check, onnx_file, onnx_weights
from deploykit.formats.onnx_macs import COMPUTING, macs
from deploykit.values import Array, TensorSpec, Value

if TYPE_CHECKING:
    import onnx

USUAL = ((224, 128), (48, 16), (32, 32), (640, 512))
"""Usual sizes of dynamic axes behind the first: of images (4 axes), and of all else. The first pair
that the model runs at is taken."""
SECONDS = 120.0
"""After so long the run is given up."""
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
Sizes = dict[str, tuple[int, ...]]
Shapes = Mapping[str, tuple[int, ...]]


def input_shapes(inputs: Sequence[TensorSpec], given: Shapes, usual: tuple[int, int]) -> Shapes:
    """A shape for each input: the given one, else 1 sample and a usual size of what is dynamic.

    A dimension of one name has one size. Raises InputError: a given shape does not fit.
    """
    for name in given:
        if name not in [spec.name for spec in inputs]:
            raise InputError(
                f"the model has no input {name!r}",
                hint=f"its inputs are {', '.join(spec.name for spec in inputs)}",
            )
    sizes: dict[str, int] = {}
    for spec in inputs:
        if shape := given.get(spec.name):
            _check_fits(spec, shape)
            pairs = zip(spec.shape, shape, strict=True)
            sizes.update((dim, size) for dim, size in pairs if isinstance(dim, str))
    for spec in inputs:
        behind = usual[0] if len(spec.shape) == 4 else usual[1]
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                first = not axis or dim.lower().startswith("batch") or dim in ("N", "n", "b")
                sizes.setdefault(dim, 1 if first else behind)
    return {spec.name: tuple(given.get(spec.name) or spec.fixed(sizes)) for spec in inputs}


def _check_fits(spec: TensorSpec, shape: Sequence[int]) -> None:
    fits = len(shape) == len(spec.shape) and all(
        isinstance(want, str) or want == have for want, have in zip(spec.shape, shape, strict=False)
    )
    if not fits:
        raise InputError(
            f"the shape {list(shape)} does not fit {spec}",
            hint="give the model's own numbers, and any for its dynamic dimensions",
        )


@dataclass(frozen=True)
class Found:
    """Sizes and types of tensors by name, those of subgraphs too. Types are named as ONNX does."""

    shapes: Shapes
    """Of the inputs."""
    sizes: Sizes
    types: dict[str, str]
    way: str
    """Who found them."""
    problem: str = ""
    """Why not all that the work depends on are known."""


def find(
    model: onnx.ModelProto,
    inputs: Sequence[TensorSpec],
    given: Shapes,
    path: Path,
    *,
    run: bool,
) -> Found:
    """The sizes at given input shapes; what they leave open is usual, see `input_shapes`.

    By onnx's inference; with `run`, where it leaves sizes open that the work depends on, by one run
    in ONNX Runtime on ones, in a process of its own with limits of memory and time: `path` is the
    file. The model may be a shell. Raises InputError: a shape does not fit.
    """
    first: Found | None = None
    for usual in USUAL:
        found = _infer(model, input_shapes(inputs, given, usual), path, run=run)
        first = first or found
        if not found.problem:
            return found
    assert first is not None  # noqa: S101 - there are usual sizes
    return first


def _infer(model: onnx.ModelProto, shapes: Shapes, path: Path, *, run: bool) -> Found:
    import onnx

    fixed = _fixed(model, shapes)
    try:
        found = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    except (RuntimeError, ValueError, onnx.shape_inference.InferenceError):
        found = fixed
    sizes, types = _known(found)
    wanted = _wanted(found, sizes)
    if not wanted:
        return Found(shapes, sizes, types, "onnx")
    if not run or not installed("onnxruntime"):
        why = "native code cannot be run here" if not run else "onnxruntime is not installed"
        return Found(shapes, sizes, types, "onnx", why)
    answer = _asked(Question(path=path, shapes=dict(shapes), wanted=tuple(wanted)))
    if isinstance(answer, str):
        why = f"it does not run at these shapes: {answer}"
        return Found(shapes, sizes, types, "onnx", why)
    return Found(shapes, sizes | answer, types, "onnx and one run on ones")


class Question(Value):
    """What the child is asked."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    wanted: tuple[str, ...]


def _asked(question: Question) -> Sizes | str:
    """The sizes by a run in a child, or why there are none."""
    words = [sys.executable, "-P", "-B", "-m", "deploykit.formats.onnx_sizes"]
    try:
        done = subprocess.run(
            words, input=question.model_dump_json().encode(), capture_output=True,
            timeout=SECONDS, env=onnx_check.environment(), check=False,
        )  # fmt: skip
        answer = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return f"no end within {SECONDS:.0f} s"
    except (ValueError, IndexError):
        return "the process that runs it died"
    if isinstance(answer, str):
        return answer
    return {name: tuple(size) for name, size in answer.items()}


def _fixed(model: onnx.ModelProto, shapes: Shapes) -> onnx.ModelProto:
    """A copy with these input shapes, and none for what follows from them."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.input:
        if value.name in shapes:
            del value.type.tensor_type.shape.dim[:]
            for size in shapes[value.name]:
                value.type.tensor_type.shape.dim.add(dim_value=size)
    for value in copy.graph.output:
        value.type.tensor_type.ClearField("shape")
    del copy.graph.value_info[:]
    return copy


def _known(model: onnx.ModelProto) -> tuple[Sizes, dict[str, str]]:
    import onnx

    sizes, types = Sizes(), dict[str, str]()
    for graph in _graphs(model.graph):
        for value in (*graph.value_info, *graph.input, *graph.output):
            tensor = value.type.tensor_type
            types[value.name] = onnx.TensorProto.DataType.Name(tensor.elem_type)
            dims = tensor.shape.dim
            if tensor.HasField("shape") and all(d.HasField("dim_value") for d in dims):
                sizes[value.name] = tuple(d.dim_value for d in dims)
        for weights in graph.initializer:
            sizes[weights.name] = tuple(weights.dims)
            types[weights.name] = onnx.TensorProto.DataType.Name(weights.data_type)
    return sizes, types


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node or inner.output:
                    yield from _graphs(inner)


def _wanted(model: onnx.ModelProto, sizes: Sizes) -> list[str]:
    """Tensors of the main graph that computing nodes touch and whose size is not known."""
    touched = (
        name
        for node in model.graph.node
        if node.op_type in COMPUTING and macs(node, sizes) is None
        for name in (*node.input[:3], node.output[0])
    )
    return [name for name in dict.fromkeys(touched) if name and name not in sizes]


def _by_run(question: Question) -> Sizes:
    """What one run with the graph's own `Shape` nodes tells of the tensors."""
    import onnx
    import onnxruntime as ort

    model = _fixed(onnx.load(question.path, load_external_data=False), question.shapes)
    onnx_check.limit(onnx_weights.total_bytes(model))
    asked = [f"{name}:size" for name in question.wanted]
    del model.graph.output[:]
    for name, size in zip(question.wanted, asked, strict=True):
        model.graph.node.append(onnx.helper.make_node("Shape", [name], [size]))
        model.graph.output.append(
            onnx.helper.make_tensor_value_info(size, onnx.TensorProto.INT64, [None])
        )
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.disable_prepacking", "1")
    if onnx_weights.files(model):
        folder = str(question.path.parent)
        settings.add_session_config_entry(WEIGHTS_FOLDER, folder)
    session = ort.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    kinds = {value.name: value.type for value in session.get_inputs()}
    given = question.shapes.items()
    feed = {name: _ones(kinds[name], shape) for name, shape in given if name in kinds}
    found = session.run(asked, feed)
    return {name: tuple(map(int, size)) for name, size in zip(question.wanted, found, strict=True)}


def _ones(kind: str, shape: Sequence[int]) -> Array:
    name = kind.removeprefix("tensor(").removesuffix(")")
    dtype = {"float": "float32", "double": "float64"}.get(name, name)
    return np.ones(tuple(shape), np.dtype(dtype))


def main() -> None:
    """Answer the question on stdin with one JSON value: sizes by name, or what went wrong."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    question = Question.model_validate_json(sys.stdin.read())
    onnx_check.limit(question.path.stat().st_size)
    try:
        answer: Sizes | str = _by_run(question)
    except Exception as error:  # noqa: BLE001 - it raises many kinds; this is the answer
        answer = onnx_file.line(error)
    os.write(answers, json.dumps(answer).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
