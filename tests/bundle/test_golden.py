from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Self, get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deploykit.bundle import golden
from deploykit.bundle.manifest import GoldenOutputs
from deploykit.values import Array, Placement, Precision

arrays = hnp.arrays(
    st.sampled_from([np.float32, np.int64, np.uint8, np.bool_, np.float16]),
    hnp.array_shapes(min_dims=0, max_dims=3, max_side=4),
)
names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=10
) | st.sampled_from(["file", "/fc/Gemm_output_0", "../x", "a:0", "x.npy"])


def within(atol: float, rtol: float = 0.0) -> GoldenOutputs:
    return GoldenOutputs(
        path="g.npz", batch_size=1, atol={"y": atol}, rtol={"y": rtol}, max_error=0.0
    )


@example(feed={"x": np.array(0), "x.npy": np.array(1)})
@settings(deadline=None, max_examples=50)
@given(feed=st.dictionaries(names, arrays, max_size=3))
def test_read_arrays_gives_back_what_write_arrays_wrote(
    tmp_path_factory: pytest.TempPathFactory, feed: dict[str, Array]
):
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    golden.write_arrays(path, feed)
    back = golden.read_arrays(path)
    assert list(back) == list(feed)
    for name, array in feed.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)


def test_equal_arrays_give_equal_bytes(tmp_path: Path):
    for name in "ab":
        golden.write_arrays(tmp_path / name, {"x": np.arange(6.0)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_objects_are_not_written(tmp_path: Path):
    with pytest.raises(ValueError, match="Object arrays"):
        golden.write_arrays(tmp_path / "a.npz", {"x": np.array([{}])})


def test_the_tolerance_is_inclusive_and_by_value():
    want, off = np.array([0.0, 100.0]), np.array([0.5, 110.5])
    assert golden.compare({"y": want}, {"y": off}, within(0.5, 0.1)).problem is None
    found = golden.compare({"y": want}, {"y": off}, within(0.5, 0.099))
    assert found.max_error == 10.5
    assert "differs in 1 of 2 values, by up to 10.5" in str(found.problem)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_agrees(bad: float):
    found = golden.compare({"y": np.zeros(2)}, {"y": np.array([0.0, bad])}, within(1e30))
    assert found.problem
    assert found.max_error == math.inf


@pytest.mark.parametrize(
    "answer", [np.zeros((1, 2)), np.zeros(3), np.zeros(2, np.float32)], ids=["rank", "size", "type"]
)
def test_another_shape_or_dtype_never_agrees(answer: Array):
    found = golden.compare({"y": np.zeros(2)}, {"y": answer}, within(1.0))
    assert "y" in str(found.problem)


def test_another_output_never_agrees():
    assert golden.compare({"y": np.zeros(2)}, {"z": np.zeros(2)}, within(1.0)).problem


def test_every_precision_has_a_tolerance():
    assert set(golden.SHARES) == set(get_args(Precision))


class _Ran:
    """A session whose runtime computed in other precisions than the file's."""

    def __init__(self, *precisions: str) -> None:
        self.precisions = dict.fromkeys(precisions, 1)

    def placement(self, feed: object) -> Placement:
        return Placement(provider="CPU", precisions=self.precisions)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...


@pytest.mark.parametrize(
    ("file", "ran", "share"),
    [
        ("fp32", ("fp32",), 1e-4),
        ("fp32", ("bf16", "fp32"), 3e-2),
        ("int8", ("int8", "integer"), 1.5e-2),
    ],
)
def test_the_tolerance_is_that_of_the_coarsest_precision_that_ran(
    monkeypatch: pytest.MonkeyPatch, file: str, ran: tuple[str, ...], share: float
) -> None:
    monkeypatch.setattr(golden, "open_session", lambda *_: _Ran(*ran))
    model = SimpleNamespace(precision=file)
    feed = {"x": np.zeros((2, 1), np.float32)}
    assert golden._share(model, "openvino", feed, 1) == share  # type: ignore[arg-type]
