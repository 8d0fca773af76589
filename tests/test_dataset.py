from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deploykit import _npz
from deploykit.dataset import Dataset, open_dataset, picked
from deploykit.errors import InputError
from deploykit.preprocessing import normalize, read_image, read_preprocessing
from deploykit.values import Array, TensorSpec
from tests.conftest import FASHION
from tests.fixtures_core import fine_or_refused, refused

RNG = np.random.default_rng(0)
SPEC = 'input = "images"\ncolor = "gray"\nmean = [0.5]\nstd = [0.25]\n'
X = TensorSpec(name="x", dtype="float32", shape=("batch", 3))


def numbered(count: int, start: int = 0) -> dict[str, Array]:
    """Samples that can be told apart, of two inputs and a label."""
    n = np.arange(start, start + count)
    return {
        "x": np.repeat(n[:, None], 3, 1).astype(np.float32),
        "words": n[:, None] * 10,
        "target": n,
    }


def saved(path: Path, **arrays: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def function(folder: Path, body: str, name: str = "data.py") -> str:
    (folder / name).write_text(f"import numpy as np\nimport itertools\n{body}")
    return f"{folder / name}:samples"


def joined(data: Dataset, size: int) -> dict[str, Array]:
    """All batches of a size, stacked; each but the last is full."""
    batches = [{**feed, "target": target} for feed, target in data.batches(size)]
    sizes = [len(batch["x"]) for batch in batches]
    assert all(n == size for n in sizes[:-1])
    assert 0 < sizes[-1] <= size
    assert all(len(a) == n for b, n in zip(batches, sizes, strict=True) for a in b.values())
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


def alike(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one
    )


# --- batches


@settings(max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 40), st.integers(1, 60))
def test_any_batch_size_over_any_chunks_gives_the_same_samples_in_order(
    chunks: list[int], size: int, count: int
) -> None:
    starts = np.cumsum([0, *chunks])
    data = Dataset(
        "here", sum(chunks), "digest",
        lambda: iter([numbered(n, int(s)) for n, s in zip(chunks, starts, strict=False)]),
    )  # fmt: skip
    assert alike(joined(data, size), numbered(len(data)))
    first = data.first(count)
    assert len(first) == min(count, len(data))
    assert alike(joined(first, size), numbered(len(first)))
    assert alike(joined(data, size), numbered(len(data)))  # again


def test_first_is_told_from_the_whole_by_its_digest() -> None:
    data = Dataset("here", 10, "digest", lambda: iter([numbered(10)]))
    digests = [data.first(n).digest for n in (1, 2, 9)] + [data.first(5).first(2).digest]
    assert len({*digests, "digest"}) == 5
    assert data.first(10) is data
    assert data.first(99) is data
    assert data.first(2).digest == digests[1]


def test_a_first_that_ends_in_a_chunk_reads_no_further() -> None:
    def chunks() -> Any:
        yield numbered(4)
        pytest.fail("the second chunk was read")

    data = Dataset("here", 8, "digest", chunks).first(3)
    assert alike(joined(data, 2), numbered(3))


def test_data_without_labels_has_no_targets(tmp_path: Path) -> None:
    data = open_dataset(saved(tmp_path / "x.npz", x=numbered(3)["x"]))
    assert [target for _, target in data.batches(2)] == [None, None]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, bad: float, dtype: Any) -> None:
    x = np.zeros((5, 3), dtype)
    x[3, 1] = bad
    data = open_dataset(saved(tmp_path / "x.npz", x=x))
    with refused(InputError, tmp_path, "'x'", "NaN or infinite", hint="clean the data"):
        list(data.batches(2))
    assert len(list(data.first(3).batches(2))) == 2


# --- fitting the model


def test_data_is_bound_to_what_the_model_takes(tmp_path: Path) -> None:
    data = open_dataset(saved(tmp_path / "x.npz", x=numbered(3)["x"], target=np.arange(3)))
    bound = data.matching((X,))
    assert bound.inputs == (X,)
    assert len(list(bound.batches(2))) == 2
    assert data.inputs == ()


