from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploykit.backends import open_session
from deploykit.dataset import Dataset
from deploykit.errors import AnswerIsNo, InputError, StageError
from deploykit.stages.export import ExportOptions, export
from deploykit.stages.take import TakeOptions, take
from deploykit.values import Artifact, TensorSpec

TWO_INPUTS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 4)
        self.line = nn.Linear(6, 3)
    def forward(self, values, ids):
        joined = torch.cat([values, self.table(ids).mean(1)], 1)
        return {"score": self.line(joined), "ids": ids * 2}

def make():
    return Net()

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 2)
    def forward(self, x):
        return self.line(x.reshape(2, 4)) if x.shape[0] == 2 else self.line(x)

def fixed():
    return Fixed()

class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 2)
    def forward(self, x):
        return self.line(x) + torch.rand(x.shape[0], 2)

def random():
    return Random()
"""


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(TWO_INPUTS)
    return str(path)


def test_the_teacher_in_onnx_is_the_teacher(
    teacher_onnx: Artifact, teacher: Artifact, evaluation: Dataset
) -> None:
    assert teacher_onnx.format == "onnx"
    assert teacher_onnx.precision == "fp32"
    assert teacher_onnx.inputs == teacher.inputs
    assert teacher_onnx.facts["dynamic"]["batch"]["checked"] == [1, 2, 7, 32]
    assert teacher_onnx.facts["verified_on"] == "evaluation.npz"
    assert 0 <= teacher_onnx.facts["largest_relative_difference"] < 1e-5
    assert teacher_onnx.facts["operators"]["Conv"] == 13
    assert [record.stage for record in teacher_onnx.history] == ["take", "export"]
    assert teacher_onnx.preprocessing == evaluation.preprocessing


def test_several_inputs_integers_and_named_outputs(source: str, tmp_path: Path) -> None:
    inputs = (
        TensorSpec(name="values", dtype="float32", shape=("batch", 2)),
        TensorSpec(name="ids", dtype="int64", shape=("batch", 5)),
    )
    options = TakeOptions(factory=f"{source}:make", inputs=inputs, outputs=("score", "twice"))
    model = take(options, out=tmp_path / "net")
    made = export(model, ExportOptions(), out=tmp_path / "net.onnx")
    assert [str(s) for s in made.outputs] == ["score: float32[batch, 3]", "twice: int64[batch, 5]"]
    assert made.facts["verified_on"] == "random inputs"
    feed = {"values": np.ones((3, 2), np.float32), "ids": np.full((3, 5), 7)}
    with open_session(made) as session:
        np.testing.assert_array_equal(session.run(feed)["twice"], np.full((3, 5), 14))


def test_a_fixed_batch_is_fixed(teacher: Artifact, tmp_path: Path) -> None:
    made = export(teacher, ExportOptions(dynamic_batch=False), out=tmp_path / "m.onnx")
    assert made.inputs[0].shape == (1, 1, 28, 28)
    assert made.facts["dynamic"] == {}


def test_a_dimension_that_the_model_fixes_is_an_error(source: str, tmp_path: Path) -> None:
    inputs = (TensorSpec(name="x", dtype="float32", shape=("batch", 4)),)
    model = take(TakeOptions(factory=f"{source}:fixed", inputs=inputs), out=tmp_path / "net")
    with pytest.raises((StageError, AnswerIsNo)):
        export(model, ExportOptions(), out=tmp_path / "net.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net", "nets.py"]


def test_outputs_that_differ_are_an_honest_no(source: str, tmp_path: Path) -> None:
    inputs = (TensorSpec(name="x", dtype="float32", shape=("batch", 4)),)
    torch_like = TakeOptions(factory=f"{source}:random", inputs=inputs)
    with pytest.raises(StageError, match="does not come back"):
        take(torch_like, out=tmp_path / "net")


def test_the_tolerance_is_a_gate(teacher: Artifact, evaluation: Dataset, tmp_path: Path) -> None:
    with pytest.raises(AnswerIsNo, match="differs from PyTorch with batch"):
        export(teacher, ExportOptions(tolerance=1e-12), out=tmp_path / "m.onnx", data=evaluation)
    assert not list(tmp_path.iterdir())


def test_onnx_is_not_exported_again(teacher_onnx: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="export takes a torch model"):
        export(teacher_onnx, ExportOptions(), out=tmp_path / "m.onnx")


def test_the_file_tells_modules_but_no_place_on_this_machine(teacher_onnx: Artifact) -> None:
    raw = teacher_onnx.path.read_bytes()
    assert b"layers.0" in raw
    for word in (b"stack_trace", b".py", b"site-packages"):
        assert word not in raw


ROADS = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Out:
    logits: torch.Tensor
    hidden: torch.Tensor
    nothing: object = None

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head, self.odd = nn.Embedding(20, 4), nn.Linear(4, 3), Odd()
    def forward(self, ids, other=None, *, mask=None):
        hidden = self.odd(self.table(ids))
        return Out(self.head((hidden * mask[..., None]).mean(1)), hidden)

class Odd(nn.Module):
    def forward(self, x):
        return x

class Traced(Odd):
    def forward(self, x):
        return x * 1.01 if torch.compiler.is_exporting() else x

class Branch(Net):
    def forward(self, ids, mask):
        if ids.shape[1] == 8: return self.head(self.table(ids))
        return self.head(self.table(ids)) + 1

class Short(Net):
    def forward(self, ids, mask):
        if ids.shape[1] > 16: raise ValueError("too long")
        return self.head(self.table(ids))

def traced():
    made = Net(); made.odd = Traced(); return made

def example_inputs():
    return {"mask": torch.ones(3, 8), "ids": torch.arange(24).reshape(3, 8) % 20}
"""
STEPS = ("ids:1=steps[1..32]", "mask:1=steps")


