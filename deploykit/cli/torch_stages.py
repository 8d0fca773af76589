"""`prune`, `distill`, `export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from deploykit import store
from deploykit.cli import COMMANDS, _common, _options
from deploykit.cli._observer import Terminal
from deploykit.dataset import Dataset
from deploykit.faster import prune_until_faster
from deploykit.report.differences import proof
from deploykit.stages.distill import DistillOptions, distill
from deploykit.stages.export import ExportOptions, export
from deploykit.stages.prune import PruneOptions, prune
from deploykit.values import Artifact


@click.command("prune", help=COMMANDS["prune"][1])
@click.argument("model")
@_common.output_option
@_common.data_option(required=False, text="What importance is seen on; 'target' may hold labels.")
@_options.fields(PruneOptions)
@_common.factory_options
@_common.force_option
@_common.json_option
def prune_command(
    model: str, output: Path, *, data: str | None, force: bool, as_json: bool, **given: Any
) -> None:
    """Remove channels."""
    opened = _common.data(data)
    source = _common.model(model, given, opened)
    options = _options.make(PruneOptions, given)
    before = store.last_record(output)
    if options.speedup is None:
        artifact = prune(source, options, out=output, data=opened, force=force)
    else:
        artifact = _until_faster(source, options, output, data=opened, force=force)
    _common.made(artifact, before, as_json=as_json)


def _until_faster(
    source: Artifact, options: PruneOptions, output: Path, *, data: Dataset | None, force: bool
) -> Artifact:
    with Terminal() as terminal:
        terminal.step(str(source.path), f"prune for {options.speedup}x on {options.target}")
        artifact = prune_until_faster(
            source, options, out=output, data=data, force=force, progress=terminal.progress
        )
        speed = artifact.history[-1].facts["speedup_measured"]
        told = f"{speed['value']:.2f}x [{speed['low']:.2f}, {speed['high']:.2f}]"
        terminal.done(f"{told} in {options.precision} on {options.target}, measured", cached=False)
    return artifact


DISTILL = f"""{COMMANDS["distill"][1]}

A student in ONNX is trained as the engine computes it: one that `quantize` made stays quantized,
and learns its scales too (quantization-aware training; a --learning-rate near 0.001 suits it).
"""


@click.command("distill", help=DISTILL)
@click.argument("student")
@_common.output_option
@click.option(
    "--teacher",
    "teachers",
    required=True,
    multiple=True,
    help="A torch artifact folder, an ONNX model or file.py:factory; several teach the mean of "
    "their outputs.",
)
@click.option(
    "--teacher-weights",
    type=click.Path(path_type=Path),
    help="Checkpoint of a factory.",
)
@_common.data_option(text="Training data; labels in 'target'.")
@_options.fields(DistillOptions)
@_common.factory_options
@_common.force_option
@_common.json_option
def distill_command(
    student: str,
    output: Path,
    *,
    teachers: tuple[str, ...],
    data: str,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Train the student."""
    opened = _common.required_data(data)
    source = _common.model(student, given, opened)
    guides = [_common.model(t, {"weights": given["teacher_weights"]}, opened) for t in teachers]
    options = _options.make(DistillOptions, given)
    before = store.last_record(output)
    first = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun, one speaks
    with Terminal() as terminal:
        if first:
            terminal.step(student, "distill")
        artifact = distill(
            source,
            options,
            teacher=guides,
            data=opened,
            out=output,
            force=force,
            progress=terminal.progress,
        )
    if first:
        _common.made(artifact, before, as_json=as_json)


@click.command("export", help=COMMANDS["export"][1])
@click.argument("model")
@_common.output_option
@_common.data_option(required=False, text="Compare with PyTorch on this data; else on random.")
@_options.fields(ExportOptions)
@_common.factory_options
@_common.force_option
@_common.json_option
def export_command(
    model: str, output: Path, *, data: str | None, force: bool, as_json: bool, **given: Any
) -> None:
    """Export to ONNX."""
    opened = _common.data(data)
    source = _common.model(model, given, opened)
    options = _options.make(ExportOptions, given)
    before = store.last_record(output)
    artifact = export(source, options, out=output, data=opened, force=force)
    _common.made(artifact, before, as_json=as_json)
    if not as_json:
        click.echo("\n".join(proof(artifact)))
