"""What each node costs, and what leaving nodes in float gives, on real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploykit.dataset import Dataset
from deploykit.errors import InputError, UsageError
from deploykit.stages.quantize import QuantizeOptions, quantize
from deploykit.stages.quantize.gain import keep_float, probed
from deploykit.values import Artifact, Json
from tests.fixtures_core import refused
from tests.stages.quantize.test_search import float_names, planted, promised

PROBING = QuantizeOptions(
    calibration_method="minmax", scope="compute", calibration_samples=64, node_damage=True
)


@pytest.fixture(scope="module")
def told(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    out = tmp_path_factory.mktemp("told") / "q.onnx"
    return quantize(teacher_onnx, PROBING, data=calibration, out=out)


def test_each_node_has_its_damage_its_cosine_and_its_times(told: Artifact) -> None:
    found = told.facts["search"]
    rows = found["damage"]
    assert len(rows) == told.facts["compute_nodes_quantized"] == 14
    assert [row["sqnr_db"] for row in rows] == sorted(row["sqnr_db"] for row in rows)
    assert sum(row["multiply_accumulates"] for row in rows) == told.facts["multiply_accumulates"]
    for row in rows:
        assert 0.999 < row["cosine"] <= 1
        assert row["sqnr_db"] > row["sqnr_db_if_float"] - 3
        assert row["float_us"] > 0
        assert row["quantized_us"] > 0
    whole = found["probe"]
    for name in ("float_us", "quantized_us"):
        assert sum(row[name] for row in rows) <= whole[f"{name}_in_all"]
    assert whole["samples"] == 8
    assert 0.999 < whole["cosine"] < min(row["cosine"] for row in rows) + 1e-4


@pytest.mark.parametrize("which", [max, min], ids=["most", "least"])
def test_the_gain_told_is_the_gain_that_comes(
    which: Any, told: Artifact, teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    """Alone, the worst node is another: with it in float, its input stays rounded all the same."""
    rows = told.facts["search"]["damage"]
    node = which(rows, key=lambda row: row["sqnr_db_if_float"])["node"]
    gain = keep_float(told.facts, [node])
    assert gain["measured"]
    options = PROBING.model_copy(update={"keep_float": (node,)})
    made = quantize(teacher_onnx, options, data=calibration, out=tmp_path / "q.onnx")
    assert float_names(made.facts)[node] == "left out by request"
    assert made.facts["search"]["probe"]["sqnr_db"] == pytest.approx(
        gain["sqnr_db_if_float"], abs=0.05
    )
    back = told.facts["multiply_accumulates"] - made.facts["multiply_accumulates_quantized"]
    assert gain["multiply_accumulates"] == back


def test_of_several_nodes_the_best_is_told_and_not_as_measured(told: Artifact) -> None:
    rows = told.facts["search"]["damage"]
    gain = keep_float(told.facts, ["node_Conv_19*", "node_linear"])
    named = [row for row in rows if row["node"] in gain["nodes"]]
    assert len(named) == 6
    assert gain["sqnr_db_if_float"] == max(row["sqnr_db_if_float"] for row in named)
    assert not gain["measured"]
    assert gain["extra_us"] == pytest.approx(sum(r["float_us"] - r["quantized_us"] for r in named))


def test_a_module_stands_for_its_nodes(
    told: Artifact, teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    gain = keep_float(told.facts, ["layers.4"])
    assert len(gain["nodes"]) == 2
    options = PROBING.model_copy(update={"keep_float": ("layers.4",), "node_damage": False})
    made = quantize(teacher_onnx, options, data=calibration, out=tmp_path / "q.onnx")
    left = {n for n, why in float_names(made.facts).items() if why == "left out by request"}
    assert left >= set(gain["nodes"])
    assert made.facts["compute_nodes_quantized"] == 12
    with refused(UsageError, "no node or module matches 'layer.4'", hint="did you mean 'layers.4'"):
        quantize(
            teacher_onnx, PROBING.model_copy(update={"keep_float": ("layer.4",)}),
            data=calibration, out=tmp_path / "p.onnx",
        )  # fmt: skip


def test_a_time_that_is_not_known_is_not_guessed(told: Artifact) -> None:
    facts: Json = {**told.facts, "search": {**told.facts["search"]}}
    rows = [{**row, "float_us": None} for row in facts["search"]["damage"][:1]]
    facts["search"]["damage"] = rows + facts["search"]["damage"][1:]
    assert keep_float(facts, ["*"])["extra_us"] is None


def test_a_node_in_float_by_measurement_gains_nothing(tmp_path: Path) -> None:
    source, data = planted(tmp_path)
    options = PROBING.model_copy(update={"processor": "vnni"})
    made = quantize(
        source, options, data=data, out=tmp_path / "q.onnx", promise=promised(tmp_path, 0.01)
    )
    rows = {row["node"]: row for row in made.facts["search"]["damage"]}
    assert rows["bad"]["sqnr_db_if_float"] is None
    assert rows["bad"]["sqnr_db"] < 5 < made.facts["search"]["probe"]["sqnr_db"]
    gain = keep_float(made.facts, ["bad"])
    assert (gain["nodes"], gain["in_float_already"]) == ([], ["bad"])
    assert (gain["sqnr_db_if_float"], gain["multiply_accumulates"]) == (None, 0)


def test_a_pattern_for_no_node_and_a_record_without_damage(
    told: Artifact, teacher_int8: Artifact
) -> None:
    with refused(
        UsageError, "no quantized node or module matches 'node_liner'", hint="'node_linear'"
    ):
        keep_float(told.facts, ["node_linear", "node_liner"])
    assert probed(told) == told.facts
    for artifact in (teacher_int8, teacher_int8.model_copy(update={"history": ()})):
        with refused(InputError, artifact.path, "what each node costs", hint="--node-damage"):
            probed(artifact)


def test_both_names_of_the_option_say_the_same() -> None:
    one = QuantizeOptions.model_validate({"keep_float": ["a*"]})
    assert one == QuantizeOptions.model_validate({"nodes_to_exclude": ["a*"]})
    assert one == QuantizeOptions(nodes_to_exclude=("a*",))  # type: ignore[call-arg]
