"""The committed Fashion-MNIST splits are what their manifest and make.py say they are."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
from itertools import combinations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from deploykit.dataset import open_dataset
from tests.conftest import FASHION

SIZES = {"train": 20_000, "calibration": 512, "evaluation": 10_000}
Split = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def splits() -> dict[str, Split]:
    """Images and classes of the committed splits."""
    found = {}
    for name in SIZES:
        with np.load(FASHION / f"{name}.npz", allow_pickle=False) as arrays:
            assert sorted(arrays) == ["images", "target"]
            found[name] = (arrays["images"], arrays["target"])
    return found


@pytest.fixture(scope="module")
def manifest() -> dict[str, object]:
    document: dict[str, object] = json.loads((FASHION / "manifest.json").read_text())
    return document


@pytest.fixture
def make() -> ModuleType:
    """make.py as a module."""
    spec = importlib.util.spec_from_file_location("make_fashion_mnist", FASHION / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- what is committed


def test_sizes_shapes_and_types(splits: dict[str, Split]) -> None:
    for name, (images, target) in splits.items():
        assert (images.shape, images.dtype) == ((SIZES[name], 1, 28, 28), np.uint8)
        assert (target.shape, target.dtype) == ((SIZES[name],), np.int64)
        assert (images.min(), images.max()) == (0, 255)
        assert set(target.tolist()) == set(range(10))


def test_no_image_occurs_twice_within_or_across_the_splits(splits: dict[str, Split]) -> None:
    """The original has no duplicates either: 70,000 images, 70,000 digests."""
    digests = {
        name: {hashlib.sha256(image).digest() for image in images}
        for name, (images, _) in splits.items()
    }
    assert {name: len(found) for name, found in digests.items()} == SIZES
    shared = {pair: len(digests[pair[0]] & digests[pair[1]]) for pair in combinations(SIZES, 2)}
    assert set(shared.values()) == {0}


def test_calibration_is_stratified_and_evaluation_balanced(splits: dict[str, Split]) -> None:
    counts = {name: np.bincount(target).tolist() for name, (_, target) in splits.items()}
    assert counts["calibration"] == [52, 52, 51, 51, 51, 51, 51, 51, 51, 51]
    assert counts["evaluation"] == [1000] * 10
    assert all(1900 < n < 2100 for n in counts["train"])


def test_the_manifest_holds_the_digests_of_files_and_arrays(
    splits: dict[str, Split], manifest: dict[str, dict[str, dict[str, object]]]
) -> None:
    assert set(manifest["files"]) == {f"{name}.npz" for name in SIZES}
    for name, (images, target) in splits.items():
        said = manifest["files"][f"{name}.npz"]
        assert said["samples"] == len(target)
        assert said["sha256"] == hashlib.sha256((FASHION / f"{name}.npz").read_bytes()).hexdigest()
        assert said["arrays"] == {"images": digest(images), "target": digest(target)}


def digest(array: np.ndarray) -> str:
    """The digest that make.py describes: dtype, shape, bytes."""
    head = f"{array.dtype.str}{list(array.shape)}"
    return hashlib.sha256(head.encode() + array.tobytes()).hexdigest()


def test_all_files_are_below_15_mb_and_the_licence_is_among_them() -> None:
    files = [path for path in FASHION.rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 15e6
    assert (FASHION / "LICENCE").read_text().startswith("The MIT License")


def test_the_splits_open_as_data_sets_with_their_preprocessing() -> None:
    for name, size in SIZES.items():
        data = open_dataset(FASHION / f"{name}.npz")
        assert len(data) == size
        assert [str(s) for s in data.specs()] == ["images: float32[batch, 1, 28, 28]"]
        assert data.preprocessing is not None
        assert (data.preprocessing.mean, data.preprocessing.std) == ((0.286,), (0.353,))


def test_the_mean_and_spread_of_the_preprocessing_are_those_of_the_images(
    splits: dict[str, Split],
) -> None:
    pixels = splits["train"][0] / 255
    assert pixels.mean() == pytest.approx(0.286, abs=0.002)
    assert pixels.std() == pytest.approx(0.353, abs=0.002)


# --- how it is made


def idx(array: np.ndarray) -> bytes:
    """IDX of unsigned bytes: http://yann.lecun.com/exdb/mnist, "the IDX file format"."""
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return b"\0\0\x08" + bytes([array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def idx_files(folder: Path, train: Split, test: Split, *, packed: bool) -> Path:
    folder.mkdir()
    for kind, (images, labels) in (("train", train), ("t10k", test)):
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = idx(array)
            if packed:
                (folder / f"{kind}-{name}-ubyte.gz").write_bytes(gzip.compress(data, 1))
            else:
                (folder / f"{kind}-{name}-ubyte").write_bytes(data)
    return folder


def rebuilt(splits: dict[str, Split], make: ModuleType) -> Split:
    """A training file whose splits are the committed ones: 20,512 images and no filler.

    What is chosen depends on the number and order of the labels alone; the images take the places
    that make.py will choose from.
    """
    labels = np.concatenate([splits["calibration"][1], splits["train"][1]])
    calibration, train = make.choose(labels)
    assert len(calibration) + len(train) == len(labels)
    images = np.empty((len(labels), 28, 28), np.uint8)
    again = np.empty(len(labels), np.uint8)
    # The labels decide the places, so a place must keep its label: sort images into their class.
    pools = {
        c: {role: iter(splits[role][0][splits[role][1] == c, 0]) for role in SIZES}
        for c in range(10)
    }
    for role, places in (("calibration", calibration), ("train", train)):
        for place in places:
            images[place] = next(pools[int(labels[place])][role])
            again[place] = labels[place]
    return images, again


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_make_writes_the_committed_images_from_idx_files(
    splits: dict[str, Split], make: ModuleType, tmp_path: Path, packed: bool
) -> None:
    images, labels = rebuilt(splits, make)
    evaluation, classes = splits["evaluation"]
    if packed:  # the same test images, fewer: compressing them is what takes the time
        evaluation, classes = evaluation[:500], classes[:500]
    source = idx_files(
        tmp_path / "idx", (images, labels), (evaluation[:, 0], classes), packed=packed
    )
    out = tmp_path / "out"
    out.mkdir()
    make.main(source, out)
    said = json.loads((out / "manifest.json").read_text())["files"]
    for name in SIZES:
        with np.load(out / f"{name}.npz") as arrays:
            pixels, target = arrays["images"], arrays["target"]
        assert said[f"{name}.npz"]["samples"] == len(target)
        assert said[f"{name}.npz"]["arrays"] == {"images": digest(pixels), "target": digest(target)}
        assert by_class(pixels, target) == by_class(
            *((evaluation, classes) if name == "evaluation" else splits[name])
        )
    assert said["evaluation.npz"]["arrays"]["images"] == digest(evaluation)


def by_class(images: np.ndarray, target: np.ndarray) -> set[tuple[int, bytes]]:
    return {(int(c), hashlib.sha256(i).digest()) for i, c in zip(images, target, strict=True)}


def test_the_choice_is_stratified_disjoint_ordered_and_repeatable(make: ModuleType) -> None:
    labels = np.random.default_rng(3).integers(0, 10, 25_000).astype(np.uint8)
    calibration, train = make.choose(labels)
    assert np.bincount(labels[calibration]).tolist() == [52, 52] + [51] * 8
    assert len(train) == 20_000
    assert not set(calibration) & set(train)
    assert (np.diff(calibration) > 0).all()
    assert (np.diff(train) > 0).all()
    assert train.max() > 24_000  # from all of the data, not from its head
    again = make.choose(labels)
    assert all(map(np.array_equal, again, (calibration, train)))


def test_the_gzipped_file_is_preferred_and_both_are_read_alike(
    make: ModuleType, tmp_path: Path
) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "x").write_bytes(idx(array))
    assert np.array_equal(make.read_idx(tmp_path, "x"), array)
    (tmp_path / "x.gz").write_bytes(gzip.compress(idx(array[:1])))
    assert np.array_equal(make.read_idx(tmp_path, "x"), array[:1])


@pytest.mark.parametrize("head", [b"\0\0\x09\x01", b"PK\x03\x04", b""])
def test_what_is_no_idx_file_of_bytes_is_refused(
    make: ModuleType, tmp_path: Path, head: bytes
) -> None:
    (tmp_path / "x").write_bytes(head + bytes(16) if head else b"")
    with pytest.raises(SystemExit, match=r"x: not an IDX file of unsigned bytes"):
        make.read_idx(tmp_path, "x")