def taken(folder: Path, name: str, axes: tuple[str, ...] = STEPS) -> Artifact:
    (folder / "roads.py").write_text(ROADS)
    options = TakeOptions(factory=f"{folder / 'roads.py'}:{name}", dynamic_axes=axes)
    return take(options, out=folder / "net")


def test_names_of_arguments_and_fields_and_the_user_s_examples_are_kept(tmp_path: Path) -> None:
    made = export(taken(tmp_path, "Net"), ExportOptions(), out=tmp_path / "net.onnx")
    assert [str(s) for s in made.inputs] == [
        "mask: float32[batch, steps]", "ids: int64[batch, steps]",
    ]  # fmt: skip
    assert [str(s) for s in made.outputs] == [
        "logits: float32[batch, 3]", "hidden: float32[batch, steps, 4]",
    ]  # fmt: skip
    assert {1, 8, 9, 32} <= set(made.facts["dynamic"]["steps"]["checked"])
    assert made.facts["outputs"]["logits"]["agreement"] == 1


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("Branch", r"fixes the dynamic dimension ids:1=steps at 8, in .*shape\[1\] == 8"),
        ("Short", r"1=steps to 1\.\.16 where steps\[1\.\.32\] was asked .*shape\[1\] > 16"),
    ],
)
def test_the_line_that_fixes_or_bounds_a_dimension_is_named(
    tmp_path: Path, name: str, fact: str
) -> None:
    axes = ("ids:1=steps[1..32]", "mask:1=other") if name == "Branch" else STEPS
    with pytest.raises(StageError, match=fact):
        export(taken(tmp_path, name, axes), ExportOptions(), out=tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_the_first_module_that_deviates_is_named(tmp_path: Path) -> None:
    with pytest.raises(AnswerIsNo, match=r"first module whose output differs is odd \(Traced\)"):
        export(taken(tmp_path, "traced"), ExportOptions(), out=tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()
