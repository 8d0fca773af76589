from __future__ import annotations

import json

import pytest

from deploykit import environment
from deploykit.errors import InputError, UsageError
from deploykit.measure import BenchOptions, BenchResult, read_result, write_result
from deploykit.measure.result import PRESETS


@pytest.fixture
def result(measured):
    return BenchResult(
        baseline="a",
        control="a (again)",
        measurements=(
            measured([[1, 2], [3]], name="a").model_copy(update={"cosines": {"y": float("nan")}}),
            measured([[4]], name="a", batch_size=8, invalid="it crashed"),
        ),
        options=BenchOptions(batch_sizes=(1, 8), seed=7),
        inputs="random",
        data_digest=None,
        environment=environment.read(),
        load_average_after=0.5,
        steal_share=None,
        notes=("inputs are random",),
    )


def test_a_result_survives_the_disk(result, tmp_path):
    path = tmp_path / "bench.json"
    write_result(result, path)
    again = read_result(path)
    assert repr(again) == repr(result)  # NaN is not equal to itself
    assert json.loads(path.read_text())["schema"] == "deploykit.bench/1"


def test_a_result_of_another_schema_is_refused(result, tmp_path):
    path = tmp_path / "bench.json"
    write_result(result, path)
    path.write_text(path.read_text().replace("deploykit.bench/1", "deploykit.bench/2"))
    with pytest.raises(InputError, match="schema"):
        read_result(path)


def test_a_measurement_is_found_by_name_and_batch_size(result):
    assert result.of("a", 8).invalid == "it crashed"
    with pytest.raises(UsageError, match="'b' at batch size 1"):
        result.of("b", 1)
    with pytest.raises(UsageError, match="batch size 2"):
        result.of("a", 2)


def test_what_is_given_takes_the_place_of_the_presets():
    options = BenchOptions(preset="quick", block_ms=7)
    assert options.effort == PRESETS["quick"]._replace(block_ms=7)


@pytest.mark.parametrize(("preset", "seconds"), [("quick", 10), ("standard", 60), ("full", 600)])
def test_a_preset_takes_about_the_time_it_says(preset, seconds):
    effort = PRESETS[preset]
    timed = effort.blocks * effort.block_ms * 1.1
    around = effort.processes * (effort.warmup_ms + 800)  # a process that loads a small model
    assert 0.5 * seconds < 3 * (timed + around) / 1e3 <= 1.25 * seconds


def test_every_option_is_described_for_the_command_line():
    assert all(field.description for field in BenchOptions.model_fields.values())


@pytest.mark.parametrize("wrong", [{"blocks": 14}, {"batch_sizes": (0,)}, {"batch_sizes": ()}])
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BenchOptions(**wrong)
