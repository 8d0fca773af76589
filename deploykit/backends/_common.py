"""What every backend says the same way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from deploykit._lazy import INSTALL, installed
from deploykit.errors import DeploykitError, InputError, ResourceError
from deploykit.values import Artifact, Feed, TensorSpec

OUT_OF_MEMORY = ("bad_alloc", "ailed to allocate", "annot allocate", "bad allocation")


def missing_library(module: str) -> str | None:
    """The sentence for a library that is not installed, or None; nothing is imported."""
    if installed(module):
        return None
    return f"{module} is not installed: {INSTALL.get(module, f'pip install {module}')}"


def check_feed(feed: Feed, inputs: tuple[TensorSpec, ...]) -> None:
    """Refuse a feed that the model does not take. Raises InputError, by the name of the input."""
    wanted = {spec.name for spec in inputs}
    if not isinstance(feed, Mapping):
        raise InputError(
            f"a feed maps input names to arrays, this one is {type(feed).__name__}",
            hint=f"give a dict with {sorted(wanted)}",
        )
    if set(feed) != wanted:
        odd = sorted(set(feed) ^ wanted)
        raise InputError(
            f"{odd[0]!r} is {'missing' if odd[0] in wanted else 'no input of the model'}; "
            f"it takes {sorted(wanted)}",
            hint="name the arrays as the model names its inputs",
        )
    for spec in inputs:
        given = feed[spec.name]
        if not isinstance(given, (np.ndarray, np.generic)):
            raise InputError(
                f"input {spec.name!r} is {type(given).__name__}, no numpy array",
                hint=f"give numpy.asarray(..., {spec.dtype!r})",
            )
        if misfit := spec.misfit(given):
            raise InputError(
                f"input {spec.name!r}: {misfit}", hint="give arrays of the model's dtype and shape"
            )


@contextmanager
def running(artifact: Artifact, runtime: str) -> Iterator[None]:
    """Tell what a runtime raises while it runs a model, in two lines.

    Raises ResourceError: it ran out of memory. InputError: it fails on this input.
    """
    try:
        yield
    except DeploykitError:
        raise
    except Exception as error:  # the runtimes' exceptions share no base
        line = _first_line(error)
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            raise ResourceError(
                f"{artifact.path}: {runtime} runs out of memory when it runs it: {line}",
                hint="use a smaller batch; a model that takes so much may mean harm, do not load "
                "it if you do not trust where it is from",
            ) from error
        raise InputError(
            f"{artifact.path}: {runtime} fails to run it on this input: {line}",
            hint="give inputs of the sizes that the model was made for",
        ) from error


def refused(artifact: Artifact, runtime: str, error: Exception) -> InputError:
    """The error for a model that the runtime does not load."""
    return InputError(
        f"{artifact.path}: {runtime} does not load it: {_first_line(error)}",
        hint=f"check the file with `deploykit inspect {artifact.path}`",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else repr(error)