@pytest.mark.parametrize(
    ("names", "facts"),
    [
        ({"y"}, ["the model input 'x'", "has ['y']"]),
        (set(), ["no arrays"]),
        ({"x", "label"}, ["'label' is no input", "takes ['x']"]),
    ],
)
def test_names_are_those_of_the_model(tmp_path: Path, names: set[str], facts: list[str]) -> None:
    arrays = {name: np.zeros((2, 3), np.float32) for name in names}
    path = saved(tmp_path / "x.npz", **arrays, target=np.zeros(2))
    with refused(InputError, path, *facts, hint="name "):
        open_dataset(path).matching((X,))


@pytest.mark.parametrize(
    ("array", "fact"),
    [
        (np.zeros((4, 3)), "dtype is float64, the model wants float32"),
        (np.zeros((4, 3), np.uint8), "dtype is uint8, the model wants float32"),
        (np.zeros((4, 2), np.float32), "the model wants x: float32[batch, 3]"),
        (np.zeros((4, 3, 1), np.float32), "the model wants x: float32[batch, 3]"),
        (np.zeros(4, np.float32), "the model wants x: float32[batch, 3]"),
        (np.array([["a"] * 3] * 4), "the model wants float32"),
    ],
)
def test_dtype_and_shape_are_those_of_the_model(tmp_path: Path, array: Array, fact: str) -> None:
    data = open_dataset(saved(tmp_path / "x.npz", x=array)).matching((X,))
    with refused(InputError, tmp_path, "'x'", fact, hint="preprocessing.toml"):
        list(data.batches(2))


def test_a_fixed_batch_is_no_matter_of_the_data(tmp_path: Path) -> None:
    data = open_dataset(saved(tmp_path / "x.npz", x=numbered(3)["x"]))
    fixed = X.model_copy(update={"shape": (8, 3)})
    assert len(list(data.matching((fixed,)).batches(2))) == 2


def test_data_says_what_it_is(tmp_path: Path) -> None:
    specs = open_dataset(saved(tmp_path / "x.npz", **numbered(3))).specs()
    assert specs == (X, TensorSpec(name="words", dtype="int64", shape=("batch", 1)))


# --- samples that are equal


def test_equal_samples_have_equal_digests(tmp_path: Path) -> None:
    arrays = numbered(6)
    one = open_dataset(saved(tmp_path / "a.npz", **arrays)).sample_digests()
    assert len(one) == 6
    turned = {name: array[::-1] for name, array in arrays.items()}
    assert open_dataset(saved(tmp_path / "b.npz", **turned)).sample_digests() == one
    relabelled = {**arrays, "target": arrays["target"] + 1}
    assert open_dataset(saved(tmp_path / "c.npz", **relabelled)).sample_digests() == one
    other = {**arrays, "words": arrays["words"] + (np.arange(6) == 2)[:, None]}
    assert len(open_dataset(saved(tmp_path / "d.npz", **other)).sample_digests() & one) == 5


# --- .npz


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, start, count in (("b", 3, 4), ("a", 0, 3), ("c", 7, 1)):
        saved(tmp_path / f"{name}.npz", **numbered(count, start))
    data = open_dataset(tmp_path)
    assert len(data) == 8
    assert alike(joined(data, 3), numbered(8))
    assert data.reference == str(tmp_path)


def test_the_digest_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    one = open_dataset(saved(tmp_path / "a" / "x.npz", **numbered(4)))
    same = open_dataset(saved(tmp_path / "b" / "y.npz", **numbered(4)))
    other = open_dataset(saved(tmp_path / "c" / "x.npz", **numbered(4, 1)))
    assert one.digest == same.digest != other.digest
    saved(tmp_path / "a" / "z.npz", **numbered(4, 4))
    assert open_dataset(tmp_path / "a").digest != one.digest


