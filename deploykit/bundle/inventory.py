"""The files of a bundle as they lie on disk, against what its manifest lists."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from deploykit import _files
from deploykit.bundle.manifest import MANIFEST, SIGNATURE, Bundle, BundleError
from deploykit.values import Value

KINDS = {
    stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
_SPECIAL = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX
_EXECUTABLE = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH


class Print(Value):
    """What tells whether a file was touched: the system sets `changed_ns`, nobody else can."""

    device: int
    number: int
    size: int
    changed_ns: int


class Survey(Value):
    """What was found on disk, each file read once."""

    problems: tuple[str, ...]
    digests: dict[str, str]
    """sha256 of every regular file that could be read, but the signature."""
    prints: dict[str, Print]


def check(root: Path, bundle: Bundle) -> None:
    """Every listed file is there as listed, and nothing else. Raises BundleError: all problems."""
    if problems := survey(root, bundle).problems:
        raise BundleError(root, problems, code="FILES")


def survey(root: Path, bundle: Bundle) -> Survey:
    """Read every file once, and hold what lies there against the manifest."""
    listed = {entry.path: entry for entry in bundle.files}
    folders = {p.as_posix() for path in listed for p in PurePosixPath(path).parents}
    found = dict(walk(root, ""))
    problems = list(_unsafe_place(root))
    digests, prints = {}, {}
    for path, mode in sorted(found.items()):
        problems += _strange(path, mode, known=path in listed or path in (MANIFEST, SIGNATURE),
                             folder=path in folders)  # fmt: skip
        if stat.S_ISREG(mode) and path != SIGNATURE:
            size = listed[path].size if path in listed else None
            try:
                prints[path], digest = _read(root / path, size)
            except OSError as error:
                problems.append(f"{path!r} cannot be read: {error.strerror}")
                continue
            if digest:
                digests[path] = digest
    for path, entry in listed.items():
        if path not in found:
            problems.append(f"{path!r} is missing")
        elif path in prints and prints[path].size != entry.size:
            problems.append(f"{path!r} has {prints[path].size} bytes, not {entry.size}")
        elif path in digests and digests[path] != entry.sha256:
            problems.append(f"{path!r} has another sha256")
    return Survey(problems=tuple(problems), digests=digests, prints=prints)


def copy(root: Path, out: Path) -> None:
    """Copy a bundle from anywhere, with its modes: regular files only, opened without links.

    Raises BundleError: there is something else.
    """
    out.mkdir()
    for path, mode in walk(root, ""):
        if stat.S_ISDIR(mode):
            (out / path).mkdir()
        else:
            try:
                descriptor = _files.open_regular(root / path)
            except OSError as error:
                what = KINDS.get(stat.S_IFMT(mode)) or f"not readable: {error.strerror}"
                raise BundleError(root, [f"{path!r} is {what}"], code="FILES") from error
            with os.fdopen(descriptor, "rb") as source, (out / path).open("xb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        (out / path).chmod(stat.S_IMODE(mode))
    out.chmod(stat.S_IMODE(root.stat().st_mode))


def touched(root: Path, found: Survey) -> list[str]:
    """The files that are not those that were read, or were written to since."""
    changed = []
    for path, was in found.prints.items():
        try:
            now = _print((root / path).lstat())
        except OSError:
            now = None
        if now != was:
            changed.append(f"{path!r} was changed while it was verified")
    return changed


def _strange(path: str, mode: int, *, known: bool, folder: bool) -> Iterator[str]:
    """What must not be in a bundle: kinds and modes of files, and files that are not listed."""
    kind = stat.S_IFMT(mode)
    if kind in KINDS:
        yield f"{path!r} is {KINDS[kind]}"
        return
    if kind == stat.S_IFDIR and not folder:
        yield f"{path!r} is a folder" if known else f"folder {path!r} is not in the manifest"
    elif kind == stat.S_IFREG and not known:
        yield f"{path!r} is not in the manifest"
    if mode & stat.S_IWOTH:
        yield f"{path!r} can be written to by everyone"
    if kind == stat.S_IFREG and mode & (_SPECIAL | _EXECUTABLE):
        yield f"{path!r} has the mode {stat.S_IMODE(mode):04o}: no file of a bundle is executable"


def _unsafe_place(root: Path) -> Iterator[str]:
    """The folder, or one above it, lets everyone put another in its place."""
    here = root.resolve()
    if here.stat().st_mode & stat.S_IWOTH:
        yield f"the folder {str(here)!r} can be written to by everyone"
    for parent in here.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            yield f"the folder {str(parent)!r} above it can be written to by everyone"


def walk(root: Path, inside: str) -> Iterator[tuple[str, int]]:
    """Every entry below `root` with its mode; links are not followed."""
    with os.scandir(root / inside) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            path = f"{inside}{entry.name}"
            mode = entry.stat(follow_symlinks=False).st_mode
            yield path, mode
            if stat.S_ISDIR(mode):
                yield from walk(root, f"{path}/")


def _read(path: Path, size: int | None) -> tuple[Print, str | None]:
    """The print and sha256 of a file; its content is not read where its size is another."""
    with os.fdopen(_files.open_regular(path), "rb") as file:
        found = _print(os.fstat(file.fileno()))
        if size is not None and found.size != size:
            return found, None
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return found, digest


def _print(status: os.stat_result) -> Print:
    return Print(
        device=status.st_dev,
        number=status.st_ino,
        size=status.st_size,
        changed_ns=status.st_ctime_ns,
    )
