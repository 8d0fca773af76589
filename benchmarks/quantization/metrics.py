"""The score of each case: `(outputs, targets, reference) -> float`, higher is better.

Each works as a metric of deploykit (`metrics.py:top1`). `outputs` and `reference` map the name of
an output to an array whose first axis is the sample; the first output counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Outputs = Mapping[str, np.ndarray]

INK = 0.3
"""Probability above which a pixel belongs to a text region."""
SPECK = 60
"""Pixels up to which a region is noise."""
MARGIN = 8
"""Pixels by which the detector's regions are narrower than the text; it is trained to shrink."""
OVERLAP = 0.5
"""Intersection over union above which a region is the text box."""


def first(outputs: Outputs) -> np.ndarray:
    """The first output."""
    return np.asarray(next(iter(outputs.values())))


def top1(outputs: Outputs, targets: np.ndarray, reference: Outputs | None = None) -> float:
    """Share of samples whose largest logit is a label.

    `targets` holds the accepted labels: integers [samples] or [samples, n], padded with -1.
    """
    del reference
    best = first(outputs).argmax(-1)[:, None]
    return float((best == targets.reshape(len(targets), -1)).any(1).mean())


def human_similarity(
    outputs: Outputs, targets: np.ndarray, reference: Outputs | None = None
) -> float:
    """Pearson correlation of cosine similarity with people's ratings, over all pairs of documents.

    The outputs are embeddings [documents, n], the targets ratings [documents, documents] (Lee,
    Pincombe and Welsh 2005).
    """
    del reference
    vectors = first(outputs)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = np.triu_indices(len(units), 1)
    return float(np.corrcoef((units @ units.T)[pairs], targets[pairs])[0, 1])


def log_odds_agreement(outputs: Outputs, targets: np.ndarray | None, reference: Outputs) -> float:
    """Pearson correlation of the log odds of two classes with those of the float model."""
    del targets
    return float(np.corrcoef(_log_odds(outputs), _log_odds(reference))[0, 1])


def _log_odds(outputs: Outputs) -> np.ndarray:
    shares = np.clip(first(outputs), 1e-4, 1)
    return np.log(shares[:, 1] / shares[:, 0])


def line_accuracy(outputs: Outputs, targets: np.ndarray, reference: Outputs | None = None) -> float:
    """Share of text lines read without an error; spaces do not count.

    The outputs are probabilities [lines, steps, characters] of a CTC network (Graves et al. 2006),
    decoded greedily: repeats are one character, 0 is the blank, the last class is the space.
    `targets` holds characters [lines, n], padded with -1.
    """
    del reference
    probabilities = first(outputs)
    space = probabilities.shape[-1] - 1
    right = 0
    for steps, truth in zip(probabilities.argmax(-1), targets, strict=True):
        new = np.concatenate([[True], steps[1:] != steps[:-1]])
        read = steps[new & (steps != 0) & (steps != space)]
        right += np.array_equal(read, truth[truth >= 0])
    return right / len(targets)


def text_region_f1(
    outputs: Outputs, targets: np.ndarray, reference: Outputs | None = None
) -> float:
    """F1 of the regions of a map of probabilities [pages, 1, height, width] as text boxes.

    `targets` holds boxes (left, top, right, bottom) [pages, n, 4], padded with -1.
    """
    del reference
    hits = boxes = 0
    for probability, truth in zip(first(outputs)[:, 0], targets, strict=True):
        found, drawn = _regions(probability), truth[truth[:, 2] >= 0]
        hits += _matches(_overlaps(found, drawn.astype(float)))
        boxes += len(found) + len(drawn)
    return 2 * hits / max(1, boxes)


def _regions(probability: np.ndarray) -> np.ndarray:
    """Boxes around the connected regions of a map [height, width], float64 [regions, 4]."""
    from scipy import ndimage

    labels, _ = ndimage.label(probability > INK, np.ones((3, 3)))
    found: list[Sequence[int]] = []
    for number, (y, x) in enumerate(ndimage.find_objects(labels), 1):
        if (labels[y, x] == number).sum() > SPECK:
            found.append((x.start - MARGIN, y.start - MARGIN, x.stop + MARGIN, y.stop + MARGIN))
    return np.array(found, float).reshape(-1, 4)


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of each box of `a` with each of `b`."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    return shared / (_area(a)[:, None] + _area(b)[None] - shared + 1e-9)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _matches(overlaps: np.ndarray) -> int:
    """Number of pairs above OVERLAP, best first, each box used once."""
    left, count = overlaps.copy(), 0
    while left.size and left.max() > OVERLAP:
        row, column = np.unravel_index(left.argmax(), left.shape)
        left[row], left[:, column] = 0, 0
        count += 1
    return count
