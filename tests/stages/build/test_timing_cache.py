"""Files and locks are real; the caches are sets of words, since a real one needs a GPU."""

from __future__ import annotations

import fcntl
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from deploykit.errors import InputError
from deploykit.stages.build import timing_cache


class FakeCache:
    def __init__(self, words: set[bytes]) -> None:
        self.words = words

    def combine(self, other: FakeCache | None, *, ignore_mismatch: bool) -> bool:
        if other is None:
            raise TypeError  # as the bindings do with None
        assert ignore_mismatch is False
        self.words |= other.words
        return b"foreign" not in other.words

    def serialize(self) -> bytes:
        return b"cache " + b" ".join(sorted(self.words))


class FakeConfig:
    """Knows a cache by its first word; one with the word "foreign" is of another GPU."""

    def __init__(self) -> None:
        self.cache: FakeCache | None = None

    def create_timing_cache(self, content: bytes) -> FakeCache | None:
        if content and content.split()[0] != b"cache":
            return None
        return FakeCache(set(content.split()[1:]))

    def set_timing_cache(self, cache: FakeCache, *, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self.cache = cache
        return b"foreign" not in cache.words

    def get_timing_cache(self) -> FakeCache | None:
        return self.cache


def add(path: Path, word: bytes) -> dict[str, Any]:
    """A build that measures one kernel."""
    config = FakeConfig()
    with timing_cache.attached(config, str(path)) as facts:
        assert config.cache
        config.cache.words.add(word)
        if word == b"crash":
            raise RuntimeError("the builder")
    return facts


def test_a_build_without_a_cache_has_none() -> None:
    config = FakeConfig()
    with timing_cache.attached(config, None) as facts:
        assert config.cache is None
    assert facts == {}


def test_it_is_made_then_read_and_added_to(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "t.cache"
    assert add(path, b"one") == {"bytes_before": 0, "bytes_after": 9}
    assert add(path, b"two") == {"bytes_before": 9, "bytes_after": 13}
    assert path.read_bytes() == b"cache one two"


def test_what_others_wrote_meanwhile_is_kept(tmp_path: Path) -> None:
    path, config = tmp_path / "t.cache", FakeConfig()
    with timing_cache.attached(config, str(path)):
        add(path, b"theirs")
        assert config.cache
        config.cache.words.add(b"ours")
    assert path.read_bytes() == b"cache ours theirs"


def test_many_builds_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.cache"
    words = [f"w{i}".encode() for i in range(12)]
    builds = [Thread(target=add, args=(path, word)) for word in words]
    for build in builds:
        build.start()
    for build in builds:
        build.join()
    assert set(path.read_bytes().split()[1:]) == set(words)
    assert {p.name for p in tmp_path.iterdir()} == {"t.cache"}


def test_it_waits_for_the_lock(tmp_path: Path) -> None:
    path, done = tmp_path / "t.cache", Event()
    with (tmp_path / ".t.cache.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build = Thread(target=lambda: (add(path, b"one"), done.set()))
        build.start()
        assert not done.wait(0.2)
        assert not path.exists()
    build.join(timeout=20)
    assert path.read_bytes() == b"cache one"


@pytest.mark.parametrize("content", [b"\0 torn", b"cache foreign"])
def test_what_is_no_cache_of_this_gpu_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.cache"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no timing cache of this TensorRT version") as caught:
        add(path, b"one")
    assert "another path" in caught.value.hint
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"\0 torn", b"cache foreign"])
def test_one_that_is_torn_while_we_build_is_refused_and_kept(
    tmp_path: Path, content: bytes
) -> None:
    path, config = tmp_path / "t.cache", FakeConfig()
    with (
        pytest.raises(InputError, match="no timing cache"),
        timing_cache.attached(config, str(path)),
    ):
        path.write_bytes(content)
    assert path.read_bytes() == content


def test_a_build_that_fails_leaves_it_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "t.cache"
    add(path, b"one")
    with pytest.raises(RuntimeError, match="the builder"):
        add(path, b"crash")
    assert path.read_bytes() == b"cache one"
