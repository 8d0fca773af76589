"""The Python API has the verbs and nouns of the command line."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import deploykit
from deploykit.cli import COMMANDS

TELLING = {"doctor", "inspect"}
"""Commands that print what other functions return."""


def test_every_verb_is_a_function() -> None:
    for verb in set(COMMANDS) - TELLING:
        assert inspect.isfunction(getattr(deploykit, verb)), verb


def test_every_name_is_there_and_stays_after_all_modules_are_imported() -> None:
    for module in pkgutil.walk_packages(deploykit.__path__, "deploykit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in deploykit.__all__:
        assert callable(getattr(deploykit, name)), name
    assert sorted(deploykit.__all__) == dir(deploykit)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = deploykit.quantise  # type: ignore[attr-defined]


def test_the_public_names() -> None:
    """A change here is a change for users: say it in CHANGELOG.md."""
    assert deploykit.__all__ == [
        "Artifact", "BenchOptions", "BuildOptions", "Candidate", "ConvertOptions",
        "DistillOptions", "ExportOptions", "Loaded", "PackageOptions", "PackagedModel",
        "PruneOptions", "PublishOptions", "QuantizeOptions", "SessionOptions", "TakeOptions",
        "TensorSpec", "bench", "build", "compare", "convert", "distill", "evaluate", "export",
        "load", "open_dataset", "open_model", "open_session", "package", "prune", "publish",
        "quantize", "read_recipe", "rollback", "run", "sign", "take", "verify",
    ]  # fmt: skip
