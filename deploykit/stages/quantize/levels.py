"""The grids that values are rounded to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deploykit.values import Array


@dataclass(frozen=True, slots=True)
class Levels:
    """Integer levels and whether zero lies in their middle."""

    lowest: int
    highest: int
    symmetric: bool

    @property
    def steps(self) -> int:
        """Distances between neighbouring levels over the whole range."""
        return self.highest - self.lowest

    def fitted(self, low: float, high: float) -> Grid:
        """The grid for a range with zero in it; symmetric levels cover the larger side on both.

        As ONNX Runtime and TensorRT do: float32 scale, the zero point rounded to a level.
        """
        if self.symmetric:
            scale = max(-low, high) / self.highest
            return Grid(_positive(scale), 0, self)
        scale = _positive((high - low) / self.steps)
        zero = round(self.lowest - low / scale)
        return Grid(scale, int(np.clip(zero, self.lowest, self.highest)), self)


@dataclass(frozen=True, slots=True)
class Grid:
    """real = scale * (level - zero_point)."""

    scale: float
    zero_point: int
    levels: Levels

    def rounded(self, values: Array) -> Array:
        """Quantize and dequantize: round half to even, saturate."""
        level = np.rint(values / self.scale) + self.zero_point
        inside = np.clip(level, self.levels.lowest, self.levels.highest)
        result: Array = self.scale * (inside - self.zero_point)
        return result


def _positive(scale: float) -> float:
    """As float32, which no runtime divides by zero with."""
    return float(np.float32(scale if scale > np.finfo(np.float32).tiny else 1.0))


UINT8 = Levels(0, 255, symmetric=False)
INT8 = Levels(-128, 127, symmetric=True)
INT7 = Levels(-64, 63, symmetric=True)
