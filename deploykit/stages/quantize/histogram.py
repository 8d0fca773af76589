"""Histograms of a stream: one pass, no range known beforehand, the order does not matter.

The bin width is a power of two and the bins are aligned at zero. So floor(x / 2^K) equals
floor(floor(x / 2^k) / 2^(K - k)): when a larger value arrives, pairs of bins are merged and every
count stays exact. The final width depends on the largest magnitude alone, hence the result is the
same for every order and batching of the values, and histograms of parts add up to that of the
whole. (A value below 2 ** -97 may count as zero or not: float32 holds no smaller bins.)

The extremes are exact always. The counts are exact for up to PICKED values a sample; of more, every
n-th is counted (n odd, the first one chosen by the sample's own extremes), which moves the share of
values below any point by at most `share_error`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from deploykit.values import Array, Json

BINS = 4096
"""Bins on each side of zero; more than half of them lie below the largest magnitude."""
PICKED = 1 << 16
"""Values of a sample that are counted at most."""
SENTINEL = 2.0**64
"""A magnitude beyond this is a mask (-3.4e38, infinity), not a measurement of anything."""

_FINEST = -120
_PLAIN = (
    "exponent", "low", "high", "samples", "values", "masked", "largest", "largest_squares",
)  # fmt: skip
_BLOCK = 1 << 16


@dataclass(slots=True)
class Histogram:
    """What a tensor's values were: counts in bins, and the exact extremes.

    `counts[i]` values lie in [i - BINS, i - BINS + 1) * 2 ** exponent.
    """

    exponent: int = _FINEST
    counts: Array = field(default_factory=lambda: np.zeros(2 * BINS, np.int64))
    low: float = math.inf
    high: float = -math.inf
    samples: int = 0
    """Calls of `add`, one a sample or fixed batch."""
    values: int = 0
    """Values seen; `counts` holds all of them, or an even part where a sample has many."""
    masked: int = 0
    """Values beyond SENTINEL in magnitude, which are in none of the other numbers."""
    lows: int = 0
    """Sum of the smallest value of each sample, in units of 2 ** -149: exact in any order."""
    highs: int = 0
    largest: float = 0.0
    """Sum of the largest magnitude of each sample, and of its square: for the spread alone."""
    largest_squares: float = 0.0

    def add(self, values: Array, *, binned: bool = True, rectified: bool = False) -> None:
        """Take in the float32 values of one sample; `binned=False` keeps the extremes only.

        Of `rectified` values none is below zero, and the smallest counts as zero: each range has
        zero in it anyway. Raises ValueError: a value is NaN.
        """
        flat = values.reshape(-1)
        if not flat.size:
            return
        low, high = 0.0 if rectified else float(flat.min()), float(flat.max())
        if math.isnan(low) or math.isnan(high):
            raise ValueError("a value is NaN")
        if low <= -SENTINEL or high >= SENTINEL:
            kept = flat[np.abs(flat) < SENTINEL]
            self.masked += flat.size - kept.size
            self.add(kept, binned=binned)
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.samples += 1
        self.values += flat.size
        self.lows += _units(low)
        self.highs += _units(high)
        self.largest += max(-low, high)
        self.largest_squares += max(-low, high) ** 2
        if binned:
            self._coarsen(_exponent(max(-low, high)))
            self._count(_picked(flat, low, high), signed=low < 0)

    def merge(self, other: Histogram) -> None:
        """Take in what another histogram saw."""
        self._coarsen(other.exponent)
        shifted = Histogram(other.exponent, other.counts)
        shifted._coarsen(self.exponent)
        self.counts = self.counts + shifted.counts
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.samples += other.samples
        self.values += other.values
        self.masked += other.masked
        self.lows += other.lows
        self.highs += other.highs
        self.largest += other.largest
        self.largest_squares += other.largest_squares

    def to_json(self) -> Json:
        """As plain data; `from_json` gives an equal histogram back."""
        (filled,) = np.nonzero(self.counts)
        plain: Json = {name: getattr(self, name) for name in _PLAIN}
        exact = {"lows": str(self.lows), "highs": str(self.highs)}  # beyond what JSON readers keep
        return {**plain, **exact, "bins": filled.tolist(), "counts": self.counts[filled].tolist()}

    @classmethod
    def from_json(cls, plain: Json) -> Histogram:
        """Raises KeyError, TypeError or ValueError: not what `to_json` gives."""
        made = cls(**{name: plain[name] for name in _PLAIN})
        made.counts[plain["bins"]] = plain["counts"]
        made.lows, made.highs = int(plain["lows"]), int(plain["highs"])
        return made

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 2.0**self.exponent

    @property
    def share_error(self) -> float:
        """How far the share of values below any point may be off, at 99.9 % confidence.

        Zero where every value was counted; else by the inequality of Dvoretzky, Kiefer and
        Wolfowitz with Massart's constant (1990): sqrt(ln(2 / 0.001) / (2 n)) for n counted values.
        """
        counted = int(self.counts.sum())
        if counted in (0, self.values):
            return 0.0
        return math.sqrt(math.log(2 / 0.001) / (2 * counted))

    def occupied(self) -> tuple[Array, Array]:
        """Centres of the bins that hold values, and their counts, both as float64."""
        (found,) = np.nonzero(self.counts)
        return (found - BINS + 0.5) * self.width, self.counts[found].astype(np.float64)

    def magnitudes(self) -> Array:
        """Counts by |x|: entry i counts [i, i + 1) * width. A bin below zero mirrors one above."""
        return self.counts[BINS:] + self.counts[BINS - 1 :: -1]

    def _coarsen(self, exponent: int) -> None:
        shift = exponent - self.exponent
        if shift <= 0:
            return
        into = (np.arange(-BINS, BINS) >> min(shift, 62)) + BINS
        merged = np.zeros_like(self.counts)
        np.add.at(merged, into, self.counts)
        self.counts, self.exponent = merged, exponent

    def _count(self, flat: Array, *, signed: bool) -> None:
        scale = np.float32(2.0**-self.exponent)
        scaled = np.empty(min(_BLOCK, flat.size), np.float32)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            out = scaled[: block.size]
            np.multiply(block, scale, out=out)
            if signed:
                np.floor(out, out=out)  # of positive values the cast below is the floor
                index = (out.astype(np.int16) + np.int16(BINS)).view(np.uint16)
                self.counts += np.bincount(index, minlength=2 * BINS)
            else:
                self.counts[BINS:] += np.bincount(out.astype(np.uint16), minlength=BINS)


def _picked(flat: Array, low: float, high: float) -> Array:
    """All values, or every n-th: which depends on the values alone, never on their turn."""
    step = -(-flat.size // PICKED) | 1
    if flat.size <= PICKED:
        return flat
    first = (_units(low) ^ _units(high)) % step
    return np.ascontiguousarray(flat[first::step])


def _exponent(largest: float) -> int:
    """The smallest k with largest < BINS * 2^k."""
    return max(math.frexp(largest)[1] - int(math.log2(BINS)), _FINEST)


def _units(value: float) -> int:
    """A float32 as a whole number of its smallest unit, 2^-149."""
    return int(math.ldexp(value, 149))
