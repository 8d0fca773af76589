"""A recipe: the whole way of one model, in TOML. Paths are relative to the recipe's folder."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from deploykit._code import split_reference
from deploykit._shapes import DTYPES
from deploykit.backends import BACKENDS
from deploykit.bundle import PackageOptions
from deploykit.errors import InputError, did_you_mean
from deploykit.measure import BenchOptions
from deploykit.metrics import METRICS, UP_TO_ONE
from deploykit.stages.distill import DistillOptions
from deploykit.stages.export import ExportOptions
from deploykit.stages.prune import PruneOptions
from deploykit.stages.quantize import QuantizeOptions
from deploykit.values import Json, TensorSpec, Value, parse


class ModelSource(Value):
    """Where the model comes from: a factory with its inputs, or the path of a model."""

    path: str | None = None
    """An `.onnx` file or a torch artifact folder."""
    factory: str | None = None
    arguments: Json = {}
    weights: str | None = None
    inputs: tuple[TensorSpec, ...] = ()
    """By the names of `forward`'s arguments, or in their order; by default what `example_inputs()`
    beside the factory gives, else the arrays of the calibration data."""
    dynamic_axes: tuple[str, ...] = ()
    """As `--dynamic-axis` takes them: `input_ids:1=sequence[1..512]`."""
    outputs: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_source(self) -> ModelSource:
        if (self.path is None) == (self.factory is None):
            raise ValueError("give either 'path' or 'factory'")
        for spec in self.inputs:
            _one_of(spec.dtype, DTYPES)
        return self


class DataSources(Value):
    """References of the data: calibration and evaluation always, train for distillation."""

    calibration: str
    evaluation: str
    train: str | None = None
    train_samples: int = Field(default=0, ge=0)
    """Use the first N samples; 0 for all."""
    evaluation_samples: int = Field(default=0, ge=0)


class Gates(Value):
    """What the shipped engine must hold, against the float ONNX model on the target."""

    metric: str = "top1"
    """A built-in metric, or `file.py:function`."""
    max_drop: float = Field(default=0.005, ge=0)
    """Score that may be lost, in units of the metric."""
    min_speedup: float = Field(default=1.0, gt=0)
    """The lower bound of the measured speed-up must be above this."""

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        return metric if ":" in metric else _one_of(metric, METRICS)

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if self.max_drop >= 1 and self.metric in UP_TO_ONE:
            raise ValueError(f"max_drop {self.max_drop:g} allows any {self.metric}: write 0.005")
        return self


class BenchSection(BenchOptions):
    """Benchmark options, and the backends to measure on beside the target."""

    backends: tuple[str, ...] = ("pytorch", "ort-cpu", "openvino")

    @field_validator("backends")
    @classmethod
    def _known(cls, backends: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_one_of(name, (b.name for b in BACKENDS)) for name in backends)


def _one_of(word: str, known: Iterable[str]) -> str:
    names = list(known)
    if word not in names:
        raise ValueError(f"unknown name {word!r}, {did_you_mean(word, names)}")
    return word


class Recipe(Value):
    """Everything that `deploykit run` does for one model. A stage without its table is left out."""

    name: str
    model: ModelSource
    data: DataSources
    gates: Gates = Gates()
    prune: PruneOptions | None = None
    distill: DistillOptions | None = None
    export: ExportOptions = ExportOptions()
    quantize: QuantizeOptions = QuantizeOptions()
    bench: BenchSection = BenchSection()
    package: PackageOptions = PackageOptions()

    @model_validator(mode="after")
    def _distill_needs_data(self) -> Recipe:
        if self.distill and not self.data.train:
            raise ValueError("[distill] needs 'train' in [data]")
        if self.package.layout == "triton" and self.quantize.target == "openvino":
            raise ValueError("the triton layout does not serve openvino: take the plain layout")
        if self.prune and self.prune.speedup and self.prune.target != self.quantize.target:
            raise ValueError(
                f"[prune] is for {self.prune.target} and [quantize] for {self.quantize.target}: "
                "give both the same 'target'"
            )
        if (self.prune or self.distill) and self.model.path and self.model.path.endswith(".onnx"):
            raise ValueError("[prune] and [distill] need a PyTorch model, this one is ONNX")
        return self


def read_recipe(path: Path) -> Recipe:
    """Read a recipe; its paths come back absolute. Raises InputError: not TOML, or a bad key."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}", hint="give a recipe in TOML") from error
    _resolve(data, path.absolute().parent)
    return parse(Recipe, data, str(path))


_PATHS = {
    "model": ("path", "factory", "weights"),
    "data": ("train", "calibration", "evaluation"),
    "gates": ("metric",),
}


def _resolve(data: dict[str, Any], folder: Path) -> None:
    """Make the paths of a recipe absolute, in place; other references stay as they are."""
    for table, keys in _PATHS.items():
        section = data.get(table)
        for key in keys:
            value = section.get(key) if isinstance(section, dict) else None
            if isinstance(value, str):
                data[table][key] = _absolute(value, folder, key)


def _absolute(reference: str, folder: Path, key: str) -> str:
    if ":" in reference:
        place, name = split_reference(reference)
        return f"{_joined(folder, place)}:{name}" if place.suffix == ".py" else reference
    is_word = key in ("metric", "factory")
    return reference if is_word else str(_joined(folder, Path(reference)))


def _joined(folder: Path, path: Path) -> Path:
    return (folder / path).resolve() if not path.is_absolute() else path
