from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploykit import store
from deploykit.errors import InputError, StageError, UsageError
from deploykit.formats import open_model, torch_folder, torch_module
from deploykit.stages.take import TakeOptions, take
from deploykit.values import Artifact, TensorSpec
from tests.fixtures_core import content, refused

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=3, layers=()):
        super().__init__()
        self.line = nn.Linear(6, width)
    def forward(self, x):
        return self.line(x)

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.line = nn.Embedding(20, 4), nn.Linear(6, 3)
    def forward(self, values, ids):
        joined = torch.cat([values, self.table(ids).mean(1)], 1)
        return {"score": self.line(joined), "ids": ids * 2, "sum": joined.sum()}

class Spans(nn.Module):
    \"\"\"Outputs whose first axis is the batch, twice the batch, and never the batch.\"\"\"
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(6, 6)
    def forward(self, x):
        y = self.line(x)
        return y, y.repeat(2, 1), y[:2], self.line.weight, (y > 0)

class OnlyTwo(nn.Module):
    def forward(self, x):
        if x.shape[0] != 2:
            raise ValueError("two, please")
        return x

class Asserts(nn.Module):
    def forward(self, x):
        assert x.shape[1] == 7
        return x

class NoTensor(nn.Module):
    def forward(self, x):
        return "text"

class Hidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = torch.rand(6)
    def forward(self, x):
        return x * self.seen
