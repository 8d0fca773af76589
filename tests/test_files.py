from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit import _files
from deploykit.errors import ResourceError, UsageError
from tests.fixtures_core import python, refused, told

IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from deploykit import _files
with _files.staged(Path(sys.argv[1])) as temporary:
    temporary.mkdir()
    (temporary / "part").write_text("half")
    {end}
"""

OVER_THE_LIMIT = """
import resource, sys
from pathlib import Path
from deploykit import _files
from deploykit.errors import ResourceError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with _files.staged(Path(sys.argv[1])) as temporary:
        temporary.write_bytes(bytes(1 << 20))
except ResourceError as error:
    print(error, error.hint, sep="\\n")
    sys.exit(error.exit_code)
"""


def make_folder(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


# --- what is on disk


@settings(max_examples=20)
@given(st.sampled_from([0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1]), st.binary(max_size=9))
def test_sha256_is_that_of_the_whole_file(
    tmp_path_factory: pytest.TempPathFactory, zeros: int, tail: bytes
) -> None:
    path = tmp_path_factory.mktemp("sha") / "file"
    path.write_bytes(bytes(zeros) + tail)
    assert _files.sha256(path) == hashlib.sha256(bytes(zeros) + tail).hexdigest()


def test_tree_names_all_files_and_follows_no_link(tmp_path: Path) -> None:
    make_folder(tmp_path / "b", z="", a="")
    make_folder(tmp_path / "b" / "c", deep="")
    (tmp_path / ".hidden").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    assert _files.tree(tmp_path) == [".hidden", "b/a", "b/c/deep", "b/z", "loop", "nowhere"]


def test_size_is_the_sum_over_the_files(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", one="123", two="12345")
    make_folder(tmp_path / "a" / "b", three="1")
    assert _files.size_bytes(tmp_path / "a") == 9
    assert _files.size_bytes(tmp_path / "a" / "one") == 3


# --- what may be written over


def test_a_free_path_is_free(tmp_path: Path) -> None:
    _files.check_free(tmp_path / "new", force=False)
    _files.check_free(tmp_path / "new" / "deeper" / "still", force=False)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_what_exists_is_not_written_over_unless_forced(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.touch()
    elif kind == "folder":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "absent")
    with refused(UsageError, out, "exists already", hint="--force"):
        _files.check_free(out, force=False)
    _files.check_free(out, force=True)


@pytest.mark.parametrize("force", [False, True])
def test_a_parent_that_is_a_file_is_refused(tmp_path: Path, force: bool) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "deep" / "out"
    with refused(UsageError, out, tmp_path / "file", hint="in a folder that you may write to"):
        _files.check_free(out, force=force)


def test_looking_leaves_nothing(tmp_path: Path) -> None:
    _files.check_free(tmp_path / "deep" / "out", force=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "kind", "hint"),
    [(errno.ENOSPC, ResourceError, "free some disk space"), (errno.EROFS, UsageError, "you may")],
)
def test_a_folder_that_takes_nothing_is_told_by_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: Any, hint: str
) -> None:
    def fails(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", fails)
    out = tmp_path / "deep" / "out"
    with refused(kind, out, os.strerror(code), hint=hint):
        _files.check_free(out, force=False)
    with refused(kind, out, os.strerror(code), hint=hint):
        _files.write_text(out, "text")


# --- whole or not at all


def test_a_file_is_published_under_its_name_only(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "model.onnx"
    with _files.staged(out) as temporary:
        assert temporary.parents[2] == out.parent
        assert temporary.name == "model.onnx"
        temporary.write_text("whole")
        assert not out.exists()
    assert texts(out.parent) == {"model.onnx": "whole"}


def test_what_lies_beside_is_published_with_it_and_before_it(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    with _files.staged(out) as temporary:
        temporary.write_text("whole")
        temporary.with_name("model.0a1b.data").write_text("weights")
        assert texts(temporary.parent)
    assert texts(tmp_path) == {"model.onnx": "whole", "model.0a1b.data": "weights"}


def test_what_lies_beside_goes_where_the_last_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "model.onnx", _files._replace

    def replace(source: Path, target: Path) -> None:
        if target == out:
            raise OSError(errno.EIO, "planted")
        real(source, target)

    monkeypatch.setattr(_files, "_replace", replace)

    def fail() -> None:
        with _files.staged(out) as temporary:
            temporary.write_text("whole")
            temporary.with_name("model.0a1b.data").write_text("weights")

    with pytest.raises(OSError, match="planted"):
        fail()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("before", ["nothing", "file", "folder", "dangling link", "link"])
@pytest.mark.parametrize("after", ["file", "folder"])
def test_anything_takes_the_place_of_anything(tmp_path: Path, before: str, after: str) -> None:
    out, aside = tmp_path / "here" / "out", make_folder(tmp_path / "aside", kept="1")
    out.parent.mkdir()
    if before == "file":
        out.write_text("old")
    elif before == "folder":
        make_folder(out, old="old", common="old")
    elif before == "link":
        out.symlink_to(aside)
    elif before == "dangling link":
        out.symlink_to(tmp_path / "absent")
    with _files.staged(out) as temporary:
        if after == "file":
            temporary.write_text("new")
        else:
            make_folder(temporary, common="new")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not out.is_symlink()
    assert (texts(out) == {"common": "new"}) if after == "folder" else out.read_text() == "new"
    assert texts(aside) == {"kept": "1"}


def test_a_folder_is_replaced_where_paths_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_files, "_exchange", lambda one, other: False)
    out = make_folder(tmp_path / "out", old="old")
    with _files.staged(out) as temporary:
        make_folder(temporary, new="new")
    assert texts(out) == {"new": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_paths_are_exchanged(tmp_path: Path) -> None:
    one, other = make_folder(tmp_path / "one", a="1"), make_folder(tmp_path / "other", b="2")
    assert _files._exchange(one, other)
    assert texts(one) == {"b": "2"}
    assert texts(other) == {"a": "1"}
    assert not _files._exchange(one, tmp_path / "absent")


def test_a_folder_is_never_missing_while_it_is_replaced(tmp_path: Path) -> None:
    out = make_folder(tmp_path / "out", generation="0")
    missed, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            missed.extend([1] * (not out.is_dir()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for generation in range(100):
            with _files.staged(out) as temporary:
                make_folder(temporary, generation=str(generation))
    finally:
        done.set()
        watcher.join()
    assert not missed
    assert texts(out) == {"generation": "99"}


@pytest.mark.parametrize("error", [ValueError("boom"), OSError(errno.EACCES, "no"), SystemExit(1)])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    out = make_folder(tmp_path / "out", old="old")

    def fail() -> None:
        with _files.staged(out) as temporary:
            make_folder(temporary, new="new")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert texts(out) == {"old": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_block_that_makes_nothing_is_a_bug_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), _files.staged(tmp_path / "out"):
        pass
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_told_by_name_and_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    out.write_text("old")
    two_lines = refused(ResourceError, out, "No space left", hint="free some disk space")
    with two_lines, _files.staged(out) as temporary:
        temporary.write_text("new")
        Path("/dev/full").write_text("real ENOSPC")
    assert texts(tmp_path) == {"model.onnx": "old"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_kind_of_full_is_full(tmp_path: Path, code: int) -> None:
    full = OSError(code, os.strerror(code))
    two_lines = refused(ResourceError, full.strerror, hint="untouched")
    with two_lines, _files.staged(tmp_path / "out"):
        raise full


def test_a_file_beyond_the_limit_ends_with_the_exit_code_of_a_resource(tmp_path: Path) -> None:
    out = tmp_path / "out.bin"
    out.write_text("old")
    process = python(OVER_THE_LIMIT, out)
    lines, errors = told(process)
    assert process.returncode == 6, errors
    assert str(out) in lines.splitlines()[0]
    assert "free some disk space" in lines.splitlines()[1]
    assert texts(tmp_path) == {"out.bin": "old"}


def wrapped(error: Exception, *, silently: bool) -> Exception:
    """As a library tells it: in an error of its own."""
    outer = RuntimeError("cannot write the model")
    if silently:
        outer.__context__ = error
    else:
        outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    "error",
    [
        wrapped(OSError(errno.ENOSPC, "full"), silently=False),
        wrapped(OSError(errno.ENOSPC, "full"), silently=True),
        wrapped(wrapped(OSError(errno.EFBIG, "full"), silently=False), silently=False),
        RuntimeError(f"I/O error: No space left on device (os error {errno.ENOSPC})"),
    ],
    ids=["cause", "context", "deep", "words of Rust"],
)
def test_a_full_disk_inside_a_library_is_a_full_disk(tmp_path: Path, error: Exception) -> None:
    two_lines = refused(ResourceError, tmp_path / "out", "no space left", hint="free some disk")
    with two_lines, _files.staged(tmp_path / "out"):
        raise error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        wrapped(OSError(errno.EACCES, "denied"), silently=False),
        RuntimeError(f"I/O error (os error {errno.EACCES})"),
        RuntimeError(f"macros error {errno.ENOSPC}"),
    ],
)
def test_other_errors_inside_a_library_pass(tmp_path: Path, error: Exception) -> None:
    def fail() -> None:
        with _files.staged(tmp_path / "out"):
            raise error

    with pytest.raises(RuntimeError) as caught:
        fail()
    assert caught.value is error


def test_all_is_on_disk_before_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, synced = make_folder(tmp_path / "out", file="old"), []

    def fsync(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        synced.append((name.partition(".tmp")[0], (out / "file").read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    with _files.staged(out) as temporary:
        make_folder(temporary, file="new")
        make_folder(temporary / "inner", deep="new")
    assert set(synced[:-1]) == {("file", "old"), ("deep", "old"), ("inner", "old"), ("out", "old")}
    assert synced[-1] == (tmp_path.name, "new")


def test_a_folder_that_cannot_be_synced_is_published_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(errno.EINVAL, "some file systems cannot")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    _files.write_text(tmp_path / "out", "text")
    assert texts(tmp_path) == {"out": "text"}


# --- killed


@pytest.mark.parametrize(
    ("end", "code"), [("os._exit(9)", 9), ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL)]
)
def test_a_kill_in_the_middle_leaves_what_was_there(tmp_path: Path, end: str, code: int) -> None:
    out = make_folder(tmp_path / "out", old="old")
    process = python(IN_THE_MIDDLE.format(end=end), out)
    told(process)
    assert process.returncode == code
    assert texts(out) == {"old": "old"}
    left = [path for path in tmp_path.iterdir() if path != out]
    assert [texts(path / "content" / "out") for path in left] == [{"part": "half"}]

    with _files.staged(out) as temporary:
        make_folder(temporary, new="new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert texts(out) == {"new": "new"}


@pytest.mark.parametrize("name", ["model.onnx", "m[1].onnx", "m*.onnx"])
def test_what_ended_processes_left_is_swept_and_nothing_else(tmp_path: Path, name: str) -> None:
    living = python(HELD.format(end="input()"), tmp_path / name, wait=False)
    assert living.stdout is not None
    others = f"{name}.tmp-00", f".other.{name}.tmp-00", f".{name}x.tmp-00"
    kept = [living.stdout.readline().strip()]
    kept += [make_folder(tmp_path / path, alive="").name for path in others]
    (tmp_path / f".{name}.tmp-file").touch()
    (tmp_path / f".{name}.tmp-link").symlink_to(make_folder(tmp_path / "aside"))
    kept += [f".{name}.tmp-file", f".{name}.tmp-link", "aside"]
    try:
        make_folder(make_folder(tmp_path / f".{name}.tmp-00", alive="") / "content", deep="")
        make_folder(tmp_path / f".{name}.tmp-01")  # killed before it was locked
        _files.write_text(tmp_path / name, "new")
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, name])
        assert not any((tmp_path / "aside").iterdir())
    finally:
        living.kill()
        told(living)
    _files.write_text(tmp_path / name, "newer")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept[1:], name])


HELD = """
import sys
from pathlib import Path
from deploykit import _files
with _files.staged(Path(sys.argv[1])) as temporary:
    print(temporary.parent.parent.name, flush=True)
    {end}
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a container of its own needs root here")
def test_what_another_container_writes_is_not_swept(tmp_path: Path) -> None:
    """Its process number is one that nobody has here."""
    far = "echo $(($(cat /proc/sys/kernel/pid_max) - 99)) > /proc/sys/kernel/ns_last_pid"
    holds = HELD.format(end="input(); temporary.write_text('theirs')")
    other = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", f'{far}; "$@"; exit $?', "sh",
         sys.executable, "-c", holds, str(tmp_path / "out")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout is not None
    if not (theirs := other.stdout.readline().strip()):
        other.communicate()
        pytest.skip("this machine makes no containers")
    _files.write_text(tmp_path / "out", "ours")
    assert (tmp_path / theirs).is_dir()
    other.communicate("\n", timeout=60)
    assert other.returncode == 0
    assert texts(tmp_path) == {"out": "theirs"}


