from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from deploykit.errors import InputError
from deploykit.formats import program_file
from tests.fixtures_core import refused


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "net.pt2"
    axes = ({0: torch.export.Dim.AUTO(max=9), 1: 4},)
    made = torch.export.export(nn.Linear(4, 2), (torch.rand(3, 4),), dynamic_shapes=axes)
    torch.export.save(made, path)
    return path


def changed(path: Path, inner: str, old: bytes, new: bytes) -> Path:
    """The archive with some bytes of one file replaced."""
    out = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            assert inner not in name or old in data
            target.writestr(name, data.replace(old, new) if inner in name else data)
    return out


def test_a_program_tells_its_inputs_and_runs(program: Path) -> None:
    (spec,), (batch,) = program_file.described(program)
    assert str(spec).endswith("float32[batch, 4]")
    assert (batch.name, batch.high) == ("batch", 9)
    assert program_file.load(program).eval()(torch.rand(5, 4)).shape == (5, 2)


@pytest.mark.parametrize(
    ("inner", "old", "new", "fact"),
    [
        ("models/", b"torch.ops.aten.linear.default", b"torch.hub.load", "calls 'torch.hub.load'"),
        ("models/", b"Symbol('", b"exec('", "computes a size"),
        ("weights_config", b'"use_pickle": false', b'"use_pickle": true', "pickled tensors"),
        ("weights_config", b'"weight_0"', b'"opaque_obj_0"', "holds the object"),
    ],
)
def test_a_program_that_would_run_code_is_refused(
    program: Path, inner: str, old: bytes, new: bytes, fact: str
) -> None:
    with refused(InputError, "refused", fact, hint="pickles are never run"):
        program_file.read(changed(program, inner, old, new))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"version https://git-lfs", b"\x80\x04."])
def test_what_is_no_program_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(content)
    with refused(InputError, path, "not an exported program", hint="torch.export.save"):
        program_file.read(path)