"""
X = TensorSpec(name="x", dtype="float32", shape=("batch", 6))
PAIR = (
    TensorSpec(name="values", dtype="float32", shape=("batch", 2)),
    TensorSpec(name="ids", dtype="int64", shape=("batch", 5)),
)
Options = Callable[..., TakeOptions]


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    (tmp_path / "code").mkdir()
    path = tmp_path / "code" / "nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture
def options(nets: Path) -> Options:
    """Options of a factory of the file: `options("Net", arguments={"width": 5})`."""

    def make(name: str, *inputs: TensorSpec, **changes: Any) -> TakeOptions:
        return TakeOptions(factory=f"{nets}:{name}", inputs=inputs or (X,), **changes)

    return make


@pytest.fixture
def checkpoint(nets: Path, tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    save_file(torch_module.construct(f"{nets}:Net", {}).state_dict(), path)
    return path


def told(artifact: Artifact) -> list[str]:
    return [str(spec) for spec in artifact.outputs]


# --- inputs and outputs


def test_a_model_is_taken_with_its_checkpoint(
    options: Options, checkpoint: Path, tmp_path: Path
) -> None:
    artifact = take(options("Net", weights=checkpoint), out=tmp_path / "out")
    assert (artifact.format, artifact.precision, artifact.inputs) == ("torch", "fp32", (X,))
    assert artifact.facts == {"parameters": 21, "weights": "checkpoint"}
    assert open_model(tmp_path / "out") == artifact
    want, have = load_file(checkpoint), torch_folder.load(artifact).state_dict()
    assert want.keys() == have.keys()
    assert all(torch.equal(want[key], have[key]) for key in want)


def test_without_a_checkpoint_the_weights_are_those_of_the_factory(
    options: Options, tmp_path: Path
) -> None:
    assert take(options("Net"), out=tmp_path / "out").facts["weights"] == "factory"


def test_an_output_has_a_name_and_a_dynamic_batch(options: Options, tmp_path: Path) -> None:
    assert told(take(options("Net"), out=tmp_path / "a")) == ["output: float32[batch, 3]"]
    named = take(options("Net", outputs=("logits",)), out=tmp_path / "b")
    assert told(named) == ["logits: float32[batch, 3]"]


def test_only_an_axis_that_follows_the_batch_is_dynamic(options: Options, tmp_path: Path) -> None:
    assert told(take(options("Spans"), out=tmp_path / "out")) == [
        "output_0: float32[batch, 6]", "output_1: float32[output_1_0, 6]",
        "output_2: float32[2, 6]", "output_3: float32[6, 6]", "output_4: bool[batch, 6]",
    ]  # fmt: skip


def test_several_inputs_are_given_by_name(options: Options, tmp_path: Path) -> None:
    named = options("Pair", *PAIR, outputs=("score", "twice", "sum"))
    artifact = take(named, out=tmp_path / "out")
    assert artifact.inputs == PAIR
    assert told(artifact) == [
        "score: float32[batch, 3]", "twice: int64[batch, 5]", "sum: float32[]",
    ]  # fmt: skip
    turned = take(options("Pair", *PAIR[::-1]), out=tmp_path / "other")
    assert told(turned) == [
        "score: float32[batch, 3]",
        "ids_out: int64[batch, 5]",
        "sum: float32[]",
    ]


@pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c", "d")])
def test_each_output_has_one_name(options: Options, tmp_path: Path, names: tuple[str, ...]) -> None:
    with refused(
        InputError, f"3 outputs, {len(names)} names", str(list(names)), hint="one name for each"
    ):
        take(options("Pair", *PAIR, outputs=names), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "spec", "fact"),
    [
        (
            "Net",
            X.model_copy(update={"shape": ("batch", 7)}),
            "x: float32[batch, 7] at batch 2: m",
        ),
        ("Net", X.model_copy(update={"dtype": "int64"}), "x: int64[batch, 6] at batch 2: "),
        ("OnlyTwo", X, "two, please"),
        ("Asserts", X, "x: float32[batch, 6] at batch 2: AssertionError"),
    ],
)
def test_inputs_on_which_the_model_does_not_run_are_refused(
    options: Options, tmp_path: Path, name: str, spec: TensorSpec, fact: str
) -> None:
    with refused(InputError, "does not run on", fact, hint="correct the inputs"):
        take(options(name, spec), out=tmp_path / "out")
    assert sorted(content(tmp_path)) == ["code"]


def test_a_model_that_gives_no_tensors_is_refused(options: Options, tmp_path: Path) -> None:
    with refused(InputError, "gives str", hint="wrap the model"):
        take(options("NoTensor"), out=tmp_path / "out")


def test_inputs_that_are_not_named_as_arguments_go_in_order(
    options: Options, tmp_path: Path
) -> None:
    named = [s.model_copy(update={"name": f"input {i}"}) for i, s in enumerate(PAIR)]
    assert len(take(options("Pair", *named), out=tmp_path / "out").outputs) == 3
    with refused(InputError, "does not run on input 1: int64[batch, 5], input 0: ", hint="order"):
        take(options("Pair", *named[::-1]), out=tmp_path / "other")
    half = (named[0], PAIR[0])
    with refused(InputError, "'values'", "'input 0'", hint="known: ids, values"):
        take(options("Pair", *half), out=tmp_path / "other")


def test_a_model_without_inputs_is_refused(nets: Path, tmp_path: Path) -> None:
    with refused(UsageError, "inputs are not known", hint="--input-shape name:1x3x224x224"):
        take(TakeOptions(factory=f"{nets}:Net"), out=tmp_path / "out")


# --- factories and checkpoints


def test_a_factory_gets_its_arguments_and_they_are_kept(options: Options, tmp_path: Path) -> None:
    arguments = {"width": 5, "layers": [1, {"a": None}]}
    artifact = take(options("Net", arguments=arguments), out=tmp_path / "out")
    assert told(artifact) == ["output: float32[batch, 5]"]
    plain = json.loads((tmp_path / "out" / "model.json").read_text())
    assert (plain["factory"], plain["arguments"]) == ("factory.py:Net", arguments)
    assert torch_folder.load(artifact).line.out_features == 5


def test_a_factory_of_a_package_is_not_copied(tmp_path: Path) -> None:
    arguments = {"in_features": 6, "out_features": 2}
    given = TakeOptions(factory="torch.nn:Linear", arguments=arguments, inputs=(X,))
    artifact = take(given, out=tmp_path / "out")
    assert told(artifact) == ["output: float32[batch, 2]"]
    assert sorted(content(tmp_path / "out")) == [
        "artifact.json", "model.json", "weights.safetensors",
    ]  # fmt: skip
    assert torch_folder.load(open_model(tmp_path / "out")).out_features == 2


def test_an_artifact_needs_its_source_no_more(
    options: Options, nets: Path, checkpoint: Path, tmp_path: Path
) -> None:
    take(options("Net", weights=checkpoint), out=tmp_path / "out")
    nets.unlink()
    checkpoint.unlink()
    torch_folder.load(open_model(tmp_path / "out"))
    assert str(nets.parent) not in (tmp_path / "out" / "artifact.json").read_text()


@pytest.mark.parametrize(
    ("change", "fact", "hint"),
    [
        ({"factory": "no.py:make"}, "no.py: no such factory", "path of the factory"),
        ({"weights": Path("no.pt")}, "no.pt: no such weights", "path of the weights"),
        ({"factory": "no_such_package.x:make"}, "cannot import 'no_such_package.x'", "name it as"),
        ({"arguments": {"wdith": 3}}, "'wdith'", "--model-args"),
        ({"arguments": {"width": -1}}, "raises RuntimeError", "--model-args"),
    ],
)
def test_a_bad_source_is_refused(
    options: Options, tmp_path: Path, change: dict[str, Any], fact: str, hint: str
) -> None:
    with refused(InputError, fact, hint=hint):
        take(options("Net").model_copy(update=change), out=tmp_path / "out")
    assert sorted(content(tmp_path)) == ["code"]


def test_a_checkpoint_of_another_model_is_refused(
    options: Options, checkpoint: Path, tmp_path: Path
) -> None:
    with refused(InputError, checkpoint, "size mismatch", hint="--model-args"):
        take(options("Net", arguments={"width": 4}, weights=checkpoint), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_come_back_leaves_nothing(options: Options, tmp_path: Path) -> None:
    with refused(StageError, "outputs differ", hint="parameters and buffers"):
        take(options("Hidden"), out=tmp_path / "out")
    assert sorted(content(tmp_path)) == ["code"]


# --- the same work is not done twice


def test_the_same_work_is_not_done_twice(
    options: Options, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = take(options("Net", weights=checkpoint), out=tmp_path / "out")

    def never(*args: object) -> None:
        pytest.fail("the model was built again")

    monkeypatch.setattr(torch_folder, "construct", never)
    assert take(options("Net", weights=checkpoint), out=tmp_path / "out") == first


def test_what_is_in_the_way_is_replaced_by_force_only(options: Options, tmp_path: Path) -> None:
    first = take(options("Net"), out=tmp_path / "out")
    wide = options("Net", arguments={"width": 4})
    with pytest.raises(UsageError, match="out"):
        take(wide, out=tmp_path / "out")
    assert open_model(tmp_path / "out") == first
    assert told(take(wide, out=tmp_path / "out", force=True)) == ["output: float32[batch, 4]"]


def test_the_key_does_not_know_where_factory_and_weights_lie(
    options: Options, nets: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = take(options("Net", weights=checkpoint), out=tmp_path / "out")
    (tmp_path / "moved").mkdir()
    moved, weights = tmp_path / "moved" / "nets.py", tmp_path / "moved" / "other.safetensors"
    nets.rename(moved)
    checkpoint.rename(weights)
    os.utime(moved, (1, 1))
    monkeypatch.chdir(tmp_path / "moved")
    for factory in (f"{moved}:Net", "nets.py:Net", "../moved/nets.py:Net"):
        again = TakeOptions(factory=factory, inputs=(X,), weights=weights)
        assert take(again, out=tmp_path / "out") == first
    elsewhere = take(again, out=tmp_path / "elsewhere")
    assert elsewhere.history[-1].key == first.history[-1].key
    assert elsewhere.sha256 == first.sha256


def test_the_key_is_of_all_that_decides_the_result(
    options: Options, nets: Path, checkpoint: Path, tmp_path: Path
) -> None:
    plain = options("Net", weights=checkpoint)
    two = X.model_copy(update={"name": "y"})
    changes: list[dict[str, object]] = [
        {}, {"arguments": {"width": 3}}, {"weights": None}, {"inputs": (two,)},
        {"outputs": ("logits",)},
    ]  # fmt: skip
    keys = [
        take(plain.model_copy(update=change), out=tmp_path / str(i)).history[-1].key
        for i, change in enumerate(changes)
    ]
    nets.write_text(NETS + "\nOther = Net\n")
    keys.append(take(plain, out=tmp_path / "code-changed").history[-1].key)
    other = plain.model_copy(update={"factory": f"{nets}:Other"})
    keys.append(take(other, out=tmp_path / "other-function").history[-1].key)
    state = load_file(checkpoint)
    save_file({key: tensor + 1 for key, tensor in state.items()}, checkpoint)
    keys.append(take(plain, out=tmp_path / "weights-changed").history[-1].key)
    assert len(set(keys)) == len(keys)


def test_the_record_holds_digests_not_paths(
    options: Options, nets: Path, checkpoint: Path, tmp_path: Path
) -> None:
    record = take(options("Net", weights=checkpoint), out=tmp_path / "out").history[-1]
    assert record.inputs == {"factory": store.digest(nets), "weights": store.digest(checkpoint)}
    assert (record.stage, record.options["factory"], record.options["weights"]) == (
        "take", "nets.py:Net", None,
    )  # fmt: skip
    assert "torch" in record.versions
