"""From a stored 8-bit image to the array that a model takes, as a `preprocessing.toml` says."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np

from deploykit.errors import InputError
from deploykit.values import Array, Preprocessing, parse

PREPROCESSING_FILE = "preprocessing.toml"


def read_preprocessing(path: Path) -> Preprocessing:
    """Read a `preprocessing.toml`. Raises InputError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}", hint="correct the TOML") from error
    return parse(Preprocessing, data, str(path))


def normalize(pixels: Array, spec: Preprocessing) -> Array:
    """uint8 in the spec's layout, with a batch axis, to float32: `(x * scale - mean) / std`."""
    shape = (1, -1, 1, 1) if spec.layout == "nchw" else (1, 1, 1, -1)
    mean, std = (np.array(v, np.float32).reshape(shape) for v in (spec.mean, spec.std))
    return (pixels.astype(np.float32) * np.float32(spec.scale) - mean) / std


def read_image(path: Path, spec: Preprocessing) -> Array:
    """One image file, resized and cropped, uint8 in the spec's layout. Raises InputError."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("L" if spec.color == "gray" else "RGB")
    except Exception as error:  # damaged files raise anything
        raise InputError(f"{path}: not a readable image: {error}", hint="remove it") from error
    if spec.resize:
        image = image.resize(_resized(image.size, spec.resize), Image.Resampling.BILINEAR)
    if spec.crop:
        height, width = spec.crop
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    if spec.color == "bgr":
        pixels = pixels[:, :, ::-1]
    return pixels.transpose(2, 0, 1) if spec.layout == "nchw" else pixels


def _resized(size: tuple[int, int], resize: int | tuple[int, int]) -> tuple[int, int]:
    """Pillow's (width, height) after a resize of the shorter side or to (height, width)."""
    if isinstance(resize, tuple):
        return resize[1], resize[0]
    factor = resize / min(size)
    return max(resize, round(size[0] * factor)), max(resize, round(size[1] * factor))
