"""From a trained PyTorch or ONNX model to a measured, verified INT8 engine bundle.

The verbs of the command line are functions here, and its nouns are values. Nothing heavy is
imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploykit.backends import open_session as open_session
    from deploykit.bundle import Loaded as Loaded
    from deploykit.bundle import PackagedModel as PackagedModel
    from deploykit.bundle import PackageOptions as PackageOptions
    from deploykit.bundle import PublishOptions as PublishOptions
    from deploykit.bundle import load as load
    from deploykit.bundle import package as package
    from deploykit.bundle import publish as publish
    from deploykit.bundle import rollback as rollback
    from deploykit.bundle import sign as sign
    from deploykit.bundle import verify as verify
    from deploykit.dataset import open_dataset as open_dataset
    from deploykit.evaluation import compare as compare
    from deploykit.evaluation import evaluate as evaluate
    from deploykit.formats import open_model as open_model
    from deploykit.measure import BenchOptions as BenchOptions
    from deploykit.measure import Candidate as Candidate
    from deploykit.measure import bench as bench
    from deploykit.pipeline import run as run
    from deploykit.recipe import read_recipe as read_recipe
    from deploykit.stages.build import BuildOptions as BuildOptions
    from deploykit.stages.build import build as build
    from deploykit.stages.convert import ConvertOptions as ConvertOptions
    from deploykit.stages.convert import convert as convert
    from deploykit.stages.distill import DistillOptions as DistillOptions
    from deploykit.stages.distill import distill as distill
    from deploykit.stages.export import ExportOptions as ExportOptions
    from deploykit.stages.export import export as export
    from deploykit.stages.prune import PruneOptions as PruneOptions
    from deploykit.stages.prune import prune as prune
    from deploykit.stages.quantize import QuantizeOptions as QuantizeOptions
    from deploykit.stages.quantize import quantize as quantize
    from deploykit.stages.take import TakeOptions as TakeOptions
    from deploykit.stages.take import take as take
    from deploykit.values import Artifact as Artifact
    from deploykit.values import SessionOptions as SessionOptions
    from deploykit.values import TensorSpec as TensorSpec

_HOME = {
    "backends": ("open_session",),
    "bundle": (
        "Loaded",
        "PackageOptions",
        "PackagedModel",
        "PublishOptions",
        "load",
        "package",
        "publish",
        "rollback",
        "sign",
        "verify",
    ),
    "dataset": ("open_dataset",),
    "evaluation": ("compare", "evaluate"),
    "formats": ("open_model",),
    "measure": ("BenchOptions", "Candidate", "bench"),
    "pipeline": ("run",),
    "recipe": ("read_recipe",),
    "stages.build": ("BuildOptions", "build"),
    "stages.convert": ("ConvertOptions", "convert"),
    "stages.distill": ("DistillOptions", "distill"),
    "stages.export": ("ExportOptions", "export"),
    "stages.prune": ("PruneOptions", "prune"),
    "stages.quantize": ("QuantizeOptions", "quantize"),
    "stages.take": ("TakeOptions", "take"),
    "values": ("Artifact", "SessionOptions", "TensorSpec"),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULES)  # noqa: PLE0605 - the test of the public API reads it


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'deploykit' has no attribute {name!r}")
    return getattr(importlib.import_module(f"deploykit.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
