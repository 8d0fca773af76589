from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from deploykit.errors import InputError
from deploykit.measure import BenchOptions
from deploykit.recipe import Recipe, read_recipe
from deploykit.values import TensorSpec, parse
from tests.conftest import ROOT
from tests.fixtures_core import refused

WHOLE = """
name = "whole"
[model]
factory = "code/model.py:make"
arguments = {width = 8}
weights = "weights.safetensors"
inputs = [{name = "x", dtype = "float32", shape = ["batch", 1, 28, 28]}]
outputs = ["logits"]
[data]
calibration = "data/calibration.npz"
evaluation = "../evaluation.npz"
train = "data.py:train"
train_samples = 5
[gates]
metric = "metric.py:score"
max_drop = 0.01
min_speedup = 1.2
[prune]
ratio = 0.3
ratios = {"stem.*" = 0.1}
[distill]
[export]
[quantize]
[bench]
backends = ["ort-cpu"]
[package]
name = "net"
"""
LEAST = """
name = "least"
[model]
path = "model.onnx"
[data]
calibration = "a.npz"
evaluation = "b.npz"
"""


def read(folder: Path, text: str) -> Recipe:
    (folder / "recipe.toml").write_text(text)
    return read_recipe(folder / "recipe.toml")


def changed(text: str, table: str, line: str) -> str:
    """The recipe with one more line in a table, "" for the top."""
    return f"{line}\n{text}" if not table else text.replace(f"[{table}]\n", f"[{table}]\n{line}\n")


# --- what is read


def test_a_whole_recipe_is_read(tmp_path: Path) -> None:
    recipe = read(tmp_path, WHOLE)
    assert recipe.name == "whole"
    assert recipe.model.arguments == {"width": 8}
    assert recipe.model.inputs == (
        TensorSpec(name="x", dtype="float32", shape=("batch", 1, 28, 28)),
    )
    assert recipe.data.train_samples == 5
    assert (recipe.gates.max_drop, recipe.gates.min_speedup) == (0.01, 1.2)
    assert recipe.prune is not None
    assert recipe.prune.ratios == {"stem.*": 0.1}
    assert recipe.distill is not None
    assert recipe.bench.backends == ("ort-cpu",)
    assert recipe.package.name == "net"


def test_a_stage_without_its_table_is_left_out(tmp_path: Path) -> None:
    recipe = read(tmp_path, LEAST)
    assert (recipe.prune, recipe.distill) == (None, None)
    assert recipe.gates.metric == "top1"
    assert (recipe.data.train, recipe.data.evaluation_samples) == (None, 0)


def test_a_factory_needs_no_inputs(tmp_path: Path) -> None:
    model = read(tmp_path, LEAST.replace('path = "model.onnx"', 'factory = "b:c"')).model
    assert (model.path, model.factory, model.inputs) == (None, "b:c", ())


def test_a_recipe_comes_back_from_plain_data(tmp_path: Path) -> None:
    for text in (WHOLE, LEAST):
        recipe = read(tmp_path, text)
        assert parse(Recipe, recipe.model_dump(mode="json"), "here") == recipe


def test_the_bench_table_takes_all_options_of_a_benchmark() -> None:
    assert set(Recipe.model_fields["bench"].annotation.model_fields) == {  # type: ignore[union-attr]
        *BenchOptions.model_fields, "backends",
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "recipes").glob("*.toml")))
def test_the_committed_recipes_are_sound(path: Path) -> None:
    recipe = read_recipe(path)
    for reference in (recipe.data.calibration, recipe.data.evaluation, recipe.data.train):
        assert reference is None or Path(reference).exists()


# --- paths


def test_paths_are_those_from_the_folder_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deep" / "recipes"
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(WHOLE)
    monkeypatch.chdir(tmp_path / "deep")
    for recipe in (read_recipe(folder / "recipe.toml"), read_recipe(Path("recipes/recipe.toml"))):
        assert recipe.model.factory == f"{folder / 'code' / 'model.py'}:make"
        assert recipe.model.weights == str(folder / "weights.safetensors")
        assert recipe.data.calibration == str(folder / "data" / "calibration.npz")
        assert recipe.data.evaluation == str(tmp_path / "deep" / "evaluation.npz")
        assert recipe.data.train == f"{folder / 'data.py'}:train"
        assert recipe.gates.metric == f"{folder / 'metric.py'}:score"


def test_absolute_paths_and_words_stay_as_they_are(tmp_path: Path) -> None:
    text = WHOLE.replace("code/model.py:make", "package.module:make")
    text = text.replace("data/calibration.npz", "/srv/x.npz").replace("data.py:", "/srv/data.py:")
    recipe = read(tmp_path, text.replace("metric.py:score", "top5"))
    assert recipe.model.factory == "package.module:make"
    assert recipe.data.calibration == "/srv/x.npz"
    assert recipe.data.train == "/srv/data.py:train"
    assert recipe.gates.metric == "top5"
    assert read(tmp_path, LEAST).model.path == str(tmp_path / "model.onnx")


# --- unknown keys


