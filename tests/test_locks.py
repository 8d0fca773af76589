from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from deploykit import _locks
from deploykit.errors import ResourceError, UsageError
from tests.fixtures_core import python, refused, told

HOLDS = """
import sys
from pathlib import Path
from deploykit import _locks
with _locks.held(Path(sys.argv[1])):
    print("holding", flush=True)
    input()
"""


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    other = python(HOLDS, tmp_path, wait=False)
    assert other.stdout is not None
    assert other.stdout.readline() == "holding\n"
    two_lines = refused(UsageError, tmp_path, "in use by another run", hint="wait for it")
    with two_lines, _locks.held(tmp_path):
        pytest.fail("both hold the folder")
    other.kill()  # a killed process holds nothing
    told(other)
    for _ in range(2):
        with _locks.held(tmp_path):
            pass
    assert not any(tmp_path.iterdir())


def test_a_folder_is_held_where_only_what_is_open_for_writing_can_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS."""
    real = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    two_lines = refused(UsageError, tmp_path, "in use", hint="wait for it")
    with _locks.held(tmp_path), two_lines, _locks.held(tmp_path):
        pytest.fail("both hold the folder")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_takes_no_files_is_told() -> None:
    with refused(UsageError, "/proc", hint="that you may write to"), _locks.held(Path("/proc")):
        pytest.fail("it is held")


ALONE = """
import sys, time
from pathlib import Path
from deploykit import _locks
print("ready", flush=True); input()
out = Path(sys.argv[1])
with _locks.alone(out):
    count = int(out.read_text() or 0)
    time.sleep(0.02)
    out.write_text(str(count + 1))
"""


def test_one_process_at_a_time_makes_it(tmp_path: Path) -> None:
    out = tmp_path / "count"
    out.touch()
    processes = [python(ALONE, out, wait=False) for _ in range(6)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        told(process)
    assert out.read_text() == "6"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_who_waits_too_long_is_told_for_whom(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    hold = "import sys; from pathlib import Path; from deploykit import _locks\n"
    hold += "with _locks.alone(Path(sys.argv[1])): print('held', flush=True); input()"
    holder = python(hold, out, wait=False)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        with (
            refused(ResourceError, out, holder.pid, "not done in 0.2 s", hint="wait for it"),
            _locks.alone(out, wait_s=0.2),
        ):
            pytest.fail("two at once")
    finally:
        holder.kill()
        told(holder)
    assert (tmp_path / ".m.onnx.lock").exists()
    with _locks.alone(out, wait_s=0.2):  # the system freed the lock of the killed process
        pass
    assert not list(tmp_path.iterdir())
