"""Rows 1 to 14 of SECURITY.md: checkpoints and models from anywhere."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save

from tests.conftest import TEACHER
from tests.formats.test_onnx_check import custom
from tests.formats.test_onnx_file import FLOAT, model, value
from tests.formats.test_torch_folder import Payload
from tests.security.conftest import Case
from tests.security.small import Place, Words, export, quantize, saving


def pickled(writer: str) -> Callable[[Place], Words]:
    def words(place: Place) -> Words:
        payload, path = Payload(place.folder / "it-ran"), place.folder / "w.pt"
        if writer == "pickle":
            path.write_bytes(pickle.dumps(payload))
        else:
            torch.save({"w": payload}, path)
        return export(place, path)

    return words


def whole_module(place: Place) -> Words:
    torch.save(torch.nn.Linear(2, 2), place.folder / "w.pt")
    return export(place, place.folder / "w.pt")


def checkpoint(name: str, content: bytes) -> Callable[[Place], Words]:
    return lambda place: export(place, place.written(name, content))


def cut(place: Place) -> Words:
    torch.save(load_file(TEACHER), place.folder / "whole.pt")
    whole = (place.folder / "whole.pt").read_bytes()
    return export(place, place.written("w.pt", whole[: len(whole) // 2]))


def safetensors(header: str | dict[str, object], data: bytes) -> Callable[[Place], Words]:
    """A safetensors file with any header."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return checkpoint("w.safetensors", struct.pack("<Q", len(text)) + text + data)


def entry(start: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}


def poisoned(bad: float) -> Callable[[Place], Words]:
    def words(place: Place) -> Words:
        state = load_file(TEACHER)
        state["classifier.bias"][3] = bad
        return export(place, place.written("w.safetensors", save(state)))

    return words


A, B = json.dumps(entry(0, 8)), json.dumps(entry(8, 16))
CHECKPOINTS = [
    Case(1, "pickle in torch.save", pickled("torch"), 3, "refused", "pickles are never run"),
    Case(1, "bare pickle", pickled("pickle"), 3, "refused", "pickles are never run"),
    Case(2, "whole module", whole_module, 3, "no plain state dict", "model.state_dict()"),
    Case(3, "web page", checkpoint("w.pt", b"<!DOCTYPE html><p>sign in"), 3, "a web page",
         "download"),
    Case(3, "git lfs", checkpoint("w.pt", b"version https://git-lfs.github.com/spec/v1\noid sha"),
         3, "a Git LFS pointer", "git lfs pull"),
    Case(3, "empty", checkpoint("w.pt", b""), 3, "it is empty"),
    Case(3, "web page as safetensors", checkpoint("w.safetensors", b"<html>" * 9), 3, "a web page"),
    Case(3, "truncated", cut, 3, "no plain state dict", "save model.state_dict()"),
    Case(4, "overlap", safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), 3,
         "not a safetensors file"),
    Case(4, "hole", safetensors({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)), 3,
         "not a safetensors file"),
    Case(4, "huge header", checkpoint("w.safetensors", struct.pack("<Q", 2**40) + b"{}"), 3,
         "not a safetensors file"),
    Case(4, "truncated", safetensors({"a": entry(0, 8)}, bytes(4)), 3, "not a safetensors file"),
    Case(4, "key twice", safetensors(f'{{"a":{A},"a":{A}}}', bytes(8)), 3, "key 'a' is given 2"),
    Case(4, "leading space", safetensors(f' {{"a":{A}}}', bytes(8)), 3, "does not begin with {"),
    Case(4, "nan", poisoned(float("nan")), 3, "has NaN or infinite values"),
    Case(4, "infinity", poisoned(float("-inf")), 3, "has NaN or infinite values"),
]  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS, ids=str)
def test_checkpoints(case: Case, refuses: Callable[[Case], None], tmp_path: Path) -> None:
    refuses(case)
    assert not (tmp_path / "it-ran").exists()


def onnx_file(content: bytes) -> Callable[[Place], Words]:
    return lambda place: quantize(place, place.written("m.onnx", content))