@pytest.mark.parametrize(
    ("arrays", "fact"),
    [
        ({}, "no arrays"),
        ({"target": np.zeros(3)}, "no arrays"),
        ({"x": np.zeros((0, 3))}, "the data is empty"),
        ({"x": np.float32(1)}, "the data is empty"),
        ({"x": np.zeros((3, 1)), "target": np.zeros(2)}, "{'x': 3, 'target': 2}"),
        ({"x": np.zeros((3, 1)), "target": np.float32(0)}, "{'x': 3, 'target': 0}"),
        ({"x": np.array([{}, {}])}, "not a readable .npz of plain arrays"),
    ],
)
def test_arrays_that_are_no_data_are_refused(
    tmp_path: Path, arrays: dict[str, Any], fact: str
) -> None:
    path = saved(tmp_path / "x.npz", **arrays)
    with refused(InputError, path, fact, hint=""):
        open_dataset(path)


def test_pickled_objects_are_not_opened(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    path = saved(tmp_path / "x.npz", x=np.array([Payload()], object))
    with refused(InputError, path, "holds Python objects", hint="pickled objects are refused"):
        open_dataset(path)
    assert not marker.exists()


@pytest.mark.parametrize("data", [b"", b"hello", b"PK\x03\x04", b"\x93NUMPY"])
def test_what_is_no_npz_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(data)
    with refused(InputError, path, "not a readable .npz", hint="numpy.savez"):
        open_dataset(path)


def test_an_npy_in_disguise_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 3)))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with refused(InputError, tmp_path / "x.npz", "not a readable .npz", hint="numpy.savez"):
        open_dataset(tmp_path / "x.npz")


@settings(max_examples=200)
@given(st.data(), st.booleans())
def test_a_damaged_npz_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, packed: bool
) -> None:
    folder = (
        tmp_path_factory.getbasetemp() / "damaged_npz"
    )  # one for all examples, of this test alone
    folder.mkdir(exist_ok=True)
    path = folder / "damaged.npz"
    (np.savez_compressed if packed else np.savez)(path, **numbered(20))
    damaged = bytearray(path.read_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged[: data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))])
    with fine_or_refused(path):
        list(open_dataset(path).batches(8))


def test_a_lack_of_memory_is_no_fault_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise MemoryError

    path = saved(tmp_path / "x.npz", **numbered(2))
    data = open_dataset(path)
    monkeypatch.setattr(np, "frombuffer", fails)
    with pytest.raises(MemoryError):
        list(data.batches(1))


@pytest.mark.parametrize(
    "second",
    [
        {"x": np.zeros((4, 3), np.float32)},
        {"x": np.zeros((4, 3)), "target": np.arange(4)},
        {"x": np.zeros((4, 2), np.float32), "target": np.arange(4)},
        {"x": np.zeros((4, 3), np.float32), "target": np.arange(4), "y": np.zeros(4)},
        {"x": np.zeros((4, 3), np.float32), "target": np.zeros((4, 1), int)},
    ],
    ids=["no target", "dtype", "shape", "another name", "shape of target"],
)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_files_that_are_not_alike_are_refused_at_any_batch_size(
    tmp_path: Path, second: dict[str, Array], size: int
) -> None:
    saved(tmp_path / "a.npz", x=np.zeros((4, 3), np.float32), target=np.arange(4))
    saved(tmp_path / "b.npz", **second)
    with refused(InputError, tmp_path, "names, dtypes or shapes", hint="every sample the same"):
        list(open_dataset(tmp_path).batches(size))


# --- preprocessing


def test_pixels_are_normalized_as_the_file_beside_them_says(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (5, 1, 4, 4), np.uint8)
    path = saved(tmp_path / "x.npz", images=pixels, target=np.arange(5), mask=pixels)
    bare = open_dataset(path)
    (tmp_path / "preprocessing.toml").write_text(SPEC)
    data = open_dataset(path)
    ((feed, target),) = data.batches(9)
    assert np.array_equal(feed["images"], normalize(pixels, read_preprocessing(_spec(tmp_path))))
    assert feed["images"].dtype == np.float32
    assert np.array_equal(feed["mask"], pixels)  # the file speaks of one input
    assert np.array_equal(target, np.arange(5))
    assert data.preprocessing == read_preprocessing(_spec(tmp_path))
    assert bare.preprocessing is None
    digests = {bare.digest, data.digest}
    _spec(tmp_path).write_text(SPEC.replace("0.5", "0.4"))
    assert len({*digests, open_dataset(path).digest}) == 3


