"""A signature over a whole bundle: OpenSSF model-signing with a local key, offline.

The file is `signature.json`, a sigstore bundle over an in-toto statement with the sha256 of every
file. `model_signing verify key BUNDLE --signature BUNDLE/signature.json` checks it too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit import _files
from deploykit._lazy import needs
from deploykit.bundle import inventory, manifest
from deploykit.bundle.manifest import SIGNATURE, Code
from deploykit.errors import InputError, UsageError
from deploykit.layouts import oci

LARGEST_SIGNATURE = 64 << 20
KEY_HINT = (
    "take an elliptic-curve key (P-256, P-384 or P-521) without a password, the private one to "
    "sign, the public one to verify; BUNDLE_FORMAT.md of deploykit tells how to make them"
)


def sign(bundle: Path, private_key: Path, *, force: bool = False) -> Path:
    """Sign a bundle whose files are as its manifest says; return the path of the signature.

    In an OCI image layout the signature becomes one of its files. Raises BundleError: the files
    are not as the manifest says. InputError: the key cannot be used. UsageError: it is signed
    already and not forced. MissingError: model-signing is not installed.
    """
    if not oci.is_layout(bundle):
        return _sign(bundle, private_key, force=force)
    with oci.opened(bundle) as folder:
        _sign(folder, private_key, force=force)
        with _files.staged(bundle) as out:
            out.mkdir()
            oci.write(folder, out, manifest.described(manifest.read(folder)))
    return bundle


def _sign(bundle: Path, private_key: Path, *, force: bool) -> Path:
    inventory.check(bundle, manifest.read(bundle))
    out = bundle / SIGNATURE
    if out.exists() and not force:
        raise UsageError(f"{bundle} is signed already", hint="--force to sign it anew")
    with needs("model_signing"):
        from model_signing import hashing, signing

    config = signing.Config()
    try:
        config.use_elliptic_key_signer(private_key=private_key)
    except Exception as error:  # whatever a key parser raises
        raise _bad_key(private_key, error) from error
    every_file = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    # Beside the bundle, not in it: a kill must not leave a stray file inside.
    with _files.beside(bundle) as temporary:
        config.set_hashing_config(every_file).sign(bundle, temporary)
        temporary.chmod(0o644)
        _files.move(temporary, out)
    return out


def problem(bundle: Path, public_key: Path, digests: Mapping[str, str]) -> tuple[Code, str] | None:
    """What is wrong with the signature, given the sha256 of every file; None if nothing is.

    Raises InputError: the key cannot be used. MissingError: model-signing is not installed.
    """
    path = bundle / SIGNATURE
    with needs("model_signing"):
        from model_signing import verifying

    config = verifying.Config()
    try:
        config.use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:  # whatever a key parser raises
        raise _bad_key(public_key, error) from error
    try:
        with os.fdopen(_files.open_regular(path), "rb") as file:
            if os.fstat(file.fileno()).st_size > LARGEST_SIGNATURE:
                return "SIGNATURE", f"{SIGNATURE} is larger than {LARGEST_SIGNATURE} bytes"
    except FileNotFoundError:
        return "UNSIGNED", f"it is not signed ({SIGNATURE} is missing)"
    except OSError as error:
        return "SIGNATURE", f"{SIGNATURE} cannot be read: {error.strerror}"
    try:
        config.set_hashing_config(_Known(digests)).verify(bundle, path)
    except Exception as error:  # noqa: BLE001 - torn JSON, a false signature: each its own type
        return _told(error)
    return None


def _told(error: Exception) -> tuple[Code, str]:
    """The library's error in words; of an edited payload it says nothing at all."""
    if isinstance(error, _OtherFiles):
        return "SIGNATURE", f"{SIGNATURE} is of other files: {error}"
    if "Key mismatch" in str(error):
        return "WRONG_KEY", f"{SIGNATURE} is by another key than the one given"
    return "SIGNATURE", f"{SIGNATURE} is torn or was edited ({type(error).__name__})"


class _OtherFiles(Exception):  # noqa: N818 - never leaves this module
    """The signature is sound, and of other files."""


class _Known:
    """Stands for a hashing configuration and for its result: nothing is read a second time."""

    def __init__(self, digests: Mapping[str, str]) -> None:
        self._digests = digests

    def hash(self, *_: object, **__: object) -> _Known:
        return self

    def add_ignored_paths(self, **_: object) -> None:
        """What the signer left out is not left out here."""

    def __eq__(self, signed: object) -> bool:
        """Hold the digests against the manifest that was signed. Raises _OtherFiles."""
        items: Any = signed
        told = {
            rd.identifier: rd.digest.digest_hex
            for rd in items.resource_descriptors()
            if rd.digest.algorithm == "sha256"
        }
        names = {name for name, _ in told.items() ^ self._digests.items()}
        if names:
            raise _OtherFiles(", ".join(sorted(names)[:6]))
        return True

    __hash__ = None  # type: ignore[assignment]


def _bad_key(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: no key that can be used here: {error}", hint=KEY_HINT)
