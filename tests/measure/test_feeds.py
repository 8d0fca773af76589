from __future__ import annotations

import numpy as np
import pytest

from deploykit.errors import InputError, UsageError
from deploykit.measure import feeds
from deploykit.values import TensorSpec


def with_inputs(candidate, *specs: TensorSpec):
    artifact = candidate.artifact.model_copy(update={"inputs": specs})
    return candidate.model_copy(update={"artifact": artifact})


def test_a_pool_survives_the_disk_with_odd_names(tmp_path):
    pool = [
        {"file": np.arange(i + 1), "a/b:0": np.ones((2, i), np.float16), "": np.array(i)}
        for i in range(12)
    ]
    feeds.write(tmp_path / "pool.npz", pool)
    again = feeds.read(tmp_path / "pool.npz")
    assert len(again) == 12
    for want, have in zip(pool, again, strict=True):
        assert list(have) == list(want)
        for name, array in want.items():
            assert have[name].dtype == array.dtype
            np.testing.assert_array_equal(have[name], array)


def test_strings_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="'words' is no array of numbers"):
        feeds.write(tmp_path / "pool.npz", [{"words": np.array(["a"], object)}])
    assert list(tmp_path.iterdir()) == []


def test_real_data_makes_full_batches_in_order(fake, vectors):
    pool = feeds.make_pool([fake("steady")], 30, vectors, np.random.default_rng(0))
    assert [feed["x"].shape for feed in pool] == [(30, 16)] * 3  # 100 samples: the rest is left
    first, _ = next(iter(vectors.batches(30)))
    np.testing.assert_array_equal(pool[0]["x"], first["x"])


def test_a_pool_is_bounded(fake, vectors, monkeypatch):
    make = lambda: feeds.make_pool([fake("steady")], 10, vectors, np.random.default_rng(0))  # noqa: E731
    assert len(make()) == feeds.POOL_FEEDS
    monkeypatch.setattr(feeds, "POOL_BYTES", 3 * 10 * 16 * 4)
    assert len(make()) == 3


def test_data_of_less_than_one_batch_is_refused(fake, vectors):
    with pytest.raises(InputError, match="less than one batch of 128"):
        feeds.make_pool([fake("steady")], 128, vectors, np.random.default_rng(0))


def test_every_candidate_must_take_the_feeds(fake, vectors):
    rng = np.random.default_rng(0)
    other = fake("steady", name="other", inputs="pixels")
    with pytest.raises(InputError, match=r"other takes \['pixels'\]"):
        feeds.make_pool([fake("steady"), other], 4, vectors, rng)
    half = with_inputs(other, TensorSpec(name="x", dtype="float16", shape=("n", 16)))
    with pytest.raises(InputError, match="other: input 'x': dtype is float32"):
        feeds.make_pool([fake("steady"), half], 4, vectors, rng)


def test_random_inputs_are_of_the_models_shape_and_dtype_and_seeded(fake):
    candidate = with_inputs(
        fake("steady"),
        TensorSpec(name="x", dtype="float32", shape=("n", 3, 5)),
        TensorSpec(name="ids", dtype="int64", shape=("n", 7)),
        TensorSpec(name="pixels", dtype="uint8", shape=(4, 100)),
    )
    one, two = (feeds.make_pool([candidate], 4, None, np.random.default_rng(9)) for _ in range(2))
    assert {name: (a.dtype.name, a.shape) for name, a in one[0].items()} == {
        "x": ("float32", (4, 3, 5)),
        "ids": ("int64", (4, 7)),
        "pixels": ("uint8", (4, 100)),
    }
    assert one[0]["ids"].max() <= 1
    assert one[0]["pixels"].max() > 100
    np.testing.assert_array_equal(one[5]["x"], two[5]["x"])
    assert not np.array_equal(one[0]["x"], one[1]["x"])


def test_random_inputs_of_unknown_size_are_refused(fake):
    text = with_inputs(
        fake("steady"), TensorSpec(name="ids", dtype="int64", shape=("batch", "sequence"))
    )
    with pytest.raises(UsageError, match="'sequence' open"):
        feeds.make_pool([text], 4, None, np.random.default_rng(0))


def test_a_fixed_batch_takes_no_other_size(fake):
    fixed = fake("steady", name="fixed", batch=1)
    feeds.check_batch_sizes([fake("steady"), fixed], (1,))
    with pytest.raises(UsageError, match=r"fixed: the batch of x.* is fixed, asked for 8") as error:
        feeds.check_batch_sizes([fake("steady"), fixed], (1, 8))
    assert "--batch-sizes 1," in error.value.hint