def nested(kind: type[BaseModel], place: str = "") -> list[tuple[str, str]]:
    """Every table of a recipe and one of its keys, for each field of it that is a table too."""
    found = [(place, next(iter(kind.model_fields)))]
    for name, field in kind.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for inner in kinds:
            if isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not TensorSpec:
                found += nested(inner, f"{place}.{name}".strip("."))
    return found


@pytest.mark.parametrize(("table", "key"), nested(Recipe))
def test_an_unknown_key_is_refused_in_every_table(tmp_path: Path, table: str, key: str) -> None:
    wrong = f"{key}x"
    place = f"{table}.{wrong}".strip(".")
    text = changed(WHOLE, table, f"{wrong} = 1")
    assert place.split(".")[-1] in text
    with refused(InputError, tmp_path / "recipe.toml", f"{place!r}", hint=f"did you mean {key!r}?"):
        read(tmp_path, text)


def test_an_unknown_key_of_an_input_is_refused(tmp_path: Path) -> None:
    text = WHOLE.replace('name = "x", ', 'name = "x", shap = [1], ')
    with refused(InputError, "'model.inputs.0.shap'", hint="did you mean 'shape'?"):
        read(tmp_path, text)


def test_an_unknown_table_is_refused(tmp_path: Path) -> None:
    with refused(InputError, "'quantise'", hint="did you mean 'quantize'?"):
        read(tmp_path, f"{LEAST}[quantise]\n")
    with refused(InputError, "'zzz'", hint="known: bench, data, distill, export, gates"):
        read(tmp_path, f"{LEAST}[zzz]\n")


# --- values


@pytest.mark.parametrize(
    ("old", "new", "facts", "hint"),
    [
        ('name = "least"\n', "", ["'name' is missing"], "add 'name'"),
        ('evaluation = "b.npz"\n', "", ["'data.evaluation' is missing"], "add 'evaluation'"),
        ('path = "model.onnx"', "", ["'model'", "either 'path' or 'factory'"], "correct"),
        ('path = "model.onnx"', 'path = "a"\nfactory = "b:c"', ["either 'path' or"], "correct"),
        ("[data]", "[prune]\nratio = 0.3\n[data]", ["PyTorch model, this one is ONNX"], "correct"),
        ("[data]", "[distill]\n[data]\ntrain = 't'", ["this one is ONNX"], "correct"),
        ('"model.onnx"', '"folder"\n[prune]\nspeedup = "2x"\ntarget = "openvino"',
         ["[prune] is for openvino and [quantize] for ort-cpu"], "correct"),
        ('"model.onnx"', '"folder"\n[distill]', ["[distill] needs 'train'"], "correct"),
        ('"model.onnx"', "5", ["'model.path'", "got 5"], "correct this value"),
        ("[model]\npath", "model", ["'model'", "got 'model.onnx'"], "correct this value"),
        ("[data]", "[gates]\nmax_drop = -1\n[data]", ["'gates.max_drop'", "got -1"], "correct"),
        ("[data]", "[gates]\nmin_speedup = 0\n[data]", ["'gates.min_speedup'"], "correct"),
        ("[data]", "[data]\ntrain_samples = -1", ["'data.train_samples'", "got -1"], "correct"),
        ("[data]", "[gates]\nmetric = 'top2'\n[data]", ["'gates.metric'", "'top2', did you"], ""),
        ("[data]", "[bench]\nbackends = ['ort']\n[data]", ["'ort'", "did you mean 'ort-cpu'"], ""),
        ("[data]", "[bench]\npreset = 'fast'\n[data]", ["'bench.preset'", "got 'fast'"], "correct"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_with_its_place(
    tmp_path: Path, old: str, new: str, facts: list[str], hint: str
) -> None:
    assert LEAST.count(old) == 1
    with refused(InputError, tmp_path / "recipe.toml", *facts, hint=hint):
        read(tmp_path, LEAST.replace(old, new))


@pytest.mark.parametrize("dtype", ["flaot32", "bfloat16", "", "object"])
def test_an_input_is_of_a_dtype_that_numpy_knows(tmp_path: Path, dtype: str) -> None:
    with refused(InputError, "'model'", f"unknown name {dtype!r}", hint="correct this value"):
        read(tmp_path, WHOLE.replace('"float32"', f'"{dtype}"'))


@pytest.mark.parametrize(
    ("data", "fact"),
    [(b"name = ", "Invalid value"), (b"\xff", "utf-8"), (b"a = 1\na = 2", "Cannot overwrite")],
)
def test_what_is_no_toml_is_refused(tmp_path: Path, data: bytes, fact: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(data)
    with refused(InputError, path, fact, hint="a recipe in TOML"):
        read_recipe(path)


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path, fact in ((tmp_path / "no.toml", "No such file"), (tmp_path, "directory")):
        with refused(InputError, path, fact, hint="a recipe in TOML"):
            read_recipe(path)


def test_paths_of_a_wrong_type_are_left_to_the_check(tmp_path: Path) -> None:
    broken: dict[str, Any] = tomllib.loads(LEAST)
    assert broken["data"]["calibration"] == "a.npz"
    with refused(InputError, "'data.calibration'", "got 7", hint="correct this value"):
        read(tmp_path, LEAST.replace('"a.npz"', "7"))
