"""The files of a bundle as they lie on disk, against what its manifest lists."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from deploykit.bundle.manifest import MANIFEST, Bundle, BundleError, FileEntry, open_file

KINDS = {
    stat.S_IFLNK: "a symbolic link", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def check(root: Path, bundle: Bundle) -> None:
    """Every listed file is there as listed, and nothing else. Raises BundleError: all problems."""
    if problems := list(_problems(root, {entry.path: entry for entry in bundle.files})):
        raise BundleError(root, problems)


def _problems(root: Path, listed: dict[str, FileEntry]) -> Iterator[str]:
    folders = {p.as_posix() for path in listed for p in PurePosixPath(path).parents}
    found = dict(_walk(root, ""))
    for path, mode in sorted(found.items()):
        kind = stat.S_IFMT(mode)
        if kind in KINDS:
            yield f"{path!r} is {KINDS[kind]}"
        elif kind == stat.S_IFDIR and path not in folders:
            yield f"folder {path!r} is not in the manifest"
        elif kind == stat.S_IFREG and path not in listed and path != MANIFEST:
            yield f"{path!r} is not in the manifest"
    for path, entry in listed.items():
        if path not in found:
            yield f"{path!r} is missing"
        elif stat.S_ISREG(found[path]) and (problem := _difference(root / path, entry)):
            yield f"{path!r} {problem}"
        elif stat.S_ISDIR(found[path]):
            yield f"{path!r} is a folder"


def _walk(root: Path, inside: str) -> Iterator[tuple[str, int]]:
    """Every entry below `root` with its mode; links are not followed."""
    with os.scandir(root / inside) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            path = f"{inside}{entry.name}"
            mode = entry.stat(follow_symlinks=False).st_mode
            yield path, mode
            if stat.S_ISDIR(mode):
                yield from _walk(root, f"{path}/")


def _difference(path: Path, entry: FileEntry) -> str | None:
    """How the file differs from its entry; its size is looked at before its content is read."""
    try:
        with os.fdopen(open_file(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.size:
                return f"has {size} bytes, not {entry.size}"
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if digest == entry.sha256 else "has another sha256"
