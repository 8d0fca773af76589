"""The steps of a recipe: which artifacts are made, from which, by which stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deploykit._code import beside
from deploykit.dataset import Dataset, open_dataset
from deploykit.faster import prune_until_faster
from deploykit.formats import open_model
from deploykit.formats.torch_module import EXAMPLE_INPUTS
from deploykit.recipe import Recipe
from deploykit.stages.distill import distill
from deploykit.stages.export import export
from deploykit.stages.prune import OBSERVED, prune
from deploykit.stages.quantize import quantize
from deploykit.stages.take import TakeOptions, is_program, take
from deploykit.values import Artifact

MODEL, FLOAT = "model", "model.fp32.onnx"
"""The source model, and the baseline of both gates: the same model in ONNX, in float."""

Artifacts = Mapping[str, Artifact]
Progress = Callable[[int, int, str], None]
"""Called with how much is done, of how much, and a word on it."""
Make = Callable[[Artifacts, Path, Progress], Artifact]
"""Called with what is made so far and the path of the result."""


@dataclass(frozen=True, slots=True)
class Step:
    """One artifact to make."""

    name: str
    stage: str
    source: str | None
    make: Make


def plan(recipe: Recipe) -> tuple[Step, ...]:
    """The steps of a recipe in their order; nothing is run."""
    steps = _intake(recipe)
    steps.append(_quantize_step(recipe, MODEL))
    name = MODEL
    if recipe.prune:
        steps.append(Step("pruned", "prune", name, partial(_prune, recipe, name)))
        name = "pruned"
    if recipe.distill:
        steps.append(Step("distilled", "distill", name, partial(_distill, recipe, name)))
        name = "distilled"
    if name != MODEL:
        steps += [_export_step(recipe, name), _quantize_step(recipe, name)]
    return tuple(steps)


def data(recipe: Recipe, role: str) -> Dataset:
    """One of the recipe's data sets: train, calibration or evaluation."""
    opened = open_dataset(getattr(recipe.data, role))
    samples = getattr(recipe.data, f"{role}_samples", 0)
    return opened.first(samples) if samples else opened


def describe(recipe: Recipe) -> list[tuple[str, str]]:
    """What a run of this recipe will do, a line a step."""
    told = []
    for step in plan(recipe):
        options = getattr(recipe, step.stage, None)
        given = options.model_dump(exclude_unset=True) if options else {}
        how = ", ".join(f"{k} {v}" for k, v in given.items()) or "defaults"
        source = f" from {step.source}" if step.source else ""
        told.append((step.name, f"{step.stage}{source} ({how}), then evaluate"))
    bench, gates = recipe.bench, recipe.gates
    sizes = ", ".join(map(str, bench.batch_sizes))
    told.append(("bench", f"{bench.preset}, batch {sizes}, on {', '.join(bench.backends)}"))
    limits = (
        f"{gates.metric} drop <= {gates.max_drop}, "
        f"speed-up > {gates.min_speedup} and beyond the noise floor"
    )
    return [*told, ("verdict", limits), ("bundle", f"layout {recipe.package.layout}")]


def _intake(recipe: Recipe) -> list[Step]:
    """From the recipe's model to the float ONNX baseline."""
    path = recipe.model.path
    if path is None or is_program(path):
        first = Step(MODEL, "take", None, partial(_take, recipe))
        return [first, _export_step(recipe, MODEL)]
    given = open_model(path)
    name = FLOAT if given.format == "onnx" else MODEL
    first = Step(name, "take", None, lambda *_: given)
    return [first] if name == FLOAT else [first, _export_step(recipe, MODEL)]


def _take(recipe: Recipe, artifacts: Artifacts, out: Path, progress: Progress) -> Artifact:
    del artifacts, progress
    source = recipe.model
    factory = source.factory or str(source.path)
    inputs = source.inputs
    if not inputs and not is_program(factory) and not beside(factory, EXAMPLE_INPUTS):
        inputs = data(recipe, "calibration").specs()
    options = TakeOptions(
        factory=factory,
        arguments=source.arguments,
        weights=Path(source.weights) if source.weights else None,
        inputs=inputs,
        dynamic_axes=source.dynamic_axes,
        outputs=source.outputs,
    )
    return take(options, out=out, force=True)


def _prune(
    recipe: Recipe, source: str, artifacts: Artifacts, out: Path, progress: Progress
) -> Artifact:
    options = recipe.prune
    assert options is not None  # noqa: S101 - the plan has this step only then
    seen = data(recipe, "train" if recipe.data.train else "calibration")
    if options.speedup is None:
        needed = seen if options.importance in OBSERVED else None
        return prune(artifacts[source], options, out=out, data=needed, force=True)
    return prune_until_faster(
        artifacts[source], options, out=out, data=seen, force=True, progress=progress
    )


def _distill(
    recipe: Recipe, source: str, artifacts: Artifacts, out: Path, progress: Progress
) -> Artifact:
    assert recipe.distill is not None  # noqa: S101 - the plan has this step only then
    return distill(
        artifacts[source],
        recipe.distill,
        teacher=artifacts[MODEL],
        data=data(recipe, "train"),
        out=out,
        force=True,
        progress=progress,
    )


def _export_step(recipe: Recipe, name: str) -> Step:
    def make(artifacts: Artifacts, out: Path, progress: Progress) -> Artifact:
        del progress
        proof = data(recipe, "evaluation")
        return export(artifacts[name], recipe.export, out=out, data=proof, force=True)

    return Step(f"{name}.fp32.onnx", "export", name, make)


def _quantize_step(recipe: Recipe, name: str) -> Step:
    source = f"{name}.fp32.onnx"

    def make(artifacts: Artifacts, out: Path, progress: Progress) -> Artifact:
        return quantize(
            artifacts[source],
            recipe.quantize,
            data=data(recipe, "calibration"),
            out=out,
            force=True,
            talk=lambda text, done, total: progress(done, total, text),
        )

    return Step(f"{name}.{recipe.quantize.precision}.onnx", "quantize", source, make)