def halved(place: Place) -> Words:
    whole = place.linear.read_bytes()
    return quantize(place, place.written("m.onnx", whole[: len(whole) // 2]))


def external(**entries: str) -> Callable[[Place], Words]:
    """A model whose weights lie in another file, by a reference that is changed."""

    def words(place: Place) -> Words:
        folder = place.folder / "model"
        folder.mkdir()
        onnx.save(model(), folder / "m.onnx", save_as_external_data=True, location="w.data",
                  size_threshold=0)  # fmt: skip
        (place.folder / "other.data").write_bytes(bytes(32))
        (folder / "link.data").symlink_to(place.folder / "other.data")
        (folder / "hard.data").hardlink_to(place.folder / "other.data")
        os.mkfifo(folder / "pipe")
        proto = onnx.load(folder / "m.onnx", load_external_data=False)
        (tensor,) = proto.graph.initializer
        told = {e.key: e.value for e in tensor.external_data} | entries
        del tensor.external_data[:]
        for key, text in told.items():
            tensor.external_data.add(key=key, value=text)
        (folder / "m.onnx").write_bytes(proto.SerializeToString())
        return quantize(place, folder / "m.onnx")

    return words


def weight(dims: tuple[int, ...], raw: bytes) -> Callable[[], onnx.ModelProto]:
    def make() -> onnx.ModelProto:
        tensor = TensorProto(name="w", data_type=FLOAT, raw_data=raw)
        tensor.dims.extend(dims)
        return model(initializer=[tensor])

    return make


def bomb(width: int = 4) -> onnx.ModelProto:
    size = numpy_helper.from_array(np.array([10**6, 10**6], np.int64), "size")
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["c"]),
        helper.make_node("ReduceMax", ["c"], ["m"]),
        helper.make_node("Add", ["x", "m"], ["y"]),
    ]
    inputs, outputs = ([value(name, ("batch", width))] for name in ("x", "y"))
    return model(nodes=nodes, initializer=[size], inputs=inputs, outputs=outputs)


def opset() -> onnx.ModelProto:
    return model(opsets=[helper.make_opsetid("", 999)])


def future() -> onnx.ModelProto:
    made = model()
    made.ir_version = 99
    return made


def of_nodes(*nodes: onnx.NodeProto, **changes: object) -> Callable[[], onnx.ModelProto]:
    return lambda: model(nodes=list(nodes), **{"initializer": [], **changes})


def nested(place: Place) -> Words:
    """Graphs in attributes of nodes of graphs, deeper than protobuf parses; written by hand."""
    data = b""
    for field in (6, 5, 1) * 100 + (7,):  # the graph of an attribute of a node of a graph ...
        size, text = len(data), bytearray([field << 3 | 2])
        while size > 127:
            text.append(size & 127 | 128)
            size >>= 7
        data = bytes([*text, size]) + data
    return onnx_file(b"\x08\x09" + data)(place)


def twice() -> onnx.ModelProto:
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])]
    return model(nodes=nodes, initializer=[], outputs=[value("y")])


def clash() -> onnx.ModelProto:
    return model(initializer=[numpy_helper.from_array(np.ones((4, 2), np.int64), "w")])


