"""Writes that are whole or not there: temporary sibling, fsync, rename, fsync of the folder."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from deploykit import _interrupt
from deploykit.errors import DeploykitError, ResourceError, UsageError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IN_THE_WAY = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
"""What rename(2) says of a folder with files, or of a file where the other is a folder."""
_ALIVE, _CONTENT = "alive", "content"
"""In a temporary folder: the file that its process holds locked, and what it makes."""


def sha256(path: Path) -> str:
    """Digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tree(folder: Path) -> list[str]:
    """Paths of the files under a folder, relative, with `/`, sorted; links are not followed."""
    found = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(p.relative_to(folder).as_posix() for p in found)


def size_bytes(path: Path) -> int:
    """Size of a file, or of all files under a folder."""
    if path.is_dir():
        return sum((path / name).lstat().st_size for name in tree(path))
    return path.stat().st_size


def unsafe(path: str) -> bool:
    """Whether a path from elsewhere must not be used: not relative, not normalised, odd letters."""
    if "\\" in path or not path.isprintable():
        return True
    return any(part in ("", ".", "..") or len(part.encode()) > 255 for part in path.split("/"))


def open_regular(path: Path) -> int:
    """A descriptor of a regular file. Raises OSError: not one (a link is not followed)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "no regular file", str(path))
    return descriptor


@contextmanager
def scratch() -> Iterator[Path]:
    """A private folder for a while; those of killed processes are swept."""
    with _own_folder(Path(tempfile.gettempdir()) / "deploykit") as folder:
        yield folder


def check_free(out: Path, *, force: bool) -> None:
    """Refuse to write over `out` unless forced, or where its parent is no folder.

    Raises UsageError. ResourceError: the disk is full.
    """
    if os.path.lexists(out) and not force:
        raise UsageError(
            f"{out} exists already", hint="give another output path, or --force to replace it"
        )
    parent = next((p for p in out.absolute().parents if p.exists()), Path("/"))
    longest = parent / f".{out.name}.record.json.next"  # of the names that it will take
    try:
        with _own_folder(longest):
            pass
    except OSError as error:
        raise unwritable(out, error) from error


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises UsageError, ResourceError: it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def check_file(out: Path) -> None:
    """Refuse to put a file in the place of a folder, forced or not. Raises UsageError."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder", hint="give the path of a file")


def unwritable(out: Path, error: OSError) -> DeploykitError:
    """The error for what the system says where `out` is written: full, or not allowed."""
    if error.errno in _FULL:
        return ResourceError(
            f"{out}: no space left to write it ({error.strerror})",
            hint="free some disk space; what was there before is untouched",
        )
    return UsageError(
        f"{out} cannot be written: {error.strerror}",
        hint="give an output path in a folder that you may write to",
    )


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Give a temporary path of the same name; on success it takes the place of `out` in one step.

    The block may make a file or a folder there, and further files beside it that it needs (their
    names must tell their content: they come first, and replace what has their name). On any error
    all of it is removed and `out` is as it was. Raises ResourceError: the disk is full. UsageError:
    there is no such folder and none can be made.
    """
    with ExitStack() as stack:
        try:
            out.absolute().parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(_own_folder(out))
        except OSError as error:
            raise unwritable(out, error) from error
        try:
            yield folder / out.name
            _interrupt.check()
            for path in folder.iterdir():
                _sync(path)
            _publish(folder, out)
        except Exception as error:
            if full := _full(error):
                raise unwritable(out, full) from error
            raise


def _publish(folder: Path, out: Path) -> None:
    """Move what lies in `folder` to where `out` is to lie, `out` last."""
    parent, new = out.absolute().parent, []
    try:
        for path in sorted(folder.iterdir()):
            if path.name != out.name:
                new += [] if (parent / path.name).exists() else [parent / path.name]
                _replace(path, parent / path.name)
        _replace(folder / out.name, out)
    except OSError:
        for path in new:
            remove(path)
        raise
    _sync_folder(parent)


def _full(error: BaseException | None) -> OSError | None:
    """The full disk behind an error, if there is one; libraries wrap it in words of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error
        told = re.search(r"\bos error (\d+)\b", str(error))
        if told and int(told[1]) in _FULL:
            return OSError(int(told[1]), os.strerror(int(told[1])))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, removed at the end if it is still there."""
    path = path.absolute()
    with _own_folder(path) as folder:
        try:
            yield folder / path.name
        except Exception as error:
            if full := _full(error):
                raise unwritable(path, full) from error
            raise


def move(source: Path, target: Path) -> None:
    """Put a finished file in its place on the same file system, whole or not at all."""
    _sync(source)
    source.replace(target)
    _sync_folder(target.absolute().parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises UsageError: a folder is there."""
    check_file(path)
    with staged(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    """Put `source` at `target`; a folder that is there is exchanged atomically, then removed."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno not in _IN_THE_WAY:
            raise
        if _exchange(source, target):
            return  # the old content is now at `source`, which the caller removes
        target.rename(source.with_name(f"{source.name}.old"))  # removed with the temporary folder
        source.rename(target)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths by renameat2(2); False where the system has no such call."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return bool(rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)


@contextmanager
def _own_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` for this process alone, gone at the end; others' that ended go first.

    A process lives as long as it holds the lock in its folder: process numbers say nothing where
    containers share a disk.
    """
    sweep(out.absolute().parent, glob.escape(out.name))
    folder, descriptor = _claimed(out)
    try:
        (folder / _CONTENT).mkdir()
        yield folder / _CONTENT
    finally:
        try:
            remove(folder / _CONTENT)
            with suppress(OSError):  # another process sweeps here
                remove(folder)
        finally:
            os.close(descriptor)


def _claimed(out: Path) -> tuple[Path, int]:
    """A new folder beside `out`, and the descriptor that holds its lock."""
    while True:
        folder = out.with_name(f".{out.name}.tmp-{secrets.token_hex(8)}")
        folder.mkdir(mode=0o700)
        try:
            descriptor = _open_alive(folder)
        except FileNotFoundError:  # swept before it was locked
            continue
        except OSError:
            folder.rmdir()
            raise
        with suppress(OSError):  # a file system without locks: nobody can sweep there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return folder, descriptor
        os.close(descriptor)


def _open_alive(folder: Path) -> int:
    """The file that is locked; no link is followed."""
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(place).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "is another user's", str(folder))
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(_ALIVE, flags, 0o600, dir_fd=place)
    finally:
        os.close(place)


def _sync(path: Path) -> None:
    """Flush a file, or every file and folder under a folder, to disk."""
    if path.is_dir():
        for child in path.iterdir():
            _sync(child)
        _sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path, names: str = "*") -> None:
    """Remove what ended processes left in a folder on their way to such names."""
    for stale in folder.glob(f".{names}.tmp-*"):
        with suppress(OSError):  # its process lives, or another one sweeps here too
            descriptor = _open_alive(stale)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(stale)
            finally:
                os.close(descriptor)
