"""The timing cache: read before a build, merged with what others wrote meanwhile, written whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploykit import _files, _locks
from deploykit.errors import InputError
from deploykit.values import Json


@contextmanager
def attached(config: Any, name: str | None) -> Iterator[Json]:
    """Give the configuration a timing cache, and keep what the block added to it.

    The yielded dictionary holds, after the block, the size in bytes before and after. Several
    builds may share a file: it is merged and written under a lock, and never torn. Raises
    InputError: it is no timing cache of this TensorRT and this GPU.
    """
    if name is None:
        yield {}
        return
    path, facts = Path(name), Json()
    with _locks.alone(path):
        before = path.read_bytes() if path.exists() else b""
    _attach(config, before, path)
    yield facts
    ours = config.get_timing_cache()
    with _locks.alone(path):
        now = path.read_bytes() if path.exists() else b""
        if now != before:
            theirs = config.create_timing_cache(now)
            if theirs is None or not ours.combine(theirs, ignore_mismatch=False):
                raise _refused(path)
        after = bytes(ours.serialize())
        with _files.staged(path) as temporary:
            temporary.write_bytes(after)
    facts |= {"bytes_before": len(before), "bytes_after": len(after)}


def _attach(config: Any, content: bytes, path: Path) -> None:
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise _refused(path)


def _refused(path: Path) -> InputError:
    return InputError(
        f"{path} is no timing cache of this TensorRT version and this GPU",
        hint="give another path, it is made if it is not there; one file a version and GPU",
    )
