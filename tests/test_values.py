from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from deploykit.errors import InputError
from deploykit.values import (
    Artifact,
    Difference,
    Gate,
    Interval,
    Measurement,
    Placement,
    Preprocessing,
    Score,
    SessionOptions,
    StageRecord,
    TensorSpec,
    Value,
    Verdict,
    parse,
)
from tests.fixtures_core import refused

WORDS = st.text(max_size=8)
FLOATS = st.floats(allow_nan=False)
COUNTS = st.integers(0, 2**62)
DTYPES = ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")
DOCUMENTS = st.dictionaries(
    WORDS,
    st.recursive(
        st.none() | st.booleans() | COUNTS | FLOATS | WORDS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)

SPECS = st.builds(
    TensorSpec,
    name=WORDS,
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4096) | st.text("abcxyz_", min_size=1), max_size=4).map(tuple),
)
INTERVALS = st.builds(Interval, value=FLOATS, low=FLOATS, high=FLOATS)
GATES = st.builds(
    Gate, name=WORDS, engine=WORDS, value=INTERVALS, limit=FLOATS, passed=st.booleans()
)
RECORDS = st.builds(
    StageRecord,
    stage=WORDS, options=DOCUMENTS, facts=DOCUMENTS, inputs=st.dictionaries(WORDS, WORDS),
    versions=st.dictionaries(WORDS, WORDS), seconds=FLOATS, key=WORDS,
)  # fmt: skip
SIZES = st.tuples(st.integers(1, 999), st.integers(1, 999))


@st.composite
def preprocessings(draw: st.DrawFn) -> Preprocessing:
    color = draw(st.sampled_from(["rgb", "bgr", "gray"]))
    size = draw(st.sampled_from([1, 1 if color == "gray" else 3]))
    finite = st.floats(-1e6, 1e6)
    return Preprocessing(
        input=draw(WORDS),
        resize=draw(st.none() | st.integers(1, 999) | SIZES),
        crop=draw(st.none() | SIZES),
        color=color,
        layout=draw(st.sampled_from(["nchw", "nhwc"])),
        scale=draw(finite),
        mean=tuple(draw(st.lists(finite, min_size=size, max_size=size))),
        std=tuple(draw(st.lists(st.floats(1e-6, 1e6), min_size=size, max_size=size))),
    )


ARTIFACTS = st.builds(
    Artifact,
    path=st.text("ab/.", min_size=1).map(Path),
    format=st.sampled_from(["torch", "onnx", "engine"]),
    precision=st.sampled_from(["fp32", "fp16", "bf16", "int8", "fp8"]),
    inputs=st.lists(SPECS, max_size=2).map(tuple),
    outputs=st.lists(SPECS, max_size=2).map(tuple),
    sha256=WORDS,
    preprocessing=st.none() | preprocessings(),
    history=st.lists(RECORDS, max_size=2).map(tuple),
)
VALUES = st.one_of(
    SPECS, INTERVALS, RECORDS, ARTIFACTS, preprocessings(), GATES,
    st.builds(Score, metric=WORDS, score=INTERVALS, samples=COUNTS,
              per_sample=st.none() | st.lists(FLOATS, max_size=3).map(tuple)),
    st.builds(Difference, output=WORDS, max_absolute=FLOATS, max_relative=FLOATS, cosine=FLOATS,
              sqnr_db=FLOATS, agreement=st.none() | FLOATS),
    st.builds(Verdict, ship=st.none() | WORDS, gates=st.lists(GATES, max_size=2).map(tuple),
              reason=WORDS),
    st.builds(Measurement, name=WORDS, backend=WORDS, batch_size=COUNTS,
              options=st.builds(SessionOptions, threads=st.integers(1, 64)),
              load_ns=COUNTS, first_run_ns=COUNTS, warmup_runs=COUNTS,
              blocks_ns=st.lists(st.lists(COUNTS, max_size=3).map(tuple), max_size=3).map(tuple),
              placement=st.builds(Placement, provider=WORDS, detail=DOCUMENTS,
                                  precisions=st.dictionaries(WORDS, COUNTS)),
              peak_rss_bytes=COUNTS, affinity=st.lists(COUNTS, max_size=3).map(tuple),
              cosines=st.dictionaries(WORDS, FLOATS), invalid=st.none() | WORDS),
)  # fmt: skip


# --- through JSON and back


@settings(max_examples=50)
@given(VALUES)
def test_a_value_comes_back_from_json_text(value: Value) -> None:
    assert parse(type(value), json.loads(value.model_dump_json()), "here") == value


@settings(max_examples=50)
@given(VALUES)
def test_a_value_comes_back_from_plain_data_and_the_standard_json(value: Value) -> None:
    plain = json.loads(json.dumps(value.model_dump(mode="json")))
    assert parse(type(value), plain, "here") == value


def test_not_a_number_comes_back_too() -> None:
    interval = Interval(value=0.5, low=math.nan, high=math.inf)
    for text in (interval.model_dump_json(), json.dumps(interval.model_dump(mode="json"))):
        again = parse(Interval, json.loads(text), "here")
        assert (again.value, again.high) == (0.5, math.inf)
        assert math.isnan(again.low)


@settings(max_examples=30)
@given(VALUES, st.data())
def test_a_value_is_frozen(value: Value, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(sorted(type(value).model_fields)))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(value, field, None)


