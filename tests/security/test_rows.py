"""Every row of SECURITY.md has its tests, here or elsewhere, with the exit code that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import deploykit
from tests.conftest import ROOT
from tests.security import test_bundles, test_data, test_models
from tests.security.conftest import Case

PAGE = (Path(deploykit.__file__).parent / "SECURITY.md").read_text()
ROWS = {
    int(row): {int(code) for code in codes.split(",")}
    for row, codes in re.findall(r"^\| (\d+) \| [^|]+ \| ([\d, ]+) \|", PAGE, re.MULTILINE)
}
CASES = [
    *test_models.CHECKPOINTS, *test_models.MODELS, *test_models.ODD, *test_data.CASES,
    *test_bundles.CASES,
]  # fmt: skip
FAULTS = [*test_bundles.FAULTS, *test_bundles.IMAGES]
ELSEWHERE = {
    17: [
        "tests/test_pipeline.py::test_a_gate_that_fails_is_an_honest_no",
        "tests/cli/test_commands.py::test_a_promise_that_cannot_be_kept_is_a_no_and_writes_nothing",
    ],
    23: [
        "tests/security/test_kills.py::test_a_stage",
        "tests/security/test_kills.py::test_bench",
        "tests/security/test_kills.py::test_package",
        "tests/security/test_kills.py::test_run",
        "tests/security/test_kills.py::test_sign",
        "tests/security/test_kills.py::test_the_repository",
        "tests/test_store.py::test_a_kill_before_any_step_leaves_old_or_new_with_its_record",
    ],
    24: [
        "tests/security/test_faults.py::test_a_full_disk",
        "tests/cli/test_bad_input.py::test_a_full_disk",
    ],
    25: [
        "tests/security/test_faults.py::test_of_many_processes_one_builds_and_all_read_it_whole",
        "tests/security/test_faults.py::test_the_lock_of_a_killed_builder_is_free",
        "tests/test_locks.py::test_who_waits_too_long_is_told_for_whom",
    ],
    26: ["tests/security/test_faults.py::test_a_calibration_cache_that_went_bad_is_made_again"],
    29: [
        "tests/bundle/test_serving_page.py::test_the_server_of_the_page",
        "tests/bundle/test_real_server.py::test_it_serves_what_is_published_and_nothing_worse",
    ],
    30: [
        "tests/measure/test_bench.py::test_what_went_wrong_is_the_reason_that_voids_a_measurement",
        "tests/measure/test_bench.py::test_a_hang_is_stopped_at_once_and_costs_the_others_nothing",
    ],
}  # fmt: skip


def test_all_thirty_rows_have_tests() -> None:
    assert list(ROWS) == list(range(1, 31))
    assert {case.row for case in (*CASES, *FAULTS)} | set(ELSEWHERE) == set(ROWS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_case_has_the_code_of_its_row(case: Case) -> None:
    assert case.code in ROWS[case.row]


def test_what_is_damaged_has_the_code_of_integrity() -> None:
    assert all(ROWS[fault.row] == {5} for fault in FAULTS)


@pytest.mark.parametrize("name", [name for names in ELSEWHERE.values() for name in names])
def test_the_tests_of_other_rooms_are_there(name: str) -> None:
    path, _, function = name.partition("::")
    assert f"def {function}(" in (ROOT / path).read_text()
