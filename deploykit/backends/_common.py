"""What every backend says the same way."""

from __future__ import annotations

from deploykit._lazy import INSTALL, installed
from deploykit.errors import InputError
from deploykit.values import Artifact, Feed, TensorSpec


def missing_library(module: str) -> str | None:
    """The sentence for a library that is not installed, or None; nothing is imported."""
    if installed(module):
        return None
    return f"{module} is not installed: {INSTALL.get(module, f'pip install {module}')}"


def check_feed(feed: Feed, inputs: tuple[TensorSpec, ...]) -> None:
    """Refuse a feed that the model does not take. Raises InputError, by the name of the input."""
    wanted = {spec.name for spec in inputs}
    if set(feed) != wanted:
        odd = sorted(set(feed) ^ wanted)
        raise InputError(
            f"{odd[0]!r} is {'missing' if odd[0] in wanted else 'no input of the model'}; "
            f"it takes {sorted(wanted)}",
            hint="name the arrays as the model names its inputs",
        )
    for spec in inputs:
        if misfit := spec.misfit(feed[spec.name]):
            raise InputError(
                f"input {spec.name!r}: {misfit}", hint="give arrays of the model's dtype and shape"
            )


def refused(artifact: Artifact, runtime: str, error: Exception) -> InputError:
    """The error for a model that the runtime does not load."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return InputError(
        f"{artifact.path}: {runtime} does not load it: {lines[0] if lines else error!r}",
        hint=f"check the file with `deploykit inspect {artifact.path}`",
    )
