"""Models from anywhere: each bad one is refused by name, none harms the process that opens it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploykit.errors import InputError, ResourceError
from deploykit.formats import onnx_check, onnx_child, onnx_file, open_model
from tests.fixtures_core import refused
from tests.formats.test_onnx_file import FLOAT, model, saved, value

SOUND = "a sound .onnx file"


@pytest.mark.parametrize(
    ("data", "what", "hint"),
    [
        (b"", "it is empty", SOUND),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS", "git lfs pull"),
        (b"PK\x03\x04rest", "a zip archive", SOUND),
        (b"\x80\x04\x95rest", "a Python pickle", SOUND),
        (b"\x89HDF\r\n", "an HDF5 file", SOUND),
        (b"<!DOCTYPE html>", "a web page", "download"),
        (b"\x1c\x00\x00\x00TFL3", "a TensorFlow Lite model", SOUND),
        (b"\x40\x00\x00\x00\x00\x00\x00\x00{\"__metadata__\"", "a safetensors file", SOUND),
        (os.urandom(4096).replace(b"<", b"="), "", SOUND),
    ],
)  # fmt: skip
def test_what_is_something_else_is_named(tmp_path: Path, data: bytes, what: str, hint: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    with refused(InputError, path, what, hint=hint):
        open_model(path)


def test_a_truncated_model(tmp_path: Path) -> None:
    path = saved(tmp_path, model())
    path.write_bytes(path.read_bytes()[:-20])
    with refused(InputError, path, hint=SOUND):
        open_model(path)


def test_an_opset_and_a_format_of_the_future(tmp_path: Path) -> None:
    newest = onnx.defs.onnx_opset_version()
    path = saved(tmp_path, model(opsets=[helper.make_opsetid("", 999)]))
    with refused(InputError, path, f"up to {newest}", "opset 999", hint=f"opset {newest} or lower"):
        open_model(path)
    proto = model()
    proto.ir_version = 99
    with refused(InputError, "is of 99", hint="newer onnx"):
        open_model(saved(tmp_path, proto))


def custom(op_type: str = "Magic", domain: str = "com.acme") -> onnx.ModelProto:
    node = helper.make_node(op_type, ["x"], ["y"], name="spell", domain=domain)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    return model(nodes=[node], opsets=opsets, initializer=[])


@pytest.mark.parametrize(
    ("proto", "named"),
    [
        (custom(), "com.acme::Magic 'spell'"),
        (custom("EPContext", "com.microsoft"), "com.microsoft::EPContext 'spell'"),
    ],
)
def test_native_code_of_others_is_refused_unless_one_only_looks(
    tmp_path: Path, proto: onnx.ModelProto, named: str
) -> None:
    path = saved(tmp_path, proto)
    with refused(InputError, path, "1 nodes need native code", named, hint="nothing here runs"):
        open_model(path)
    assert onnx_file.open_file(path, native=True).inputs[0].name == "x"


def test_native_code_is_found_in_branches_too() -> None:
    inner = helper.make_graph(
        [helper.make_node("Magic", ["x"], ["z"], domain="com.acme")], "then", [], [value("z")]
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    assert len(list(onnx_child.native_nodes(model(nodes=[node])))) == 2


def test_an_operator_that_no_runtime_knows(tmp_path: Path) -> None:
    path = saved(tmp_path, custom("NoSuchThing", "com.microsoft"))
    with refused(InputError, path, "ONNX Runtime does not load it", hint="export it again"):
        open_model(path)


def test_a_cycle(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
             helper.make_node("Relu", ["b"], ["y"])]  # fmt: skip
    with refused(InputError, "topologically sorted", hint=SOUND):
        open_model(saved(tmp_path, model(nodes=nodes, initializer=[])))


def test_types_that_clash(tmp_path: Path) -> None:
    integers = numpy_helper.from_array(np.ones((4, 2), np.int64), "w")
    with refused(InputError, "ONNX Runtime does not load it", hint="export it again"):
        open_model(saved(tmp_path, model(initializer=[integers])))


def test_an_output_of_another_type_than_declared(tmp_path: Path) -> None:
    proto = model(outputs=[value("y", ("batch", 2), TensorProto.INT64)])
    with refused(InputError, "does not load it", hint="export it again"):
        open_model(saved(tmp_path, proto))


def test_memory_runs_out_in_the_child_alone(tmp_path: Path) -> None:
    """The limit follows the size of the model: 8 GiB are far beyond that of a few bytes."""
    code = (
        "from deploykit.formats import onnx_child\n"
        "onnx_child.examine = lambda *_, **__: bytearray(8 << 30)\n"
        "onnx_child.main()"
    )
    path = saved(tmp_path, model())
    with refused(ResourceError, path, "out of memory", hint="do not load it"):
        onnx_check.check(path, command=(sys.executable, "-c", code))


@pytest.mark.parametrize(
    ("code", "kind", "fact"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", InputError, "signal 11"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", ResourceError, "out of time"),
        ("import sys; sys.exit('planted')", InputError, "exit code 1: planted"),
    ],
)
def test_a_child_that_dies_is_told_as_it_died(
    tmp_path: Path, code: str, kind: type[InputError], fact: str
) -> None:
    path = saved(tmp_path, model())
    with refused(kind, path, fact, hint=""):
        onnx_check.check(path, command=(sys.executable, "-c", code))


def test_a_child_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, model())
    monkeypatch.setattr(onnx_check, "SECONDS", 0.5)
    with refused(ResourceError, path, "does not end", hint="do not load it"):
        onnx_check.check(path, command=(sys.executable, "-c", "import time; time.sleep(60)"))


# --- weights in another file


def split(folder: Path, **entries: str) -> Path:
    """A model whose weights lie in `w.data`, with entries of the reference changed."""
    path = saved(folder, model(), save_as_external_data=True, location="w.data", size_threshold=0)
    proto = onnx.load(path, load_external_data=False)
    (tensor,) = proto.graph.initializer
    told = {e.key: e.value for e in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, text in told.items():
        tensor.external_data.add(key=key, value=text)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("entries", "fact"),
    [
        ({"location": "lost.data"}, "No such file"),
        ({"location": "../w.data"}, "not a path inside"),
        ({"location": "a/../../w.data"}, "not a path inside"),
        ({"location": "/etc/passwd"}, "not a path inside"),
        ({"location": ""}, "not a path inside"),
        ({"location": "."}, "not a path inside"),
        ({"location": "folder"}, "no regular file"),
        ({"location": "pipe"}, "no regular file"),
        ({"location": "link.data"}, "a symbolic link"),
        ({"location": "linked/w.data"}, "a symbolic link"),
        ({"location": "hard.data"}, "a hard link"),
        ({"offset": "4"}, "ends at byte 36, the file has 32"),
        ({"offset": "-1"}, "its offset is '-1'"),
        ({"offset": str(2**63 - 1)}, "ends at byte"),
        ({"length": "16"}, "16 bytes where 32 are needed"),
        ({"length": "x"}, "its length is 'x'"),
        ({"surprise": "1"}, "unknown key 'surprise'"),
    ],
)
def test_weights_that_are_not_where_they_should_be(
    tmp_path: Path, entries: dict[str, str], fact: str
) -> None:
    folder, other = tmp_path / "model", tmp_path / "other.data"
    (folder / "folder").mkdir(parents=True)
    path = split(folder, **entries)
    other.write_bytes(bytes(32))
    (folder / "link.data").symlink_to(other)
    (folder / "linked").symlink_to(folder)
    (folder / "hard.data").hardlink_to(other)
    os.mkfifo(folder / "pipe")
    with refused(InputError, path, "the weights 'w'", fact, hint="all its files beside it"):
        open_model(path)


def test_weights_that_are_too_short(tmp_path: Path) -> None:
    path = split(tmp_path)
    (tmp_path / "w.data").write_bytes(bytes(31))
    with refused(InputError, path, "the file has 31", hint="all its files"):
        open_model(path)


def test_a_model_without_value_info_and_with_odd_names(tmp_path: Path) -> None:
    """Names with `:` and `/`, an int32 input, two outputs, and a branch."""
    branch = [
        helper.make_graph(
            [helper.make_node(op, ["s/x:0"], [f"{op}:0"])], op, [], [value(f"{op}:0")]
        )
        for op in ("Relu", "Neg")
    ]
    nodes = [
        helper.make_node("Cast", ["tokens:0"], ["s/x:0"], to=FLOAT),
        helper.make_node("If", ["flag"], ["out/a:0"], then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("Identity", ["s/x:0"], ["out/b:0"]),
    ]
    proto = model(
        nodes=nodes, initializer=[],
        inputs=[
            value("tokens:0", ("n", 4), TensorProto.INT32), value("flag", (), TensorProto.BOOL)
        ],
        outputs=[value("out/a:0", ("n", 4)), value("out/b:0", ("n", 4))],
    )  # fmt: skip
    artifact = open_model(saved(tmp_path, proto))
    assert [str(spec) for spec in artifact.inputs] == ["tokens:0: int32[n, 4]", "flag: bool[]"]
    assert [spec.name for spec in artifact.outputs] == ["out/a:0", "out/b:0"]
