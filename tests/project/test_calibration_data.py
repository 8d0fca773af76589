"""The committed Fashion-MNIST splits, and the script that makes them."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from deploykit.dataset import open_dataset
from deploykit.values import Array
from tests.conftest import FASHION

SAMPLES = {"calibration": 512, "train": 20_000, "evaluation": 10_000}
ORIGINALS = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts them."""


@pytest.fixture(scope="module")
def splits() -> dict[str, dict[str, Array]]:
    return {name: arrays(FASHION / f"{name}.npz") for name in SAMPLES}


def arrays(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def rows(images: Array) -> list[bytes]:
    return [image.tobytes() for image in images]


def array_digest(array: Array) -> str:
    head = f"{array.dtype.str}{list(array.shape)}".encode()
    return hashlib.sha256(head + array.tobytes()).hexdigest()


def check_manifest(folder: Path) -> None:
    """Every file is listed with its samples and the digests of itself and its arrays."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert files.keys() == {path.name for path in folder.glob("*.npz")}
    for name, entry in files.items():
        found = arrays(folder / name)
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert entry["arrays"] == {key: array_digest(array) for key, array in found.items()}
        assert {len(array) for array in found.values()} == {entry["samples"]}


# --- what is committed


def test_the_splits_have_their_sizes_and_types(splits: dict[str, dict[str, Array]]) -> None:
    for name, count in SAMPLES.items():
        images, target = splits[name]["images"], splits[name]["target"]
        assert set(splits[name]) == {"images", "target"}
        assert (images.shape, images.dtype) == ((count, 1, 28, 28), np.uint8)
        assert (target.shape, target.dtype) == ((count,), np.int64)
        assert set(np.unique(target)) == set(range(10))


def test_no_image_is_in_two_splits_or_twice_in_one(splits: dict[str, dict[str, Array]]) -> None:
    """Fashion-MNIST's 70,000 images all differ (checked), so these must."""
    images = [row for split in splits.values() for row in rows(split["images"])]
    assert len(images) == len(set(images)) == sum(SAMPLES.values())


def test_no_sample_is_in_two_splits_as_the_model_sees_them() -> None:
    seen = {name: open_dataset(FASHION / f"{name}.npz").sample_digests() for name in SAMPLES}
    assert {name: len(digests) for name, digests in seen.items()} == SAMPLES
    assert len(set.union(*seen.values())) == sum(SAMPLES.values())


def test_calibration_is_stratified(splits: dict[str, dict[str, Array]]) -> None:
    counts = np.bincount(splits["calibration"]["target"])
    assert counts.tolist() == [52, 52] + [51] * 8
    assert np.bincount(splits["evaluation"]["target"]).tolist() == [1000] * 10
    assert np.bincount(splits["train"]["target"]).min() > 1800


def test_the_manifest_tells_the_truth() -> None:
    check_manifest(FASHION)
    manifest = json.loads((FASHION / "manifest.json").read_text())
    assert "LICENCE" in manifest["licence"]
    assert "Copyright" in (FASHION / "LICENCE").read_text()


def test_the_preprocessing_is_that_of_the_train_images(
    splits: dict[str, dict[str, Array]],
) -> None:
    spec = open_dataset(FASHION / "calibration.npz").preprocessing
    assert spec is not None
    pixels = splits["train"]["images"] / 255
    assert spec.mean[0] == pytest.approx(pixels.mean(), abs=2e-3)
    assert spec.std[0] == pytest.approx(pixels.std(), abs=2e-3)


def test_all_is_below_15_megabytes() -> None:
    assert sum(path.stat().st_size for path in FASHION.rglob("*")) < 15e6


# --- the script

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def idx(array: Array) -> bytes:
    """The IDX format: zero, zero, 8 for unsigned bytes, rank; sizes; values."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def originals(folder: Path, splits: dict[str, dict[str, Array]], *, packed: bool) -> Path:
    """Four IDX files of real images: 700 to train with, 60 to test with."""
    folder.mkdir()
    for name, split, count in (("train", "train", 700), ("t10k", "evaluation", 60)):
        images, target = (splits[split][key][:count] for key in ("images", "target"))
        for kind, array in ((IMAGES, images[:, 0]), (LABELS, target)):
            path, data = folder / f"{name}-{kind}", idx(array)
            if packed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(data))
            else:
                path.write_bytes(data)
    return folder


def made(source: Path, out: Path, extra: Iterable[str] = ()) -> subprocess.CompletedProcess[str]:
    out.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, FASHION / "make.py", source, out, *extra],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_makes_the_splits_of_the_originals(
    splits: dict[str, dict[str, Array]], tmp_path: Path
) -> None:
    source = originals(tmp_path / "idx", splits, packed=True)
    done = made(source, tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    check_manifest(tmp_path / "out")
    found = {name: arrays(tmp_path / "out" / f"{name}.npz") for name in SAMPLES}

    # The evaluation split is the test images, as they are.
    for key in ("images", "target"):
        assert np.array_equal(found["evaluation"][key], splits["evaluation"][key][:60])

    # The other two share out the train images, each with its label, in the order of the originals.
    place = {row: i for i, row in enumerate(rows(splits["train"]["images"][:700]))}
    indices = {
        name: [place[row] for row in rows(found[name]["images"])]
        for name in ("calibration", "train")
    }
    assert [len(i) for i in indices.values()] == [512, 188]
    assert sorted(indices["calibration"] + indices["train"]) == list(range(700))
    for name, chosen in indices.items():
        assert chosen == sorted(chosen)
        assert np.array_equal(found[name]["target"], splits["train"]["target"][chosen])

    # As many of each class as there are, up to the same number.
    there = np.bincount(splits["train"]["target"][:700])
    wanted = np.minimum(there, [52, 52] + [51] * 8)
    assert np.bincount(found["calibration"]["target"]).tolist() == wanted.tolist()


def test_the_script_makes_the_same_of_plain_files_and_again(
    splits: dict[str, dict[str, Array]], tmp_path: Path
) -> None:
    for name, packed in (("packed", True), ("plain", False), ("again", False)):
        source = originals(tmp_path / name, splits, packed=packed)
        assert made(source, tmp_path / f"{name}-out").returncode == 0
    one, *others = (
        {p.name: p.read_bytes() for p in (tmp_path / f"{name}-out").iterdir()}
        for name in ("packed", "plain", "again")
    )
    assert others == [one, one]
    assert len(one) == 4


def test_the_script_refuses_other_files(
    splits: dict[str, dict[str, Array]], tmp_path: Path
) -> None:
    source = originals(tmp_path / "idx", splits, packed=False)
    (source / f"train-{IMAGES}").write_bytes(b"\x89PNG")
    done = made(source, tmp_path / "out")
    assert done.returncode == 1
    assert f"train-{IMAGES}: not an IDX file of unsigned bytes" in done.stderr
    assert not list((tmp_path / "out").iterdir())


def test_the_script_says_how_it_is_called(tmp_path: Path) -> None:
    done = made(tmp_path, tmp_path, ["one too many"])
    assert done.returncode == 1
    assert "make.py FOLDER_OF_IDX_FILES [OUTPUT_FOLDER]" in done.stderr


@pytest.mark.skipif(not ORIGINALS.exists(), reason=f"the originals are not in {ORIGINALS}")
def test_the_originals_give_what_is_committed(tmp_path: Path) -> None:
    assert made(ORIGINALS, tmp_path).returncode == 0
    for name in (*(f"{split}.npz" for split in SAMPLES), "manifest.json"):
        committed, again = FASHION / name, tmp_path / name
        if name.endswith(".npz"):  # the packed bytes may differ by the version of zlib
            want, have = arrays(committed), arrays(again)
            assert all(np.array_equal(want[key], have[key]) for key in want)
        else:
            assert json.loads(again.read_text()).keys() == json.loads(committed.read_text()).keys()
