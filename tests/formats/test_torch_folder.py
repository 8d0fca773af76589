from __future__ import annotations

import json
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from deploykit import store
from deploykit.errors import InputError, StageError
from deploykit.formats import checkpoint, open_model, torch_folder, torch_module
from deploykit.formats.torch_folder import Description
from deploykit.stages.take import TakeOptions, take
from deploykit.values import Artifact, TensorSpec
from tests.fixtures_core import content, fine_or_refused, python, refused, told

MODELS = '''
import torch
from torch import nn

class Residual(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Dropout(0.5))
        self.head = nn.Linear(width, 4)
    def forward(self, x):
        y = self.stem(x).relu()
        return self.head((y + self.body(y)).mean((2, 3)))

class Tied(nn.Module):
    """A weight that two layers share, and one that is a view of another."""
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
    def forward(self, x):
        return self.two(self.one(x))

class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mask", torch.zeros(6, dtype=torch.bool))
        self.register_buffer("ramp", torch.arange(6.0), persistent=False)
        self.weight = nn.Parameter(torch.rand(3, 6).t())  # not contiguous
    def forward(self, x):
        return torch.where(self.mask, (x - self.mean) * self.ramp, x) @ self.weight + self.steps

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 3)
    def forward(self, x):
        y = self.lin(x)
        return {"logits": y, "probabilities": y.softmax(1)}

class NotANumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 3)
    def forward(self, x):
        return self.lin(x).log()

class Hidden(nn.Module):
    """What it has learned lies in an attribute."""
    def __init__(self):
        super().__init__()
        self.lin, self.factor = nn.Linear(6, 3), 1.0
    def forward(self, x):
        return self.lin(x) * self.factor

class Outputs(nn.Module):
    """How many outputs there are, and of which dtype, lies in attributes."""
    def __init__(self):
        super().__init__()
        self.lin, self.count, self.dtype = nn.Linear(6, 3), 1, torch.float32
    def forward(self, x):
        return (self.lin(x).to(self.dtype),) * self.count

class Random(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 3)
    def forward(self, x):
        return self.lin(x) + torch.rand(3)

def fails(**arguments): raise RuntimeError("no such width")
def exits(): raise SystemExit(0)
def gives_nothing(): return None
def gives_class(): return Residual
'''  # fmt: skip

