"""The grids that values are rounded to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from deploykit.values import Array


@dataclass(frozen=True, slots=True)
class Levels:
    """The numbers of a type that values become, and whether zero lies in their middle."""

    lowest: int
    highest: int
    symmetric: bool
    type: str = "INT8"
    """As ONNX calls it."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of arrays that hold levels."""
        import onnx

        number = onnx.TensorProto.DataType.Value(self.type)
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number))

    def nearest(self, values: Array, zero_point: int = 0) -> Array:
        """Round to the nearest level, half to even, and saturate; values are in steps from zero."""
        if self.type.startswith("FLOAT"):
            inside = np.clip(values, self.lowest, self.highest)
            return inside.astype(self.dtype).astype(inside.dtype)
        result: Array = np.clip(np.rint(values) + zero_point, self.lowest, self.highest)
        return result

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
        level = self.levels.nearest(values / self.scale, self.zero_point)
        result: Array = self.scale * (level - self.zero_point)
        return result


def _positive(scale: float) -> float:
    """As float32, which no runtime divides by zero with."""
    return float(np.float32(scale if scale > np.finfo(np.float32).tiny else 1.0))


UINT8 = Levels(0, 255, symmetric=False, type="UINT8")
INT8 = Levels(-128, 127, symmetric=True)
INT7 = Levels(-64, 63, symmetric=True)
INT4 = Levels(-8, 7, symmetric=True, type="INT4")
FP8 = Levels(-448, 448, symmetric=True, type="FLOAT8E4M3FN")
"""E4M3: 3 bits of mantissa, so levels lie denser near zero; no infinity."""
