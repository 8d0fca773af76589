"""TensorRT engines: native code, bound to a version and a kind of GPU; never opened unrecorded."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from deploykit import _files, environment, gpu, store
from deploykit._tensorrt import DISTRIBUTIONS
from deploykit.errors import InputError, IntegrityError, MissingError, ResourceError
from deploykit.values import Artifact, Json

BUILD_AGAIN = "build it again here, from its ONNX file: deploykit build"
_DECIDING = (
    "flavour", "flavour_version", "compute_capabilities", "flags", "hardware_compatibility",
)  # fmt: skip
"""Facts by which an engine fits a machine: sealed with it, so that none can be put in later."""
_KEY_BYTES = 32


def open_file(path: Path) -> Artifact:
    """The artifact of an engine, by its record. Raises InputError: it has none."""
    if artifact := store.read(path):
        return artifact
    raise InputError(
        f"{path}: an engine without a record; it is native code that must not be loaded on trust",
        hint="build it with deploykit, which writes the record beside it",
    )


def read_plan(artifact: Artifact) -> bytes:
    """The bytes of an engine that fits this machine and was built here: fit to be deserialized.

    Raises MissingError: it does not fit. IntegrityError: it is not what its record describes, or
    was not built here.
    """
    if reason := misfit(artifact.facts):
        raise MissingError(f"{artifact.path} does not fit this machine: {reason}", hint=BUILD_AGAIN)
    plan = artifact.path.read_bytes()
    if hashlib.sha256(plan).hexdigest() != artifact.sha256:
        raise IntegrityError(
            f"{artifact.path} is not the file that its record describes (sha256 differs)",
            hint=BUILD_AGAIN,
        )
    if not built_here(artifact):
        raise IntegrityError(
            f"{artifact.path} was not built on this machine, or its record was edited; "
            "an engine is native code",
            hint=BUILD_AGAIN,
        )
    return plan


def built_here(artifact: Artifact) -> bool:
    """Whether this user built the engine on this machine, or vouched for it; nothing is loaded."""
    told, key = str(artifact.facts.get("sealed")), _key()
    return key is not None and hmac.compare_digest(
        told.encode(), _seal(artifact.sha256, artifact.facts, key).encode()
    )


def vouched(artifact: Artifact) -> Artifact:
    """The engine as one that may be opened here: whoever made it was checked by his signature.

    It must still fit this machine. Raises InputError: it has no record of its build.
    """
    if not artifact.history:
        raise InputError(
            f"{artifact.path}: an engine without a record of its build", hint=BUILD_AGAIN
        )
    *before, last = artifact.history
    facts = {**last.facts, "sealed": _seal(artifact.sha256, last.facts, _key() or _new_key())}
    last = last.model_copy(update={"facts": facts})
    return artifact.model_copy(update={"history": (*before, last)})


def seal(plan: bytes, facts: Json) -> str:
    """A mark that only this user of this machine can make, over a plan and what it fits.

    HMAC-SHA256 with a key of its own. Raises ResourceError: the key cannot be kept.
    IntegrityError: what is kept is no key.
    """
    key = _key() or _new_key()
    return _seal(hashlib.sha256(plan).hexdigest(), facts, key)


def misfit(facts: Json) -> str | None:
    """Why an engine does not fit this machine, by the facts of its build; None if it does.

    Looked at: flavour and version, driver and GPU, compute capability. Nothing is loaded.
    """
    name, version = str(facts.get("flavour")), str(facts.get("flavour_version"))
    if name not in DISTRIBUTIONS:
        return f"its record names no flavour of TensorRT ({name})"
    found = environment.versions((DISTRIBUTIONS[name],)).get(DISTRIBUTIONS[name])
    if found is None:
        return f"it was built by {name} {version}, which is not installed"
    if not _version_fits(version, found, _words(facts, "flags")):
        return f"it was built by {name} {version}, {found} is installed"
    return gpu_misfit(facts)


def gpu_misfit(facts: Json) -> str | None:
    """Why an engine does not fit the first GPU of this machine; None if it does."""
    device = gpu.probe()
    if isinstance(device, str):
        return device
    targets = _words(facts, "compute_capabilities")
    widened = facts.get("hardware_compatibility") == "ampere-plus"
    if any(_gpu_fits(target, device.compute_capability, widened=widened) for target in targets):
        return None
    built_for = " and ".join(targets) or "a GPU that its record does not name"
    return f"it was built for {built_for}, {device.name} is {device.compute_capability}"


def _words(facts: Json, name: str) -> list[str]:
    """A list of words in a record, which anybody may have edited."""
    told = facts.get(name)
    return [str(word) for word in told] if isinstance(told, list | tuple) else []


def _version_fits(built: str, found: str, flags: list[str]) -> bool:
    """Equal, or newer of the same major version for a version-compatible engine."""
    if built == found:
        return True
    one, two = (tuple(int(n) for n in v.split(".") if n.isdigit()) for v in (built, found))
    return "VERSION_COMPATIBLE" in flags and one[:1] == two[:1] and two >= one


def _gpu_fits(target: str, found: str, *, widened: bool) -> bool:
    if target == found:
        return True
    portable = re.fullmatch(r"portable, sm(\d+) and newer", target)
    if not portable and not (widened and re.fullmatch(r"sm\d+", target)):
        return False
    return int(found[2:]) >= (int(portable[1]) if portable else 80)


def _seal(sha256: str, facts: Json, key: bytes) -> str:
    sealed = {"plan": sha256, **{name: facts.get(name) for name in _DECIDING}}
    return hmac.new(key, store.digest_of(sealed).encode(), hashlib.sha256).hexdigest()


def _key_path() -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or "")
    if not state.is_absolute():  # as the XDG specification asks
        state = Path.home() / ".local" / "state"
    return state / "deploykit" / "engine.key"


def _key() -> bytes | None:
    """This user's key on this machine, None if there is none yet.

    Raises IntegrityError: torn, or not this user's alone: whoever knows it can seal what he likes.
    """
    path = _key_path()
    try:
        with os.fdopen(_files.open_regular(path), "rb") as file:
            status, key = os.fstat(file.fileno()), file.read(_KEY_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unkept(path, error) from error
    private = status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o077
    if private and len(key) == _KEY_BYTES:
        return key
    fault = f"it has not {_KEY_BYTES} bytes" if private else "it is not this user's alone"
    raise IntegrityError(
        f"{path} cannot vouch for an engine: {fault}",
        hint="remove it, and build the engines of this machine again",
    )


def _new_key() -> bytes:
    """Make the key, whole from the first; that of a process that was quicker is taken."""
    path = _key_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _files.beside(path) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as new:
                new.write(secrets.token_bytes(_KEY_BYTES))
                new.flush()
                os.fsync(new.fileno())
            with suppress(FileExistsError):
                os.link(temporary, path)
    except OSError as error:
        raise _unkept(path, error) from error
    if key := _key():
        return key
    raise _unkept(path, FileNotFoundError(2, "it was removed"))


def _unkept(path: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"{path} cannot be kept: {error.strerror}; engines are marked with it as built here",
        hint="set XDG_STATE_HOME to a folder that you may write to",
    )
