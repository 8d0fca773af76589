from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit._shapes import DTYPES, parse_inputs, parse_shape
from deploykit.errors import UsageError
from deploykit.values import BATCH, TensorSpec
from tests.fixtures_core import refused

NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 10**6), min_size=1, max_size=6).map(tuple)


def printed(name: str, shape: tuple[int, ...]) -> str:
    return f"{name}:{'x'.join(map(str, shape))}"


@given(NAMES, SHAPES)
def test_what_is_printed_is_parsed(name: str, shape: tuple[int, ...]) -> None:
    assert parse_shape(printed(name, shape)) == (name, shape)


@given(st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from([*DTYPES, None]))))
def test_inputs_keep_their_order_and_get_a_dynamic_batch(
    wanted: dict[str, tuple[tuple[int, ...], str | None]],
) -> None:
    written = [
        printed(name, shape) + (f":{dtype}" if dtype else "")
        for name, (shape, dtype) in wanted.items()
    ]
    assert parse_inputs(written, ()) == tuple(
        TensorSpec(name=name, dtype=dtype or "float32", shape=(BATCH, *shape[1:]))
        for name, (shape, dtype) in wanted.items()
    )


def test_dynamic_axes_are_named() -> None:
    specs = parse_inputs(["a:1x3x224x224", "b:1x8:int64"], ["a:2=height", "a:3=width", "b:0=n"])
    assert [spec.shape for spec in specs] == [("batch", 3, "height", "width"), ("n", 8)]


@pytest.mark.parametrize(
    "text", ["images", "images:", ":1x3", "1x3", "a:1x", "a:1xx3", "a:1x-3", "a:1.5"]
)
def test_what_is_no_shape_is_refused(text: str) -> None:
    with refused(UsageError, repr(text), hint="name:1x3x224x224"):
        parse_shape(text)


@pytest.mark.parametrize(
    ("shapes", "axes", "fact", "hint"),
    [
        (["a:1x3:flaot32"], [], "'flaot32'", "did you mean 'float32'?"),
        (["images"], [], "'images'", "known: bool, float16"),
        (["a:int64"], [], "'a'", "name:1x3x224x224"),
        (["a:1x3", "b:1x3", "a:1x4"], [], "'a:1x4'", "give one"),
        (["a:1x3"], ["a:1"], "'a:1'", "name:axis=dimension"),
        (["a:1x3"], ["a:1=2"], "'a:1=2'", "name:axis=dimension"),
        (["a:1x3"], ["b:1=width"], "'b:1=width'", "--input-shape b:1x"),
        (["a:1x3"], ["a:2=width"], "no axis 2", "0 to 1"),
    ],
)
def test_bad_inputs_are_refused(shapes: list[str], axes: list[str], fact: str, hint: str) -> None:
    with refused(UsageError, fact, hint=hint):
        parse_inputs(shapes, axes)
