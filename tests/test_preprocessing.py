from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from deploykit.errors import InputError
from deploykit.preprocessing import normalize, read_image, read_preprocessing
from deploykit.values import Preprocessing
from tests.conftest import FASHION
from tests.fixtures_core import fine_or_refused, refused

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def saved(folder: Path, pixels: np.ndarray = PIXELS, name: str = "image.png") -> Path:
    Image.fromarray(pixels).save(folder / name)
    return folder / name


# --- normalize


@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=4, max_dims=4, max_side=4)),
    st.sampled_from(["nchw", "nhwc"]),
    st.floats(1e-4, 10),
    st.data(),
)
def test_each_channel_is_scaled_shifted_and_divided(
    pixels: np.ndarray, layout: Any, scale: float, data: st.DataObject
) -> None:
    axis = 1 if layout == "nchw" else 3
    pixels = np.resize(pixels, [3 if i == axis else n for i, n in enumerate(pixels.shape)])
    values = st.lists(st.floats(0.01, 10), min_size=3, max_size=3)
    mean, std = data.draw(values), data.draw(values)
    spec = Preprocessing(layout=layout, scale=scale, mean=tuple(mean), std=tuple(std))
    found = normalize(pixels, spec)
    assert (found.dtype, found.shape) == (np.float32, pixels.shape)
    for channel in range(3):
        want = (pixels.take(channel, axis).astype(float) * scale - mean[channel]) / std[channel]
        size = 255 * scale + mean[channel]  # what is subtracted, before it is divided
        assert np.abs(found.take(channel, axis) - want).max() <= 1e-5 * size / std[channel]


def test_one_mean_holds_for_all_channels() -> None:
    spec = Preprocessing(mean=(0.5,), std=(0.25,))
    found = normalize(np.full((1, 3, 1, 1), 255, np.uint8), spec)
    assert found.ravel().tolist() == [2.0, 2.0, 2.0]


# --- images


def test_an_image_comes_in_the_layout_and_color_order_that_is_asked(tmp_path: Path) -> None:
    path = saved(tmp_path)
    rgb = read_image(path, Preprocessing(layout="nhwc"))
    assert rgb.dtype == np.uint8
    assert np.array_equal(rgb, PIXELS)
    assert np.array_equal(read_image(path, Preprocessing()), PIXELS.transpose(2, 0, 1))
    bgr = read_image(path, Preprocessing(color="bgr"))
    assert np.array_equal(bgr, PIXELS[:, :, ::-1].transpose(2, 0, 1))


def test_gray_has_one_channel(tmp_path: Path) -> None:
    gray = read_image(saved(tmp_path), Preprocessing(color="gray"))
    assert gray.shape == (1, 20, 30)
    luma = PIXELS @ [0.299, 0.587, 0.114]  # ITU-R BT.601
    assert np.abs(gray[0] - luma).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_other_modes_are_converted(tmp_path: Path, mode: str) -> None:
    Image.fromarray(PIXELS).convert(mode).save(tmp_path / "image.png")
    assert read_image(tmp_path / "image.png", Preprocessing()).shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("resize", "shape"),
    [(10, (10, 15)), (40, (40, 60)), ((7, 9), (7, 9)), (3, (3, 4)), (20, (20, 30))],
)
def test_resize_is_of_the_shorter_side_or_to_height_and_width(
    tmp_path: Path, resize: Any, shape: tuple[int, int]
) -> None:
    assert read_image(saved(tmp_path), Preprocessing(resize=resize)).shape == (3, *shape)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_neither_side_is_below_the_resize(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, resize: int
) -> None:
    path = saved(tmp_path_factory.mktemp("i"), np.zeros((height, width), np.uint8))
    shape = read_image(path, Preprocessing(resize=resize)).shape[1:]
    assert min(shape) == resize
    assert (shape[0] <= shape[1]) == (height <= width) or max(shape) == resize


def test_the_crop_is_the_centre(tmp_path: Path) -> None:
    found = read_image(saved(tmp_path), Preprocessing(crop=(10, 6), layout="nhwc"))
    assert np.array_equal(found, PIXELS[5:15, 12:18])
    odd = read_image(saved(tmp_path), Preprocessing(crop=(9, 5), layout="nhwc"))
    assert np.array_equal(odd, PIXELS[5:14, 12:17])


def test_the_crop_comes_after_the_resize(tmp_path: Path) -> None:
    half = Image.fromarray(PIXELS).resize((15, 10), Image.Resampling.BILINEAR)
    found = read_image(saved(tmp_path), Preprocessing(resize=10, crop=(8, 9), layout="nhwc"))
    assert np.array_equal(found, np.asarray(half)[1:9, 3:12])


@given(st.data())
def test_a_damaged_image_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = saved(tmp_path_factory.mktemp("i"), np.tile(PIXELS, (2, 2, 1)))
    damaged = bytearray(path.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    with fine_or_refused(path):
        read_image(path, Preprocessing())


def test_a_text_file_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_text("hello")
    with refused(InputError, tmp_path / "image.png", "not a readable image", hint="remove it"):
        read_image(tmp_path / "image.png", Preprocessing())


# --- the file


def test_the_committed_file_is_read() -> None:
    spec = read_preprocessing(FASHION / "preprocessing.toml")
    assert (spec.color, spec.layout, spec.mean, spec.std) == ("gray", "nchw", (0.286,), (0.353,))
    assert spec.scale == 1 / 255


@pytest.mark.parametrize(
    ("text", "fact", "hint"),
    [
        ("mean = [", "Invalid value", "correct the TOML"),
        ("meen = [0.5]", "unknown key 'meen'", "did you mean 'mean'?"),
        ("color = 'grey'", "got 'grey'", "correct this value"),
        ("crop = [3]", "'crop.1' is missing", "add 1"),
        ("std = [0.1, 0.0, 0.1]", "std must be above 0", "correct this value"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, fact: str, hint: str) -> None:
    path = tmp_path / "preprocessing.toml"
    path.write_text(text)
    with refused(InputError, path, fact, hint=hint):
        read_preprocessing(path)


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "preprocessing.toml"
    with refused(InputError, path, "No such file", hint="correct the TOML"):
        read_preprocessing(path)
    path.write_bytes(b"\xff\xfe")
    with refused(InputError, path, "utf-8", hint="correct the TOML"):
        read_preprocessing(path)
