"""Whether a bundle is the one that was made, and by whom: its manifest, signature and files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from deploykit.bundle import inventory, manifest, signature
from deploykit.bundle.inventory import Survey
from deploykit.bundle.manifest import MANIFEST, SIGNATURE, Bundle, BundleError, Code
from deploykit.errors import IntegrityError


class Whole(NamedTuple):
    """A bundle whose files are as its manifest, and if a key was given its signature, says."""

    folder: Path
    bundle: Bundle
    found: Survey
    signed: str
    """What is known of the signature, as a sentence."""
    trusted: bool = False
    """Whether it has a signature by a key that the user named: native code of it may run."""


def check(
    folder: Path,
    *,
    public_key: Path | None = None,
    min_version: int | None = None,
    also: Callable[[Bundle], list[str]] = lambda _: [],
) -> Whole:
    """Check signature, version and files; nothing of the bundle is loaded.

    Raises InputError: no bundle there, or no key. BundleError: everything that is wrong, with what
    `also` finds besides; its code is that of the first.
    """
    text = manifest.read_text(folder)
    bundle = manifest.from_json(text, folder)
    found = inventory.survey(folder, bundle)
    problems: list[tuple[Code, str]] = []
    if public_key is not None:
        digests = {**found.digests, MANIFEST: hashlib.sha256(text).hexdigest()}
        if wrong := signature.problem(folder, public_key, digests):
            problems.append(wrong)
    if min_version is not None and bundle.version < min_version:
        problems.append(
            ("OLD_VERSION", f"it has version {bundle.version}, at least {min_version} is wanted")
        )
    problems += [("FILES", problem) for problem in found.problems]
    if problems:
        texts = [*(text for _, text in problems), *also(bundle)]
        raise BundleError(folder, texts, code=problems[0][0])
    return Whole(folder, bundle, found, _signed(folder, public_key), public_key is not None)


def check_untouched(whole: Whole) -> None:
    """Refuse files that were written to since they were checked. Raises IntegrityError."""
    if changed := inventory.touched(whole.folder, whole.found):
        raise IntegrityError(
            f"{whole.folder}: {'; '.join(changed[:6])}",
            hint="verify a copy that nobody else can write to",
        )


def _signed(folder: Path, public_key: Path | None) -> str:
    if public_key is not None:
        return f"signature is sound and by the key {public_key.name}"
    if (folder / SIGNATURE).exists():
        return "it is signed; NOT CHECKED BY WHOM: give --public-key"
    return "it is not signed: this tells of damage, not of a forger"