def test_a_sweep_beside_another_sweep_does_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = make_folder(tmp_path / ".out.tmp-00", file="")
    real = shutil.rmtree

    def gone_already(path: Path) -> None:
        real(path)
        if path == stale:
            raise FileNotFoundError(path)

    monkeypatch.setattr(shutil, "rmtree", gone_already)
    _files.write_text(tmp_path / "out", "new")
    assert not stale.exists()
    assert texts(tmp_path) == {"out": "new"}


def test_many_that_write_and_sweep_one_path_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: _files.write_text(out, str(n)), range(400)))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert out.read_text().isdigit()


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, swept = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if not swept:
            swept.extend(tmp_path.glob(".out.tmp-*"))
            shutil.rmtree(swept[0])
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    _files.write_text(tmp_path / "out", "new")
    assert swept
    assert texts(tmp_path) == {"out": "new"}


def test_nothing_is_swept_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "some file systems have none")

    make_folder(tmp_path / ".out.tmp-00", alive="")
    monkeypatch.setattr(fcntl, "flock", flock)
    _files.write_text(tmp_path / "out", "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.tmp-00", "out"]


# --- small ones


@settings(max_examples=20)
@given(st.text(st.characters(exclude_categories=["Cs"])).map(lambda t: t.replace("\r", "")))
def test_text_comes_back(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "file.txt"
    _files.write_text(path, "before")
    _files.write_text(path, text)
    assert path.read_bytes() == text.encode()


def test_remove_takes_what_is_there_and_no_more(tmp_path: Path) -> None:
    aside = make_folder(tmp_path / "aside", kept="1")
    (tmp_path / "link").symlink_to(aside)
    (tmp_path / "file").touch()
    make_folder(tmp_path / "folder", inner="")
    for name in ("link", "file", "folder", "absent"):
        _files.remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["aside"]
    assert texts(aside) == {"kept": "1"}