# --- what is wrong, where, and what was meant


RECORD: dict[str, Any] = {
    "stage": "s", "options": {}, "facts": {}, "inputs": {}, "versions": {}, "seconds": 1, "key": "",
}  # fmt: skip
SPEC: dict[str, Any] = {"name": "x", "dtype": "float32", "shape": ["batch", 3]}
ARTIFACT: dict[str, Any] = {
    "path": "m.onnx", "format": "onnx", "precision": "fp32", "inputs": [SPEC], "outputs": [SPEC],
    "sha256": "0", "preprocessing": {}, "history": [RECORD],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "facts", "hint"),
    [
        ({"presicion": "fp32"}, ["unknown key 'presicion'"], "did you mean 'precision'?"),
        ({"inputs": [{**SPEC, "dtipe": 1}]}, ["'inputs.0.dtipe'"], "did you mean 'dtype'?"),
        ({"preprocessing": {"meen": [0]}}, ["'preprocessing.meen'"], "did you mean 'mean'?"),
        ({"history": [RECORD, {**RECORD, "fact": 1}]}, ["'history.1.fact'"], "mean 'facts'?"),
        ({"history": [{**RECORD, "zzzz": 1}]}, ["'history.0.zzzz'"], "known: facts, inputs, key"),
        ({"format": "onxx"}, ["'format'", "'onnx'", "got 'onxx'"], "correct this value"),
        ({"inputs": [{"name": "x", "shape": []}]}, ["'inputs.0.dtype' is missing"], "add 'dtype'"),
        ({"inputs": [{**SPEC, "shape": [-1]}]}, ["inputs.0.shape.0", "got -1"], "correct this"),
        ({"sha256": 5}, ["'sha256'", "got 5"], "correct this value"),
        ({"preprocessing": {"mean": [1, 2]}}, ["mean has 2 values, rgb has 3"], "correct this"),
        ({"preprocessing": {"std": [0.0]}}, ["std must be above 0"], "correct this value"),
        (
            {"preprocessing": {"color": "gray", "std": [1, 1, 1]}},
            ["3 values, gray has 1"],
            "correct",
        ),
    ],
)
def test_bad_data_says_what_where_and_what_was_meant(
    change: dict[str, Any], facts: list[str], hint: str
) -> None:
    with refused(InputError, "here.json: ", *facts, hint=hint):
        parse(Artifact, {**ARTIFACT, **change}, "here.json")


def test_data_that_is_no_mapping_is_refused_by_the_kind() -> None:
    with refused(InputError, "here: 'Interval'", "got 5", hint="correct this value"):
        parse(Interval, 5, "here")


def test_a_validators_sentence_stands_alone() -> None:
    with pytest.raises(InputError) as caught:
        parse(Preprocessing, {"std": [-1]}, "here")
    assert str(caught.value) == "here: 'Preprocessing': std must be above 0"


@pytest.mark.parametrize("threads", [0, -1])
def test_a_session_has_at_least_one_thread(threads: int) -> None:
    with refused(InputError, "'threads'", threads, hint="correct"):
        parse(SessionOptions, {"threads": threads}, "here")


# --- tensors


@given(SPECS, st.dictionaries(st.text("abcxyz_", min_size=1), st.integers(1, 99)))
def test_fixed_sizes_fit(spec: TensorSpec, sizes: dict[str, int]) -> None:
    fixed = spec.fixed(sizes)
    assert len(fixed) == len(spec.shape)
    for want, have in zip(spec.shape, fixed, strict=True):
        assert have == (sizes.get(want, 1) if isinstance(want, str) else want)
    small = np.zeros([min(size, 3) for size in fixed], spec.dtype)
    assert (spec.misfit(small) is None) == all(
        isinstance(d, str) or d == min(d, 3) for d in spec.shape
    )


@given(SPECS, st.sampled_from(DTYPES))
def test_another_dtype_does_not_fit(spec: TensorSpec, dtype: str) -> None:
    array = np.zeros([2 if isinstance(d, str) else d % 3 for d in spec.shape], dtype)
    fitting = spec.model_copy(update={"shape": array.shape})
    misfit = fitting.misfit(array)
    assert (misfit is None) == (dtype == spec.dtype)
    assert misfit is None or misfit == f"dtype is {dtype}, the model wants {spec.dtype}"


@pytest.mark.parametrize("shape", [(2,), (2, 3, 1), (2, 4), (), (0, 4)])
def test_another_shape_does_not_fit(shape: tuple[int, ...]) -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
    misfit = spec.misfit(np.zeros(shape, np.float32))
    assert misfit == f"shape is {shape}, the model wants x: float32[batch, 3]"
    assert spec.misfit(np.zeros((0, 3), np.float32)) is None


def test_the_other_byte_order_does_not_fit() -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=(1,))
    assert spec.misfit(np.zeros(1, np.dtype(np.float32).newbyteorder())) is not None


# --- artifacts


def test_facts_are_those_of_the_last_stage() -> None:
    bare = parse(Artifact, {**ARTIFACT, "history": []}, "here")
    assert bare.facts == {}
    records = [{**RECORD, "facts": {"n": n}} for n in (1, 2)]
    assert parse(Artifact, {**ARTIFACT, "history": records}, "here").facts == {"n": 2}