IMAGES = TensorSpec(name="x", dtype="float32", shape=("batch", 3, 8, 8))
X = TensorSpec(name="x", dtype="float32", shape=("batch", 6))
Y = TensorSpec(name="y", dtype="float32", shape=("batch", 3))


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of factories."""
    path = tmp_path_factory.mktemp("factory") / "models.py"
    path.write_text(MODELS)
    return path


def built(factory: Path, name: str, **arguments: Any) -> nn.Module:
    """A model with other weights, buffers and statistics than its factory gives."""
    torch.manual_seed(7)
    module = torch_module.construct(f"{factory}:{name}", arguments)
    for tensor in module.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return module


def described(name: str, *inputs: TensorSpec, **arguments: Any) -> Description:
    return Description(
        factory=f"factory.py:{name}", arguments=arguments, inputs=inputs or (X,), outputs=(Y,)
    )


def written(module: nn.Module, factory: Path, folder: Path, description: Description) -> Artifact:
    torch_folder.write(module, description, factory, folder)
    return Artifact(
        path=folder, format="torch", precision="fp32", inputs=description.inputs,
        outputs=description.outputs, sha256="",
    )  # fmt: skip


def outputs(module: nn.Module, spec: TensorSpec) -> tuple[torch.Tensor, ...]:
    with torch.inference_mode():
        probe = torch_module.examples((spec,), batch=5, seed=3)
        return torch_module.output_tensors(module.eval()(*probe))


# --- there and back


@pytest.mark.parametrize(
    ("name", "spec", "arguments"),
    [("Residual", IMAGES, {}), ("Residual", IMAGES, {"width": 5}), ("Tied", X, {}),
     ("Buffers", X, {}), ("Named", X, {})],
)  # fmt: skip
def test_a_model_comes_back_to_the_bit(
    factory: Path, tmp_path: Path, name: str, spec: TensorSpec, arguments: dict[str, Any]
) -> None:
    module = built(factory, name, **arguments)
    if name == "Buffers":
        module.steps.fill_(3)
        module.mask[::2] = True
    artifact = written(module, factory, tmp_path / "m", described(name, spec, **arguments))
    again = torch_folder.load(artifact)
    assert not again.training
    assert all(map(torch.equal, outputs(module, spec), outputs(again, spec)))
    state, back = module.state_dict(), again.state_dict()
    assert state.keys() == back.keys()
    for key, tensor in state.items():
        assert tensor.dtype == back[key].dtype
        assert torch.equal(tensor, back[key])


def test_the_folder_holds_the_factory_a_description_and_safe_weights(
    factory: Path, tmp_path: Path
) -> None:
    module = built(factory, "Residual", width=5)
    written(module, factory, tmp_path / "m", described("Residual", IMAGES, width=5))
    assert sorted(content(tmp_path / "m")) == ["factory.py", "model.json", "weights.safetensors"]
    assert (tmp_path / "m" / "factory.py").read_text() == MODELS
    plain = json.loads((tmp_path / "m" / "model.json").read_text())
    assert plain["schema"] == "deploykit.torch/1"
    assert (plain["factory"], plain["arguments"]) == ("factory.py:Residual", {"width": 5})
    assert (tmp_path / "m" / "weights.safetensors").stat().st_mode & 0o777 == 0o644
    assert torch_folder.describe(tmp_path / "m") == described("Residual", IMAGES, width=5)


def test_a_shared_weight_is_kept_once_and_stays_shared(factory: Path, tmp_path: Path) -> None:
    artifact = written(built(factory, "Tied"), factory, tmp_path / "m", described("Tied"))
    assert set(load_file(tmp_path / "m" / "weights.safetensors")) == {
        "one.weight", "one.bias", "two.bias",
    }  # fmt: skip
    again: Any = torch_folder.load(artifact)
    assert again.one.weight is again.two.weight


def test_the_model_that_is_written_stays_as_it_is(factory: Path, tmp_path: Path) -> None:
    module = built(factory, "Residual")
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    for training in (True, False):
        module.train(training)
        written(module, factory, tmp_path / str(training), described("Residual", IMAGES))
        assert module.training is training
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())
    assert all(p.requires_grad for p in module.parameters())


def test_a_model_whose_outputs_are_no_numbers_comes_back(factory: Path, tmp_path: Path) -> None:
    module = built(factory, "NotANumber")
    nn.init.constant_(module.lin.bias, -9.0)
    artifact = written(module, factory, tmp_path / "m", described("NotANumber"))
    assert outputs(torch_folder.load(artifact), X)[0].isnan().any()


def test_a_model_can_be_loaded_where_no_gradients_are(factory: Path, tmp_path: Path) -> None:
    artifact = written(built(factory, "Tied"), factory, tmp_path / "m", described("Tied"))
    with torch.inference_mode():
        module = torch_folder.load(artifact)
    assert not any(p.is_inference() for p in module.parameters())


def test_a_factory_of_a_package_is_named_only(tmp_path: Path) -> None:
    module = nn.Linear(6, 3)
    description = Description(
        factory="torch.nn:Linear", arguments={"in_features": 6, "out_features": 3},
        inputs=(X,), outputs=(Y,),
    )  # fmt: skip
    torch_folder.write(module, description, None, tmp_path / "m")
    assert sorted(content(tmp_path / "m")) == ["model.json", "weights.safetensors"]
    assert torch_folder.reference_in(tmp_path / "m", description) == "torch.nn:Linear"
    assert torch_folder.factory_file(tmp_path / "m", description) is None


# --- what does not come back is refused


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Hidden", {"factor": 1.5}),
        ("Outputs", {"count": 2}),
        ("Outputs", {"dtype": torch.float64}),
        ("Random", {}),
    ],
)
def test_a_model_whose_state_hides_in_attributes_is_refused(
    factory: Path, tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    module = built(factory, name)
    for key, value in change.items():
        setattr(module, key, value)
    with refused(StageError, "outputs differ", hint="parameters and buffers"):
        written(module, factory, tmp_path / "m", described(name))


def test_a_buffer_that_is_not_saved_is_state_too(factory: Path, tmp_path: Path) -> None:
    module = built(factory, "Buffers")
    module.mask.fill_(True)
    module.ramp.mul_(2)
    with refused(StageError, "outputs differ", hint="parameters and buffers"):
        written(module, factory, tmp_path / "m", described("Buffers"))


def test_a_factory_that_imports_what_lies_beside_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "my_layers.py").write_text(
        "from torch import nn\ndef linear(): return nn.Linear(6, 3)"
    )
    factory = tmp_path / "models.py"
    factory.write_text("from my_layers import linear\ndef make(): return linear()")
    options = TakeOptions(factory=f"{factory}:make", inputs=(X,))
    with refused(StageError, factory, "'my_layers'", hint="into one file, or into a package"):
        take(options, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- an artifact, whole


OPENED_ELSEWHERE = """
import sys
from deploykit.formats import open_model, torch_folder
artifact = open_model(sys.argv[1])
torch_folder.load(artifact)
open_model(sys.argv[1])
print(artifact.sha256)
"""


def test_an_artifact_is_the_same_wherever_and_whenever_it_is_made(
    factory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stray `__pycache__` in the folder would change its digest, by place and by time."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    weights = tmp_path / "weights.pt"
    torch.save(built(factory, "Residual").state_dict(), weights)
    options = TakeOptions(factory=f"{factory}:Residual", weights=weights, inputs=(IMAGES,))
    one, other = (take(options, out=tmp_path / name) for name in ("one", "other"))
    assert one.sha256 == other.sha256
    one.path.rename(tmp_path / "moved")
    process = python(OPENED_ELSEWHERE, tmp_path / "moved")
    answer, errors = told(process)
    assert process.returncode == 0, errors
    assert answer.strip() == one.sha256
    assert sorted(content(tmp_path / "moved")) == [
        "artifact.json", "factory.py", "model.json", "weights.safetensors",
    ]  # fmt: skip
    assert store.read(tmp_path / "moved") is not None


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with refused(InputError, tmp_path, "model.json is missing", hint="file.py:factory"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "fact", "hint"),
    [
        ({"schema": "deploykit.torch/2"}, "'schema'", "correct this value"),
        ({"argments": {}}, "unknown key 'argments'", "did you mean 'arguments'?"),
        ({"edits": [["lin", True, ["x"]]]}, "'edits.0.2.0'", "correct this value"),
        ({"inputs": None}, "'inputs'", "correct this value"),
    ],
)
def test_a_bad_description_is_refused(
    tmp_path: Path, change: dict[str, Any], fact: str, hint: str
) -> None:
    plain = described("Hidden").model_dump(mode="json", by_alias=True)
    (tmp_path / "model.json").write_text(json.dumps({**plain, **change}))
    with refused(InputError, tmp_path / "model.json", fact, hint=hint):
        torch_folder.describe(tmp_path)


def test_a_description_comes_back(tmp_path: Path) -> None:
    description = described("Hidden", X, IMAGES, width=3).model_copy(
        update={"edits": (("stem.0", True, (1, 2)), ("head", False, ()))}
    )
    plain = description.model_dump(mode="json", by_alias=True)
    (tmp_path / "model.json").write_text(json.dumps(plain))
    assert torch_folder.describe(tmp_path) == description


def test_edits_that_do_not_fit_are_refused(factory: Path, tmp_path: Path) -> None:
    artifact = written(built(factory, "Hidden"), factory, tmp_path / "m", described("Hidden"))
    path = tmp_path / "m" / "model.json"
    path.write_text(path.read_text().replace('"edits": []', '"edits": [["no.such", true, [0]]]'))
    with refused(InputError, "edits do not fit", "factory.py:Hidden", hint="pruned with"):
        torch_folder.load(artifact)


# --- factories


@pytest.mark.parametrize(
    ("name", "arguments", "facts", "hint"),
    [
        ("fails", {"width": 3}, ["raises RuntimeError: no such width"], "{'width': 3}"),
        ("exits", {}, ["raises SystemExit: 0"], "by hand"),
        ("Residual", {"wdith": 3}, ["raises TypeError", "'wdith'"], "--model-args"),
        ("gives_nothing", {}, ["gives NoneType, not a torch.nn.Module"], "the model itself"),
        ("gives_class", {}, ["gives type, not a torch.nn.Module"], "the model itself"),
        ("residual", {}, ["no function 'residual'"], "did you mean 'Residual'?"),
    ],
)
def test_a_bad_factory_is_refused(
    factory: Path, name: str, arguments: dict[str, Any], facts: list[str], hint: str
) -> None:
    with refused(InputError, factory, *facts, hint=hint):
        torch_module.construct(f"{factory}:{name}", arguments)


def test_a_factory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with refused(InputError, tmp_path / "no.py", "no such file", hint="path/to/file.py:function"):
        torch_module.construct(f"{tmp_path / 'no.py'}:make", {})


# --- checkpoints


def linear() -> nn.Linear:
    return nn.Linear(6, 3)


STATE = linear().state_dict()


def saved(path: Path, state: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
@pytest.mark.parametrize("wrap", [dict, OrderedDict, lambda s: {"state_dict": dict(s), "epoch": 3}])
def test_a_state_dict_is_loaded(tmp_path: Path, name: str, wrap: Callable[[Any], Any]) -> None:
    state = {key: tensor.clone() for key, tensor in STATE.items()}
    safe = name.endswith(".safetensors")
    module = linear()
    checkpoint.load_weights(module, saved(tmp_path / name, state if safe else wrap(state)))
    assert all(torch.equal(module.state_dict()[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("kept", ["one.weight", "two.weight", None])
def test_a_shared_weight_may_come_under_either_name_or_both(
    factory: Path, tmp_path: Path, kept: str | None
) -> None:
    source, module = built(factory, "Tied"), torch_module.construct(f"{factory}:Tied", {})
    state = {k: v for k, v in source.state_dict().items() if kept in (None, k) or "bias" in k}
    assert len(state) == (4 if kept is None else 3)
    checkpoint.load_weights(module, saved(tmp_path / "w.pt", state))
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in module.state_dict().items())


def without(key: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in STATE.items() if k != key}


@pytest.mark.parametrize(
    ("state", "facts", "hint"),
    [
        (without("bias"), ["1 missing (bias)"], "or the factory that made it"),
        ({**STATE, "extra": STATE["bias"].clone()}, ["1 unknown (extra)"], "this model"),
        ({f"module.{k}": v for k, v in STATE.items()},
         ["2 missing (bias, weight)", "2 unknown (module.bias, module.weight)"], "this model"),
        ({}, ["2 missing (bias, weight)"], "this model"),
        (nn.Linear(6, 4).state_dict(), ["size mismatch for bias", "[4]"], "--model-args"),
        ({**STATE, "bias": torch.full((3,), torch.nan)}, ["'bias'", "NaN"], "sound checkpoint"),
        ({**STATE, "weight": torch.full((3, 6), torch.inf)}, ["'weight'", "infinite"], "sound"),
    ],
    ids=["missing", "unknown", "prefix", "empty", "shape", "nan", "inf"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_checkpoint_of_another_or_a_broken_model_is_refused(
    tmp_path: Path, name: str, state: dict[str, torch.Tensor], facts: list[str], hint: str
) -> None:
    path = saved(tmp_path / name, state)
    with refused(InputError, path, *facts, hint=hint):
        checkpoint.load_weights(linear(), path)


@pytest.mark.parametrize(
    "state",
    [
        [STATE["bias"]],
        {**STATE, "epoch": 3},
        {0: STATE["bias"]},
        {"state_dict": {"weight": 1}},
        {"model": STATE},
        3,
    ],
    ids=["list", "number inside", "keys", "nested", "another wrap", "number"],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, state: Any) -> None:
    path = saved(tmp_path / "w.pt", state)
    with refused(InputError, path, "not a state dict of tensors", hint="nothing else"):
        checkpoint.load_weights(linear(), path)


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["torch", "pickle", "in a state dict", "old torch"])
@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.safetensors"])
def test_a_pickle_is_never_run(tmp_path: Path, name: str, how: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / name
    payload = Payload(marker)
    if how == "torch":
        torch.save(payload, path)
    elif how == "pickle":
        path.write_bytes(pickle.dumps(payload))
    elif how == "in a state dict":
        torch.save({**STATE, "evil": payload}, path)
    else:
        torch.save({**STATE, "evil": payload}, path, _use_new_zipfile_serialization=False)
    with refused(InputError, path, hint=""):
        checkpoint.load_weights(linear(), path)
    assert not marker.exists()


def test_the_payload_of_that_test_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))  # noqa: S301
    assert (tmp_path / "marker").exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(linear(), tmp_path / "w.pt")
    with refused(
        InputError, tmp_path / "w.pt", "no plain state dict", hint="pickles are never run"
    ):
        checkpoint.load_weights(linear(), tmp_path / "w.pt")


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "no.safetensors", tmp_path):
        with refused(InputError, path, "no such checkpoint", hint="--weights"):
            checkpoint.load_weights(linear(), path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with refused(InputError, tmp_path / name, hint="save"):
        checkpoint.load_weights(linear(), tmp_path / name)


@settings(max_examples=100)
@given(st.data(), st.sampled_from(["w.safetensors", "w.pt"]))
def test_a_damaged_checkpoint_is_refused_or_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    path = saved(tmp_path_factory.getbasetemp() / name, STATE)
    damaged = bytearray(path.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged[: data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))])
    with fine_or_refused(path):
        checkpoint.load_weights(linear(), path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_safetensors_is_refused(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path / "w.safetensors", STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with refused(InputError, path, "not a safetensors file", hint="save it again"):
        checkpoint.load_weights(linear(), path)


# --- examples and outputs


def test_examples_fit_what_the_model_takes() -> None:
    specs = (
        TensorSpec(name="a", dtype="float16", shape=("batch", 3, "length")),
        TensorSpec(name="b", dtype="int64", shape=("batch", 100)),
        TensorSpec(name="c", dtype="bool", shape=(4, 5)),
    )
    a, b, c = torch_module.examples(specs, batch=2)
    assert [tuple(t.shape) for t in (a, b, c)] == [(2, 3, 1), (2, 100), (4, 5)]
    assert [s.misfit(t.numpy()) for s, t in zip(specs, (a, b, c), strict=True)] == [None] * 3
    assert set(b.unique().tolist()) == {0, 1}
    same, other = (torch_module.examples(specs, batch=2, seed=s)[0] for s in (0, 1))
    assert torch.equal(a, same)
    assert not torch.equal(a, other)


def test_outputs_become_a_flat_tuple() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    for given_outputs, want in (
        (one, (one,)),
        ((one, two), (one, two)),
        ([one, two], (one, two)),
        ({"b": two, "a": one}, (two, one)),
        (OrderedDict(z=one), (one,)),
        ((one, None), (one,)),
        ({"a": [one, (two,)]}, (one, two)),
    ):
        found = torch_module.output_tensors(given_outputs)
        assert [id(t) for t in found] == [id(t) for t in want]


@pytest.mark.parametrize("bad", [None, 1.0, "x", (), (None,)])
def test_other_outputs_are_refused(bad: object) -> None:
    with refused(InputError, f"the model gives {type(bad).__name__}", hint="wrap the model"):
        torch_module.output_tensors(bad)


def test_a_run_takes_arrays_in_the_order_of_the_inputs_and_leaves_them() -> None:
    class Minus(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            a -= b  # in place, on what it was given
            return a, b

    inputs = (X.model_copy(update={"name": "p"}), X.model_copy(update={"name": "q"}))
    feed = {"q": np.ones((2, 6), np.float32), "p": np.full((2, 6), 5, np.float32)}
    first, second = torch_module.run(Minus(), inputs, feed)
    assert (first[0, 0], second[0, 0], first.dtype) == (4, 1, np.float32)
    assert (feed["p"][0, 0], feed["q"][0, 0]) == (5, 1)
