"""The self-test: what does not hang on the clock is asserted, what does has its truth beside it."""

from __future__ import annotations

import numpy as np
import pytest

from deploykit.measure import BenchOptions, selftest
from deploykit.measure.selftest import CASES, Case, self_test


@pytest.fixture(scope="module")
def found():
    """One run of few blocks."""
    with pytest.MonkeyPatch.context() as patch:
        options = {"processes": 1, "blocks": 15, "block_ms": 40, "max_seconds": 3}
        patch.setattr(selftest, "OPTIONS", selftest.OPTIONS.model_copy(update=options))
        return {check.behaviour: check for check in self_test().checks}


VOID = {
    "drift": "not steady after",
    "wrong output": "output 'y' is wrong",
    "output that changes": "output 'y' changed",
    "NaN": "NaN or infinite",
    "another provider": "ran 60% on cpu",
    "another precision": "no operator ran in it",
    "crash": "signal 11",
    "hang": "no answer in",
    "lost completion": "no answer in",
}


@pytest.mark.parametrize("behaviour", VOID)
def test_what_is_broken_is_void_for_its_own_reason(found, behaviour):
    check = found[behaviour]
    late = behaviour == "drift" and "no answer in" in check.found  # seen late on a busy machine
    assert VOID[behaviour] in check.found or late
    assert check.passed


def test_every_case_has_an_answer_and_the_broken_cost_the_others_nothing(found):
    assert [*found] == [case.behaviour for case in CASES]
    timed = [check for name, check in found.items() if name not in VOID]
    assert len(timed) == 6
    assert not any("INVALID" in check.found for check in timed)


def test_a_bench_that_is_wrong_fails(measured):
    """The looks themselves, on times of another truth."""
    rng = np.random.default_rng(0)
    wrong = measured(rng.normal(1.3e6, 1e4, (20, 30)))
    look = selftest._percentiles(p50=1.0)
    assert look(None, wrong) == ("p50 1.300 ms", False)
    assert look(None, measured(rng.normal(1.02e6, 1e4, (20, 30))))[1]
    assert selftest._invalid(None, wrong) == ("valid", False)


def test_the_options_are_those_of_a_bench():
    assert isinstance(selftest.OPTIONS, BenchOptions)
    assert all(isinstance(case, Case) for case in CASES)