def _spec(folder: Path) -> Path:
    return folder / "preprocessing.toml"


@pytest.mark.parametrize(
    ("arrays", "facts", "hint"),
    [
        ({"x": np.zeros((2, 1, 4, 4), np.uint8)}, ["'images'", "['x']"], "correct 'input'"),
        ({"images": np.zeros((2, 1, 4, 4), np.float32)}, ["8-bit", "float32"], "remove preproc"),
    ],
)
def test_preprocessing_of_other_data_is_refused(
    tmp_path: Path, arrays: dict[str, Array], facts: list[str], hint: str
) -> None:
    path = saved(tmp_path / "x.npz", **arrays)
    _spec(tmp_path).write_text(SPEC)
    with refused(InputError, path, *facts, hint=hint):
        list(open_dataset(path).batches(1))


def test_the_committed_images_are_read() -> None:
    data = open_dataset(FASHION / "calibration.npz")
    assert (len(data), data.preprocessing is not None) == (512, True)
    feed, target = next(data.batches(512))
    assert target is not None
    assert (feed["images"].shape, feed["images"].dtype) == ((512, 1, 28, 28), np.float32)
    assert abs(feed["images"].mean()) < 0.1
    assert abs(feed["images"].std() - 1) < 0.1


# --- images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of two classes, and a file that is none."""
    folder = tmp_path / "photos"
    for index, name in enumerate(["dog/b.png", "cat/z.PNG", "cat/a.jpg", "dog/a.bmp"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 6), 60 * index, np.uint8)).save(path)
    (folder / "dog" / "notes.txt").write_text("no image")
    _spec(folder).write_text(SPEC)
    return folder


def test_images_are_read_by_name_and_labelled_by_folder(photos: Path) -> None:
    data = open_dataset(photos)
    assert len(data) == 4
    ((feed, target),) = data.batches(9)
    assert target is not None
    assert target.tolist() == [0, 0, 1, 1]
    spec = read_preprocessing(_spec(photos))
    files = [photos / n for n in ("cat/a.jpg", "cat/z.PNG", "dog/a.bmp", "dog/b.png")]
    want = [normalize(read_image(file, spec)[None], spec) for file in files]
    assert np.array_equal(feed["images"], np.concatenate(want))
    assert data.specs() == (TensorSpec(name="images", dtype="float32", shape=("batch", 1, 6, 6)),)


def test_images_that_lie_in_no_class_have_no_labels(photos: Path) -> None:
    (photos / "dog" / "b.png").rename(photos / "b.png")
    assert [target for _, target in open_dataset(photos).batches(2)] == [None, None]


def test_the_digest_of_images_is_of_names_content_and_preprocessing(photos: Path) -> None:
    digests = [open_dataset(photos).digest]
    (photos / "dog" / "b.png").rename(photos / "cat" / "b.png")
    digests.append(open_dataset(photos).digest)
    Image.fromarray(np.full((6, 6), 9, np.uint8)).save(photos / "cat" / "b.png")
    digests.append(open_dataset(photos).digest)
    _spec(photos).write_text(SPEC.replace("0.5", "0.4"))
    digests.append(open_dataset(photos).digest)
    assert len(set(digests)) == 4
    assert open_dataset(photos).digest == digests[-1]


def test_images_need_a_spec(photos: Path) -> None:
    _spec(photos).unlink()
    with refused(InputError, photos, "need a preprocessing spec", hint=str(_spec(photos))):
        open_dataset(photos)


def test_images_of_different_sizes_are_refused_without_a_resize(photos: Path) -> None:
    Image.fromarray(np.zeros((7, 6), np.uint8)).save(photos / "dog" / "b.png")
    with refused(InputError, photos, "[1, 7, 6]", hint="every sample the same"):
        list(open_dataset(photos).batches(1))
    _spec(photos).write_text(SPEC + "resize = [5, 5]\n")
    assert len(list(open_dataset(photos).batches(1))) == 4


