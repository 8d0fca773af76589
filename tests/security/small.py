"""Where bad inputs are made, and the words of commands that take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import onnx

from tests.conftest import FACTORY, FASHION

CALIBRATION = FASHION / "calibration.npz"
SHAPE = ("--input-shape", "images:1x1x28x28")
Words = tuple[object, ...]


class Place(NamedTuple):
    """A folder of one test, and sound models and a sound bundle, not to be changed."""

    folder: Path
    linear: Path
    sound: Path

    @property
    def out(self) -> Path:
        """The final path; something lies there."""
        return self.folder / "results" / "model.onnx"

    def written(self, name: str, content: bytes | str) -> Path:
        """A new file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def to_out(self) -> Words:
        """Asked to write, by force, over what is there."""
        return ("-o", self.out, "--force")


def export(place: Place, weights: Path) -> Words:
    """Export the factory with a checkpoint."""
    return ("export", FACTORY, "--weights", weights, *SHAPE, *place.to_out())


def quantize(place: Place, model: Path, data: object = CALIBRATION) -> Words:
    """Quantize a model from anywhere."""
    return ("quantize", model, "--calibration-data", data, *place.to_out())


def saving(make: Callable[[], onnx.ModelProto]) -> Callable[[Place], Words]:
    """Quantize a model that is made on the spot."""

    def words(place: Place) -> Words:
        return quantize(place, place.written("bad.onnx", make().SerializeToString()))

    return words