ESCAPES = ["../other.data", "a/../../other.data", "/etc/passwd", "/dev/zero"]
MODELS = [
    Case(5, "empty", onnx_file(b""), 3, "not an ONNX file: it is empty"),
    Case(5, "random", onnx_file(np.random.default_rng(0).bytes(4096)), 3, "m.onnx"),
    Case(5, "pickle", onnx_file(pickle.dumps([1, 2])), 3, "a Python pickle"),
    Case(5, "truncated", halved, 3, "m.onnx"),
    *(Case(6, f"outside {i}", external(location=path), 3, "not a path inside the folder")
      for i, path in enumerate(ESCAPES)),
    Case(6, "fifo", external(location="pipe"), 3, "no regular file"),
    Case(7, "symbolic link", external(location="link.data"), 3, "a symbolic link"),
    Case(7, "hard link", external(location="hard.data"), 3, "a hard link"),
    Case(8, "missing", external(location="lost.data"), 3, "the weights 'w'"),
    Case(8, "short", external(length="16"), 3, "16 bytes where 32 are needed"),
    Case(8, "negative offset", external(offset="-1"), 3, "its offset is '-1'"),
    Case(8, "offset without end", external(offset=str(2**63 - 1)), 3, "ends at byte"),
    Case(8, "unknown key", external(surprise="1"), 3, "unknown key 'surprise'"),
    Case(9, "dims overflow", saving(weight((2**40, 2**40), bytes(32))), 3, "w"),
    Case(9, "negative dims", saving(weight((-4, 2), bytes(32))), 3, "w"),
    Case(9, "too few bytes", saving(weight((4, 2), bytes(31))), 3, "w"),
    Case(11, "opset 999", saving(opset), 3, "opset 999", "or lower"),
    Case(11, "format 99", saving(future), 3, "is of 99", "newer onnx"),
    Case(11, "operator of others", saving(custom), 3, "com.acme::Magic 'spell'"),
    Case(12, "EPContext", saving(lambda: custom("EPContext", "com.microsoft")), 3,
         "EPContext 'spell'", "nothing here runs them"),
    Case(13, "cycle", saving(of_nodes(helper.make_node("Add", ["x", "b"], ["y"]),
                                      helper.make_node("Relu", ["y"], ["b"]))), 3,
         "topologically sorted"),
    Case(13, "output twice", saving(twice), 3, "bad.onnx"),
    Case(13, "missing input", saving(of_nodes(helper.make_node("Relu", ["nowhere"], ["y"]))), 3,
         "nowhere"),
    Case(13, "types clash", saving(clash), 3, "does not load it"),
    Case(13, "too deep", nested, 3, "m.onnx"),
]  # fmt: skip


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_onnx_files(case: Case, refuses: Callable[[Case], None]) -> None:
    refuses(case)


def options_inside(place: Place) -> Words:
    proto = onnx.load(place.linear)
    helper.set_model_props(proto, {"ort_config": '{"session_options": {}}'})
    path = place.written("m.onnx", proto.SerializeToString())
    np.savez(place.folder / "d.npz", x=np.ones((8, 3), np.float32))
    return ("package", path, "--data", place.folder / "d.npz", "-o", place.folder / "bundle")


def factory(body: str, *more: object) -> Callable[[Place], Words]:
    def words(place: Place) -> Words:
        code = "import torch\nfrom torch import nn\nclass N(nn.Module):\n"
        code += f"    def forward(self, x):\n        return {body}\ndef net():\n    return N()\n"
        path = place.written("net.py", code)
        return ("export", f"{path}:net", "--input-shape", "x:1x3", *more, *place.to_out())

    return words


def run_bomb(place: Place) -> Words:
    np.savez(place.folder / "d.npz", x=np.ones((8, 4), np.float32), target=np.zeros(8, np.int64))
    path = place.written("bomb.onnx", bomb().SerializeToString())
    return ("evaluate", path, "--data", place.folder / "d.npz", "--metric", "top1")


def benched(place: Place) -> Words:
    nan = of_nodes(helper.make_node("Sqrt", ["x"], ["y"]), outputs=[value("y")])()
    path = place.written("nan.onnx", nan.SerializeToString())
    np.savez(place.folder / "d.npz", x=-np.ones((8, 4), np.float32))
    return ("bench", path, "--data", place.folder / "d.npz", "--preset", "quick", "--backend",
            "ort-cpu")  # fmt: skip


ODD = [
    Case(10, "bomb", run_bomb, 6, "out of memory", "do not load it"),
    Case(12, "session options", options_inside, 3, "ort_config"),
    Case(14, "other than PyTorch", factory("torch.tanh(x.exp()).sin()", "--tolerance", "1e-12"), 7,
         "output 'output' differs from PyTorch"),
    Case(14, "nan", factory("(x - x).log() - (x - x).log()"), 3, "NaN"),
    Case(30, "wrong outputs", benched, 7, "output 'y' has NaN or infinite values"),
]  # fmt: skip


@pytest.mark.parametrize("case", ODD, ids=str)
def test_what_is_not_what_it_says(case: Case, refuses: Callable[[Case], None]) -> None:
    refuses(case)