def test_an_image_that_is_none_is_named(photos: Path) -> None:
    (photos / "dog" / "b.png").write_bytes(b"no png")
    with refused(InputError, photos / "dog" / "b.png", "not a readable image", hint="remove it"):
        list(open_dataset(photos).batches(4))


# --- functions


@pytest.mark.parametrize(
    "body",
    [
        "def samples():\n  for i in range(5): yield {'x': np.full(3, i, 'f')}, i",
        "def samples(): return [({'x': np.full(3, i, 'f')}, i) for i in range(5)]",
        "class samples:\n  __iter__ = lambda s: (({'x': np.full(3, i, 'f')}, i) for i in range(5))",
    ],
    ids=["generator", "list", "iterable"],
)
def test_a_function_gives_samples(tmp_path: Path, body: str) -> None:
    data = open_dataset(function(tmp_path, body))
    assert len(data) == 5
    for size in (2, 5, 9):
        found = joined(data, size)
        assert np.array_equal(found["x"], numbered(5)["x"])
        assert np.array_equal(found["target"], np.arange(5))


def test_a_function_may_give_feeds_alone(tmp_path: Path) -> None:
    body = "def samples(): return [{'x': [1.5, 2.5]}, {'x': [0.0, 0.0]}]"
    ((feed, target),) = open_dataset(function(tmp_path, body)).batches(2)
    assert target is None
    assert feed["x"].tolist() == [[1.5, 2.5], [0.0, 0.0]]


