"""Make the Fashion-MNIST splits from the four original IDX files.

    python calibration_data/fashion_mnist/make.py FOLDER_OF_IDX_FILES [OUTPUT_FOLDER]

FOLDER holds train-images-idx3-ubyte(.gz), train-labels-idx1-ubyte(.gz), and the same two of t10k;
Debian's package dataset-fashion-mnist installs them in /usr/share/datasets/fashion-mnist.

Three disjoint splits are written, `images` uint8 [n, 1, 28, 28] and `target` int64 [n]:
calibration (512, stratified by class) and train (20,000) from the 60,000 training images,
evaluation (all 10,000 test images). manifest.json holds digests of the files and of their arrays.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

CALIBRATION, TRAIN, SEED = 512, 20_000, 7


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Read one IDX file of uint8, plain or gzipped."""
    packed, plain = folder / f"{name}.gz", folder / name
    data = gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    if data[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{folder / name}: not an IDX file of unsigned bytes")
    rank = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def choose(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the calibration split, stratified by class, and of the train split."""
    order = np.random.default_rng(SEED).permutation(len(labels))
    classes = np.unique(labels)
    share, extra = divmod(CALIBRATION, len(classes))
    wanted = {c: share + (i < extra) for i, c in enumerate(classes)}
    calibration = np.concatenate([order[labels[order] == c][:n] for c, n in wanted.items()])
    rest = order[~np.isin(order, calibration)]
    return np.sort(calibration), np.sort(rest[:TRAIN])


def digest(array: np.ndarray) -> str:
    """sha256 of dtype, shape and bytes."""
    head = f"{array.dtype.str}{list(array.shape)}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def main(source: Path, out: Path) -> None:
    images, labels = (read_idx(source, f"train-{k}-ubyte") for k in ("images-idx3", "labels-idx1"))
    test, test_labels = (
        read_idx(source, f"t10k-{k}-ubyte") for k in ("images-idx3", "labels-idx1")
    )
    calibration, train = choose(labels)
    splits = {
        "calibration": (images[calibration], labels[calibration]),
        "train": (images[train], labels[train]),
        "evaluation": (test, test_labels),
    }
    manifest: dict[str, object] = {
        "name": "Fashion-MNIST",
        "origin": "https://github.com/zalandoresearch/fashion-mnist (Xiao, Rasul, Vollgraf, 2017)",
        "licence": "MIT, see LICENCE",
        "seed": SEED,
        "files": (files := {}),
    }
    for name, (pixels, target) in splits.items():
        arrays = {"images": pixels[:, None], "target": target.astype(np.int64)}
        path = out / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        files[path.name] = {
            "samples": len(target),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "arrays": {key: digest(array) for key, array in arrays.items()},
        }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else Path(__file__).parent)
