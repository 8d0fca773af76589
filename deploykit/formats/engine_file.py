"""TensorRT engines: native code, bound to a version and a kind of GPU; never opened unrecorded."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from deploykit import environment, gpu, store
from deploykit._tensorrt import DISTRIBUTIONS
from deploykit.errors import InputError, IntegrityError, MissingError, ResourceError
from deploykit.values import Artifact

BUILD_AGAIN = "build it again here, from its ONNX file: deploykit build"


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
    if reason := misfit(artifact):
        raise MissingError(f"{artifact.path} does not fit this machine: {reason}", hint=BUILD_AGAIN)
    plan = artifact.path.read_bytes()
    if hashlib.sha256(plan).hexdigest() != artifact.sha256:
        raise IntegrityError(
            f"{artifact.path} is not the file that its record describes (sha256 differs)",
            hint=BUILD_AGAIN,
        )
    told = str(artifact.facts.get("sealed") or "")
    if not hmac.compare_digest(told, _seal(artifact.sha256, _key())):
        raise IntegrityError(
            f"{artifact.path} was not built on this machine, and an engine is native code",
            hint=BUILD_AGAIN,
        )
    return plan


def seal(plan: bytes) -> str:
    """A mark that only this user of this machine can make: HMAC-SHA256 with a key of its own.

    Raises ResourceError: the key cannot be kept.
    """
    return _seal(hashlib.sha256(plan).hexdigest(), _key())


def misfit(artifact: Artifact) -> str | None:
    """Why an engine does not fit this machine, by its record; None if it does.

    Looked at: flavour and version, driver and GPU, compute capability. Nothing is loaded.
    """
    facts = artifact.facts
    name, version = str(facts.get("flavour")), str(facts.get("flavour_version"))
    if name not in DISTRIBUTIONS:
        return f"its record names no flavour of TensorRT ({name})"
    found = environment.versions((DISTRIBUTIONS[name],)).get(DISTRIBUTIONS[name])
    if found is None:
        return f"it was built by {name} {version}, which is not installed"
    if not _version_fits(version, found, facts.get("flags", ())):
        return f"it was built by {name} {version}, {found} is installed"
    device = gpu.probe()
    if isinstance(device, str):
        return device
    targets = [str(target) for target in facts.get("compute_capabilities", ())]
    if not any(_gpu_fits(target, device.compute_capability, artifact) for target in targets):
        told = f"{device.name} is {device.compute_capability}"
        return f"it was built for {' and '.join(targets)}, {told}"
    return None


def _version_fits(built: str, found: str, flags: list[str]) -> bool:
    """Equal, or newer of the same major version for a version-compatible engine."""
    if built == found:
        return True
    one, two = (tuple(int(n) for n in v.split(".") if n.isdigit()) for v in (built, found))
    return "VERSION_COMPATIBLE" in flags and one[:1] == two[:1] and two >= one


def _gpu_fits(target: str, found: str, artifact: Artifact) -> bool:
    if target == found:
        return True
    least = [int(word.strip("sm,")) for word in target.split() if word.startswith("sm")]
    widened = artifact.history[-1].options.get("hardware_compatibility") == "ampere-plus"
    if not least or not (target.startswith("portable") or widened):
        return False
    return int(found[2:]) >= (80 if widened else least[0])


def _seal(sha256: str, key: bytes) -> str:
    return hmac.new(key, sha256.encode(), hashlib.sha256).hexdigest()


def _key() -> bytes:
    """This user's key on this machine, made when it is first needed; others cannot read it."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "deploykit" / "engine.key"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as new:
                new.write(secrets.token_bytes(32))
        except FileExistsError:
            pass
        return path.read_bytes()
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be kept: {error.strerror}; engines are marked with it as built here",
            hint="set XDG_STATE_HOME to a folder that you may write to",
        ) from error
