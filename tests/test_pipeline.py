"""The whole way on a small slice of the real recipe: once, again, and with one option changed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from deploykit import _files, pipeline, verify
from deploykit._locks import held
from deploykit.errors import InputError, UsageError
from deploykit.formats import open_model
from deploykit.measure import statistics
from deploykit.pipeline import run
from deploykit.plan import describe, plan
from deploykit.recipe import Recipe, read_recipe
from deploykit.values import Value
from tests.conftest import ROOT

STEPS = [
    "model", "model.fp32.onnx", "model.int8.onnx", "pruned", "distilled", "distilled.fp32.onnx",
    "distilled.int8.onnx",
]  # fmt: skip


class Watcher:
    """An Observer that remembers."""

    def __init__(self) -> None:
        self.ended: dict[str, bool] = {}
        self._label = ""

    def step(self, name: str, what: str) -> None:
        self._label = f"{name}: {what}"

    def progress(self, done: int, total: int, text: str = "") -> None:
        assert 0 <= done <= total

    def done(self, text: str, *, cached: bool) -> None:
        self.ended[self._label] = cached

    @property
    def worked(self) -> set[str]:
        return {label for label, cached in self.ended.items() if not cached}


def _with(value: Value, **changes: object) -> Value:
    return value.model_copy(update=changes)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """The real recipe: 2,000 training images, 1,000 test images, and loose gates."""
    full = read_recipe(ROOT / "benchmarks" / "recipes" / "fashion_mnist.toml")
    return full.model_copy(
        update={
            "data": _with(full.data, train_samples=2000, evaluation_samples=1000),
            "gates": _with(full.gates, max_drop=0.1, min_speedup=0.05),
            "distill": _with(full.distill, epochs=1),
            "bench": _with(full.bench, processes=1, blocks=15, block_ms=20.0),
        }
    )


@pytest.fixture(scope="module")
def out(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    watcher = Watcher()
    run(recipe, out=folder, observer=watcher)
    assert not any(watcher.ended.values())
    return folder


def test_the_plan_is_the_way_of_the_model(recipe: Recipe) -> None:
    assert [step.name for step in plan(recipe)] == STEPS
    bare = recipe.model_copy(update={"prune": None, "distill": None})
    assert [step.name for step in plan(bare)] == STEPS[:3]
    assert [name for name, _ in describe(recipe)] == [*STEPS, "bench", "verdict", "bundle"]


def test_every_arrow_is_evaluated_and_every_leaf_benched(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text())
    rows = {(row["name"], row["backend"]): row for row in summary["rows"]}
    assert {name for name, _ in rows} == set(STEPS)
    for (name, backend), row in rows.items():
        assert row["score"]["low"] < row["score"]["value"] < row["score"]["high"]
        benched = row["p50_ms"] is not None
        assert benched == (name == "model" or name.endswith(".onnx")), (name, backend)
    base = rows["model.fp32.onnx", "ort-cpu"]
    assert base["over_fp32_onnx"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    ship = summary["verdict"]["ship"]
    assert ship, summary["verdict"]["reason"]
    winner = rows[ship, "ort-cpu"]
    assert winner["ran"]["int8"] > 0 or winner["precision"] == "fp32"
    assert rows["model.int8.onnx", "ort-cpu"]["size_bytes"] * 3 < base["size_bytes"]


def test_the_reports_agree(out: Path) -> None:
    summary = json.loads((out / "summary.json").read_text())
    for name in ("summary.md", "report.html"):
        text = (out / name).read_text()
        assert summary["verdict"]["ship"] in text
        assert "http" not in text.replace("http://www.w3.org", "").split("<metadata>")[0]
    assert (out / "report.html").read_text().count("<svg") == 2


def test_the_bundle_verifies(out: Path) -> None:
    verify(out / "bundle")


def test_a_second_run_repeats_nothing(recipe: Recipe, out: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.onnx")}
    watcher = Watcher()
    run(recipe, out=out, observer=watcher)
    assert not watcher.worked
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.onnx")} == before


def test_a_changed_option_repeats_only_what_depends_on_it(
    recipe: Recipe, out: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    changed = recipe.model_copy(update={"quantize": _with(recipe.quantize, calibration_samples=64)})
    watcher = Watcher()
    run(changed, out=copy, observer=watcher)
    assert watcher.worked == {
        "model.int8.onnx: quantize",
        "model.int8.onnx: evaluate on ort-cpu",
        "model.int8.onnx: evaluate on openvino",
        "distilled.int8.onnx: quantize",
        "distilled.int8.onnx: evaluate on ort-cpu",
        "distilled.int8.onnx: evaluate on openvino",
        "bench: 9 engines",
        "bundle: package",
    }


def test_a_gate_that_fails_is_an_honest_no(recipe: Recipe, out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    strict = recipe.model_copy(update={"gates": _with(recipe.gates, min_speedup=1000.0)})
    verdict = run(strict, out=copy).verdict
    assert verdict.ship is None
    assert re.match(r"the nearest is .*needed above 1000", verdict.reason)
    assert not (copy / "bundle").exists()
    assert json.loads((copy / "summary.json").read_text())["verdict"]["ship"] is None


def test_a_torn_result_is_made_again(recipe: Recipe, out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    victim = copy / "work" / "model.int8.onnx"
    victim.write_bytes(victim.read_bytes()[:1000])
    watcher = Watcher()
    run(recipe, out=copy, observer=watcher)
    assert "model.int8.onnx: quantize" in watcher.worked
    assert victim.stat().st_size > 1000


def test_a_damaged_bundle_is_packed_again(recipe: Recipe, out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    (copy / "bundle" / "golden_inputs.npz").write_bytes(b"torn")
    watcher = Watcher()
    run(recipe, out=copy, observer=watcher)
    assert watcher.worked == {"bundle: package"}
    verify(copy / "bundle")


def test_a_folder_in_use_is_left_alone(recipe: Recipe, out: Path) -> None:
    with held(out), pytest.raises(UsageError, match="in use by another run"):
        run(recipe, out=out)


def test_a_benchmark_without_a_baseline_is_not_kept(
    recipe: Recipe, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "out"
    shutil.copytree(out, copy)

    def broken(*_: object) -> None:
        raise InputError("the control is invalid", hint="measure again")

    monkeypatch.setattr(statistics, "noise_floor", broken)
    with pytest.raises(InputError, match="control is invalid"):
        run(recipe, out=copy)
    assert not (copy / "bench.json").exists()


def test_a_foreign_folder_is_not_written_into(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("four years")
    with pytest.raises(UsageError, match="no folder of an earlier run"):
        run(recipe, out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_tensorrt_is_no_target_of_a_run_here(recipe: Recipe, tmp_path: Path) -> None:
    asked = recipe.model_copy(update={"quantize": _with(recipe.quantize, target="tensorrt")})
    with pytest.raises(UsageError, match="tensorrt models do not run here"):
        run(asked, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_version_rises_with_another_model_and_only_then(recipe: Recipe, out: Path) -> None:
    memory = out / "work" / "bundle.json"
    last = json.loads(memory.read_text())["value"]
    (served,) = [entry["sha256"] for entry in last["files"] if entry["role"] == "model"]
    shipped = next(a for a in (out / "work").glob("*.onnx") if _files.sha256(a) == served)
    artifact = open_model(shipped)
    state = pipeline.Run(recipe, out, pipeline._Silent())
    assert pipeline._package_options(state, artifact, memory).version == last["version"] == 1
    other = artifact.model_copy(update={"sha256": "0" * 64})
    assert pipeline._package_options(state, other, memory).version == 2
    assert pipeline._package_options(state, other, out / "nothing.json").version == 1
    state.recipe = recipe.model_copy(update={"bench": _with(recipe.bench, threads=2)})
    assert pipeline._package_options(state, artifact, memory).threads == 2
