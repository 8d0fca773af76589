from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit._shapes import DTYPES, name_axes, parse_inputs, parse_shape, resized
from deploykit.errors import UsageError
from deploykit.values import BATCH, Dimension, TensorSpec
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
    assert parse_inputs(written) == tuple(
        TensorSpec(name=name, dtype=dtype or "float32", shape=(BATCH, *shape[1:]))
        for name, (shape, dtype) in wanted.items()
    )


def test_dynamic_axes_are_named() -> None:
    specs = parse_inputs(["a:1x3x224x192", "b:1x8:int64"])
    specs, dimensions = name_axes(specs, ["a:2=height", "a:3=width[64..]", "b:0=n[..8]"])
    assert [spec.shape for spec in specs] == [("batch", 3, "height", "width"), ("n", 8)]
    assert [str(d) for d in dimensions] == ["batch[1..]", "height[1..]", "width[64..]", "n[1..8]"]
    assert [d.usual for d in dimensions] == [2, 224, 192, 2]


def test_a_range_may_be_said_at_any_axis_of_its_dimension() -> None:
    specs = parse_inputs(["ids:1x16:int64", "mask:1x16:int64"])
    for axes in (["ids:1=n[1..64]", "mask:1=n"], ["ids:1=n", "mask:1=n[1..64]"]):
        (ids, mask), (_, n) = name_axes(specs, axes)
        assert (ids.shape, mask.shape) == (("batch", "n"), ("batch", "n"))
        assert (n.low, n.high, n.usual) == (1, 64, 16)


RANGES = st.tuples(st.integers(1, 10**4), st.none() | st.integers(0, 10**4))
WORDS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)


@given(NAMES, SHAPES, st.data(), WORDS, RANGES)
def test_an_axis_keeps_its_range_and_its_size_within_it(
    name: str, shape: tuple[int, ...], data: st.DataObject, word: str, given_range: tuple[int, int]
) -> None:
    low, more = given_range
    axis = data.draw(st.integers(0, len(shape) - 1))
    high = None if more is None else low + more
    text = f"{name}:{axis}={word}[{low}..{'' if high is None else high}]"
    (spec,), dimensions = name_axes(parse_inputs([printed(name, shape)]), [text])
    assert spec.shape[axis] == word
    assert [d for i, d in enumerate(spec.shape) if i not in (0, axis)] == [
        d for i, d in enumerate(shape) if i not in (0, axis)
    ]
    (made,) = (d for d in dimensions if d.name == word)
    assert (made.low, made.high) == (low, high)
    assert made.holds(made.usual)
    assert str(made) in text
    assert {d.name for d in dimensions} == {d for d in spec.shape if isinstance(d, str)}


@given(st.integers(1, 50), st.none() | st.integers(0, 50), st.integers(1, 100))
def test_other_sizes_are_others_in_the_range(low: int, more: int | None, wish: int) -> None:
    high = None if more is None else low + more
    made = Dimension(name="n", low=low, high=high)
    made = made.model_copy(update={"usual": made.nearest(wish)})
    assert made.holds(made.usual)
    assert made.holds(wish) == (made.nearest(wish) == wish)
    assert all(made.holds(size) and size != made.usual for size in made.others())
    assert bool(made.others()) or low == high or made.usual == 1 or more == 1


SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


@given(SIZES, st.data())
def test_an_array_is_cut_or_repeated_from_its_start(sizes: list[int], data: st.DataObject) -> None:
    array = np.arange(np.prod(sizes)).reshape(sizes)
    shape = tuple(data.draw(st.integers(1, 12)) for _ in sizes)
    made = resized(array, shape)
    assert made.shape == shape
    for place in np.ndindex(*shape):
        assert made[place] == array[tuple(p % s for p, s in zip(place, sizes, strict=True))]


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
        (["a:1x3"], ["a:1=n[5..4]"], "the range is empty", "[smallest..largest]"),
        (["a:1x3"], ["a:1=n[1-4]"], "'a:1=n[1-4]'", "name:1=d[1..512]"),
        (["a:1x3x3"], ["a:1=n[1..4]", "a:2=n[1..5]"], "n is n[1..4] already", "one range"),
        (["a:1x3"], ["b:1=width"], "'b:1=width'", "--input-shape b:1x"),
        (["a:1x3"], ["a:2=width"], "no axis 2", "0 to 1"),
    ],
)
def test_bad_inputs_are_refused(shapes: list[str], axes: list[str], fact: str, hint: str) -> None:
    with refused(UsageError, fact, hint=hint):
        name_axes(parse_inputs(shapes), axes)
