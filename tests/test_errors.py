from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit import errors
from deploykit.errors import DeploykitError, did_you_mean

KINDS = {
    errors.UsageError: 2,
    errors.InputError: 3,
    errors.StageError: 3,
    errors.MissingError: 4,
    errors.IntegrityError: 5,
    errors.ResourceError: 6,
    errors.AnswerIsNo: 7,
    errors.NotWorthIt: 7,
}
WORDS = st.text("abcdefgh_", min_size=4, max_size=12)


@pytest.mark.parametrize(("kind", "code"), KINDS.items())
def test_each_kind_has_the_exit_code_that_the_design_gives_it(
    kind: type[DeploykitError], code: int
) -> None:
    error = kind("the fact", hint="the way out")
    assert (error.exit_code, str(error), error.hint) == (code, "the fact", "the way out")
    assert isinstance(error, DeploykitError)


def test_no_kind_is_forgotten() -> None:
    found = {
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, DeploykitError)
    }
    assert found == {*KINDS, DeploykitError}
    assert DeploykitError.exit_code == 1


def test_a_hint_is_not_optional() -> None:
    with pytest.raises(TypeError, match="hint"):
        DeploykitError("only a fact")  # type: ignore[call-arg]


def test_a_near_miss_is_named() -> None:
    assert did_you_mean("presett", ("name", "preset", "batch")) == "did you mean 'preset'?"


def test_without_a_near_miss_all_is_named_in_order() -> None:
    assert did_you_mean("zzz", ("name", "batch")) == "known: batch, name"


@given(WORDS, st.sets(WORDS))
def test_a_known_word_is_its_own_nearest(word: str, others: set[str]) -> None:
    assert did_you_mean(word, {word, *others}) == f"did you mean {word!r}?"