def test_the_digest_of_a_function_is_of_what_it_gives(tmp_path: Path) -> None:
    bodies = [
        "def samples(): return [{'x': np.zeros(2, 'f')}, {'x': np.zeros(2, 'f')}]",
        "def samples(): yield from [{'x': np.zeros(2, 'f')}] * 2",
        "def samples(): return [{'x': np.zeros(2, 'f')}] * 3",
        "def samples(): return [{'y': np.zeros(2, 'f')}] * 2",
        "def samples(): return [{'x': np.zeros(2, 'i')}] * 2",
        "def samples(): return [{'x': np.zeros((2, 1), 'f')}] * 2",
        "def samples(): return [({'x': np.zeros(2, 'f')}, 0)] * 2",
    ]
    digests = [
        open_dataset(function(tmp_path, body, f"d{i}.py")).digest for i, body in enumerate(bodies)
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == len(digests) - 1


@pytest.mark.parametrize(
    ("body", "facts", "hint"),
    [
        ("def samples(): return 5", ["gives int, not an iterable"], "feeds"),
        ("def samples(): return []", ["the data is empty"], "at least one sample"),
        ("def samples(): return [5]", ["yields int, not a feed"], "{name: array}"),
        ("def samples(): return [(1, 2)]", ["yields int, not a feed"], "{name: array}"),
        ("def samples(): return [{}]", ["no arrays"], "each model input"),
        ("def samples(): return [({}, 1)]", ["no arrays"], "each model input"),
        ("def samples(): raise KeyError('boom')", ["raises KeyError: 'boom'"], "without arguments"),
        ("def samples(): raise SystemExit(0)", ["raises SystemExit: 0"], "without arguments"),
        (
            "rng = np.random.default_rng(0)\ndef samples(): return [{'x': rng.random(3)}]",
            ["other samples the second time"],
            "seed what is random",
        ),
        ("def samples(path): return []", ["raises TypeError", "'path'"], "without arguments"),
        ("def samples():\n  yield {'x': [1.0]}\n  1 / 0", ["ZeroDivisionError"], "one sample"),
        ("once = iter([{'x': [1.0]}])\ndef samples(): return once", ["second time"], "starts anew"),
    ],
)
def test_a_function_that_gives_no_data_is_refused(
    tmp_path: Path, body: str, facts: list[str], hint: str
) -> None:
    reference = function(tmp_path, body)
    with refused(InputError, reference, *facts, hint=hint):
        open_dataset(reference)


def test_a_lack_of_memory_is_no_fault_of_a_function(tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        open_dataset(function(tmp_path, "def samples(): raise MemoryError"))


def test_a_function_that_gives_less_and_less_is_noticed(tmp_path: Path) -> None:
    body = "left = [9, 9, 5]\ndef samples(): return [{'x': [1.0]}] * left.pop(0)"
    data = open_dataset(function(tmp_path, body))
    with refused(InputError, "data.py:samples", "fewer samples the second time", hint="anew"):
        list(data.batches(2))


def test_samples_that_are_not_alike_are_refused(tmp_path: Path) -> None:
    body = "def samples(): return [{'x': [1.0]}, {'x': [1.0, 2.0]}]"
    with refused(InputError, "data.py:samples", "[1]", "[2]", hint="every sample the same"):
        list(open_dataset(function(tmp_path, body)).batches(1))


def test_an_absent_function_is_named(tmp_path: Path) -> None:
    reference = function(tmp_path, "def samples(): return []")
    with refused(InputError, "'sample'", hint="did you mean 'samples'?"):
        open_dataset(reference.removesuffix("s"))


# --- references


@pytest.mark.parametrize(
    ("name", "fact"),
    [("absent.npz", "no such data"), ("data.csv", "unknown kind"), ("empty", "neither .npz files")],
)
def test_what_is_no_data_is_refused(tmp_path: Path, name: str, fact: str) -> None:
    (tmp_path / "data.csv").write_text("1,2")
    (tmp_path / "empty").mkdir()
    with refused(InputError, tmp_path / name, fact, hint="give"):
        open_dataset(tmp_path / name)


def test_opening_does_not_change_the_data(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.npz", **numbered(5))
    before = hashlib.sha256(path.read_bytes()).digest()
    data = open_dataset(path)
    for feed, _ in data.batches(2):
        feed["x"][:] = -1  # a careless user of the batch
    assert alike(joined(data, 5), numbered(5))
    assert hashlib.sha256(path.read_bytes()).digest() == before


def test_a_large_npz_is_read_in_parts_that_join_to_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_npz, "CHUNK_BYTES", 100)
    values = np.arange(7 * 6, dtype=np.float32).reshape(7, 6)
    turned = np.asfortranarray(values)
    for name, array in (("rows.npz", values), ("columns.npz", turned)):
        path = saved(tmp_path / name, x=array, target=np.arange(7))
        parts = list(_npz.chunks(path))
        assert len(parts) > 1 or name == "columns.npz"
        assert np.array_equal(np.concatenate([part["x"] for part in parts]), values)
        assert np.concatenate([part["target"] for part in parts]).tolist() == [*range(7)]


def test_a_split_takes_each_sample_once(tmp_path: Path) -> None:
    data = open_dataset(saved(tmp_path / "x.npz", **numbered(11))).first(10)
    rest, held = data.split(4)
    numbers = [
        [float(x) for feed, _ in part.batches(3) for x in feed["x"].reshape(-1)]
        for part in (data, rest, held)
    ]
    assert sorted(numbers[1] + numbers[2]) == numbers[0]
    assert (len(rest), len(held)) == (8, 2)
    assert len({data.digest, rest.digest, held.digest}) == 3


def test_a_part_has_no_period_and_is_the_same_each_time() -> None:
    apart = np.flatnonzero(picked(8003, 8))
    assert np.array_equal(apart // 8, np.arange(1000))
    assert np.bincount(apart % 8).min() > 80
    assert np.array_equal(apart, np.flatnonzero(picked(8003, 8)))


@pytest.mark.parametrize("shape", [(2, "batch", 4), ()], ids=str)
def test_an_input_whose_first_axis_is_not_the_batch_is_refused(
    shape: tuple[int | str, ...], tmp_path: Path
) -> None:
    data = open_dataset(saved(tmp_path / "x.npz", x=np.ones((3, 4), np.float32), s=np.ones(3)))
    state = TensorSpec(name="s", dtype="float64", shape=shape)
    with pytest.raises(InputError, match=r"the first axis of s: .* does not count samples"):
        data.matching((X, state))
