"""Plans of recipes that begin with a finished model; those with a factory are in test_pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from deploykit.errors import InputError, IntegrityError
from deploykit.plan import data, describe, plan
from deploykit.recipe import Recipe
from deploykit.values import Artifact, parse
from tests.conftest import FACTORY, FASHION, TEACHER
from tests.fixtures_core import refused


def recipe(model: dict[str, object], **tables: object) -> Recipe:
    plain: dict[str, object] = {
        "name": "r",
        "model": model,
        "data": {
            "calibration": str(FASHION / "calibration.npz"),
            "evaluation": str(FASHION / "evaluation.npz"),
            "train": str(FASHION / "train.npz"),
            "train_samples": 96,
            "evaluation_samples": 200,
        },
    }
    return parse(Recipe, {**plain, **tables}, "here")


def progress(done: int, total: int, text: str) -> None:
    del text
    assert 0 <= done <= total


def ways(recipe: Recipe) -> list[tuple[str, str, str | None]]:
    return [(step.name, step.stage, step.source) for step in plan(recipe)]


# --- an ONNX model


def test_an_onnx_model_is_the_baseline_as_it_is(teacher_onnx: Artifact, tmp_path: Path) -> None:
    given = recipe({"path": str(teacher_onnx.path)})
    assert ways(given) == [
        ("model.fp32.onnx", "take", None), ("model.int8.onnx", "quantize", "model.fp32.onnx"),
    ]  # fmt: skip
    small = recipe({"path": str(teacher_onnx.path)}, quantize={"precision": "int4"})
    assert ways(small)[1][0] == "model.int4.onnx"
    first = plan(given)[0].make({}, tmp_path / "out", progress)
    assert first == teacher_onnx
    assert not list(tmp_path.iterdir())


def test_an_onnx_model_is_quantized_from_where_it_lies(
    teacher_onnx: Artifact, tmp_path: Path
) -> None:
    step = plan(recipe({"path": str(teacher_onnx.path)}))[1]
    made = step.make({"model.fp32.onnx": teacher_onnx}, tmp_path / "int8.onnx", progress)
    assert (made.path, made.precision) == (tmp_path / "int8.onnx", "int8")
    assert made.history[-1].inputs["source"] == teacher_onnx.sha256


# --- a torch folder


def test_a_torch_folder_is_exported_first(teacher: Artifact, tmp_path: Path) -> None:
    given = recipe({"path": str(teacher.path)})
    assert ways(given) == [
        ("model", "take", None),
        ("model.fp32.onnx", "export", "model"),
        ("model.int8.onnx", "quantize", "model.fp32.onnx"),
    ]
    first, export = plan(given)[:2]
    assert first.make({}, tmp_path / "out", progress) == teacher
    assert not list(tmp_path.iterdir())
    made = export.make({"model": teacher}, tmp_path / "m.onnx", progress)
    assert made.facts["verified_on"] == "evaluation.npz"
    assert [record.stage for record in made.history] == ["take", "export"]


def test_what_is_pruned_or_distilled_has_a_way_of_its_own(teacher: Artifact) -> None:
    model: dict[str, object] = {"path": str(teacher.path)}
    base = ways(recipe(model))
    pruned = ("pruned", "prune", "model")
    assert ways(recipe(model, prune={"ratio": 0.3}))[3:] == [
        pruned, ("pruned.fp32.onnx", "export", "pruned"),
        ("pruned.int8.onnx", "quantize", "pruned.fp32.onnx"),
    ]  # fmt: skip
    assert ways(recipe(model, distill={}))[3:] == [
        ("distilled", "distill", "model"), ("distilled.fp32.onnx", "export", "distilled"),
        ("distilled.int8.onnx", "quantize", "distilled.fp32.onnx"),
    ]  # fmt: skip
    both = ways(recipe(model, prune={"ratio": 0.3}, distill={}))
    assert both[:5] == [*base, pruned, ("distilled", "distill", "pruned")]
    assert len(both) == 7


def test_a_pruned_model_is_distilled_from_the_one_that_was_given(
    teacher: Artifact, tmp_path: Path
) -> None:
    steps = plan(recipe({"path": str(teacher.path)}, prune={"ratio": 0.3}, distill={"epochs": 1}))
    prune, distill = (next(s for s in steps if s.name == name) for name in ("pruned", "distilled"))
    student = prune.make({"model": teacher}, tmp_path / "pruned", progress)
    assert student.history[-1].options["ratio"] == 0.3
    seen: list[int] = []
    made = distill.make(
        {"model": teacher, "pruned": student},
        tmp_path / "distilled",
        lambda done, total, text: seen.append(done),
    )
    record = made.history[-1]
    assert (record.inputs["source"], record.inputs["teacher"]) == (student.sha256, teacher.sha256)
    assert record.options["epochs"] == 1
    assert seen


# --- a factory


def test_a_factory_without_inputs_takes_what_the_calibration_data_holds(tmp_path: Path) -> None:
    given = recipe({"factory": FACTORY, "weights": str(TEACHER), "outputs": ["logits"]})
    made = plan(given)[0].make({}, tmp_path / "model", progress)
    assert [str(s) for s in made.inputs] == ["images: float32[batch, 1, 28, 28]"]
    assert [str(s) for s in made.outputs] == ["logits: float32[batch, 10]"]


# --- what cannot be planned


def test_a_plan_of_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path, fact in ((tmp_path / "no.onnx", "no such model"), (tmp_path, "model.json")):
        with refused(InputError, path, fact, hint="file.py:factory"):
            plan(recipe({"path": str(path)}))


def test_a_plan_of_a_model_that_was_changed_is_refused(teacher: Artifact, tmp_path: Path) -> None:
    copy = tmp_path / "teacher"
    shutil.copytree(teacher.path, copy)
    (copy / "factory.py").write_text("")
    with refused(IntegrityError, copy, "not the file that its record", hint="make it again"):
        plan(recipe({"path": str(copy)}))


# --- data and words


@pytest.mark.parametrize(("role", "want"), [("train", 96), ("evaluation", 200)])
def test_of_the_data_as_many_samples_are_used_as_are_asked_for(role: str, want: int) -> None:
    given = recipe({"factory": "a:b"})
    assert len(data(given, role)) == want
    whole = given.data.model_copy(update={f"{role}_samples": 0})
    assert len(data(given.model_copy(update={"data": whole}), role)) > 9_999


def test_calibration_data_is_used_whole() -> None:
    assert len(data(recipe({"factory": "a:b"}), "calibration")) == 512


def test_a_plan_is_told_with_what_was_asked_for(teacher: Artifact) -> None:
    tables: dict[str, Any] = {
        "prune": {"ratio": 0.25},
        "gates": {"max_drop": 0.02, "min_speedup": 1.5},
        "bench": {"preset": "quick", "batch_sizes": [1, 8], "backends": ["ort-cpu"]},
    }
    told = dict(describe(recipe({"path": str(teacher.path)}, **tables)))
    assert told["model"] == "take (defaults), then evaluate"
    assert told["model.fp32.onnx"] == "export from model (defaults), then evaluate"
    assert told["pruned"] == "prune from model (ratio 0.25), then evaluate"
    assert told["bench"] == "quick, batch 1, 8, on ort-cpu"
    assert told["verdict"].startswith("top1 drop <= 0.02, speed-up > 1.5 ")
    assert list(told)[-3:] == ["bench", "verdict", "bundle"]
