from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploykit.dataset import Dataset, open_dataset
from deploykit.errors import InputError
from deploykit.stages.quantize import guard
from deploykit.stages.quantize.histogram import Histogram
from deploykit.values import Array, Preprocessing

RNG = np.random.default_rng(0)


def saved(path: Path, values: Array) -> Dataset:
    np.savez(path, x=values.astype(np.float32))
    return open_dataset(path)


def seen(samples: Array) -> dict[str, Histogram]:
    histogram = Histogram()
    for sample in samples:
        histogram.add(sample.astype(np.float32))
    return {"x": histogram}


def test_repetitions_are_refused(tmp_path: Path) -> None:
    values = RNG.standard_normal((100, 3))
    guard.check_samples(saved(tmp_path / "a.npz", values), None)
    values[50] = values[0]
    guard.check_samples(saved(tmp_path / "b.npz", values), None)  # one in a hundred happens
    values[51] = values[0]
    with pytest.raises(InputError, match=r"2 of 100 samples in .* are repetitions"):
        guard.check_samples(saved(tmp_path / "c.npz", values), None)


def test_calibration_samples_in_the_evaluation_data_are_found_by_their_content(
    tmp_path: Path,
) -> None:
    values = RNG.standard_normal((40, 3))
    ours = saved(tmp_path / "a.npz", values[:20])
    guard.check_samples(ours, saved(tmp_path / "b.npz", values[20:]))
    with pytest.raises(InputError, match=r"5 of 20 calibration samples are in .*c\.npz too"):
        guard.check_samples(ours, saved(tmp_path / "c.npz", values[15:]))


def test_the_number_of_samples_told_would_really_do(tmp_path: Path) -> None:
    def scaled(count: int) -> Array:
        return RNG.standard_normal((count, 100)) * RNG.lognormal(0, 0.6, (count, 1))

    few = saved(tmp_path / "few.npz", scaled(24))
    (warning,) = guard.check_enough(seen(scaled(24)), few)
    enough = int(warning.split("about ")[1].split()[0])
    assert 60 < enough < 600
    many = saved(tmp_path / "many.npz", scaled(2 * enough))
    assert guard.check_enough(seen(scaled(2 * enough)), many) == []


def test_ranges_that_are_hardly_known_are_refused_with_the_number_that_would_do(
    tmp_path: Path,
) -> None:
    wild = np.full((4, 10), 0.01)
    wild[0] = 100
    data = saved(tmp_path / "wild.npz", wild)
    with pytest.raises(InputError, match="4 samples: ranges are known within") as caught:
        guard.check_enough(seen(wild), data)
    assert "samples would bring that to 10%" in caught.value.hint


def test_equal_magnitudes_need_no_further_samples(tmp_path: Path) -> None:
    data = saved(tmp_path / "a.npz", np.eye(4))
    assert guard.check_enough(seen(np.eye(4)), data) == []
    assert guard.check_enough(seen(np.zeros((4, 3))), data) == []


@pytest.mark.parametrize(("shift", "scale"), [(0, 255), (120, 1), (0, 1 / 58)])
def test_other_preprocessing_than_the_evaluation_data_s_is_told(
    tmp_path: Path, shift: float, scale: float
) -> None:
    values = RNG.standard_normal((64, 3, 8))
    data = saved(tmp_path / "a.npz", values * scale + shift)
    alike = saved(tmp_path / "b.npz", values[::-1] * 1.2)
    (warning,) = guard.compared(data, alike)
    assert warning.startswith("input 'x' has mean")
    assert guard.compared(saved(tmp_path / "c.npz", values), alike) == []
    assert guard.compared(data, None) == []


@pytest.mark.parametrize(
    ("shape", "values", "told"),
    [
        ((64, 3, 4, 4), RNG.integers(0, 256, 64 * 48), True),
        ((64, 3, 4, 4), RNG.integers(0, 256, 64 * 48) / 255, False),
        ((64, 3, 4, 4), RNG.integers(0, 256, 64 * 48) - 128, False),
        ((64, 3, 4, 4), RNG.integers(0, 2, 64 * 48), False),  # a mask
        ((64, 3, 4, 4), RNG.integers(0, 2000, 64 * 48), False),  # counts
        ((64, 48), RNG.integers(0, 256, 64 * 48), False),  # no image
    ],
)
def test_pixels_as_stored_are_told_where_nothing_else_can_tell(
    shape: tuple[int, ...], values: Array, told: bool, tmp_path: Path
) -> None:
    data = saved(tmp_path / "a.npz", values.reshape(shape))
    warnings = guard.compared(data, None)
    assert [w.split(":")[0] for w in warnings] == told * [
        f"input 'x' is pixels as stored, whole numbers up to {values.max()}"
    ]
    assert guard.compared(data, data) == []  # a score tells


def test_data_that_is_preprocessed_unlike_the_model_is_refused(tmp_path: Path) -> None:
    data = saved(tmp_path / "a.npz", RNG.standard_normal((4, 3)))
    scaled = replace(data, preprocessing=Preprocessing(input="x", mean=(0.5,)))
    for known, given in (
        (None, data), (None, scaled), (scaled.preprocessing, data),
        (scaled.preprocessing, scaled),
    ):  # fmt: skip
        guard.check_preprocessing(known, given)
    with pytest.raises(InputError, match=r"preprocessed as .*0\.5.* was made with"):
        guard.check_preprocessing(Preprocessing(input="x"), scaled)
