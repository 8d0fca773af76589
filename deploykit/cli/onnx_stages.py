"""`convert`, `quantize`, `build`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from deploykit.cli import COMMANDS, _common, _options
from deploykit.cli._observer import Terminal
from deploykit.errors import UsageError
from deploykit.formats import open_model
from deploykit.stages.build import BuildOptions, build
from deploykit.stages.convert import ConvertOptions, convert
from deploykit.stages.quantize import Promise, QuantizeOptions, quantize


@click.command("convert", help=COMMANDS["convert"][1])
@click.argument("model")
@_common.output_option
@_common.data_option(text="Real inputs to find out on what must stay in float32, and to prove it.")
@_options.fields(ConvertOptions)
@_common.force_option
@_common.json_option
def convert_command(
    model: str, output: Path, *, data: str, force: bool, as_json: bool, **given: Any
) -> None:
    """Convert."""
    opened, options = _common.required_data(data), _options.make(ConvertOptions, given)
    source = open_model(model)
    with Terminal() as terminal:
        terminal.step(model, "convert")
        artifact = convert(
            source,
            options,
            data=opened,
            out=output,
            force=force,
            talk=lambda text, done, total: terminal.progress(done, total, text),
        )
    _common.made(artifact, as_json=as_json)


@click.command("quantize", help=COMMANDS["quantize"][1])
@click.argument("model")
@_common.output_option
@_common.data_option("--calibration-data", text="Real inputs to calibrate on.")
@click.option("--max-drop", help="Score that may be lost: 0.005 in units of the metric, or 1%.")
@click.option("--evaluation-data", help="Data on which --max-drop must hold.")
@click.option("--metric", help="What --max-drop is a drop of.  [default: top1]")
@_options.fields(QuantizeOptions)
@_common.force_option
@_common.json_option
def quantize_command(  # noqa: PLR0913 - one parameter an option
    model: str,
    output: Path,
    *,
    data: str,
    max_drop: str | None,
    evaluation_data: str | None,
    metric: str | None,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Quantize."""
    opened, options = _common.required_data(data), _options.make(QuantizeOptions, given)
    source = open_model(model)
    promise = _promise(max_drop, evaluation_data, metric)
    with Terminal() as terminal:
        terminal.step(model, "quantize")
        artifact = quantize(
            source,
            options,
            data=opened,
            out=output,
            promise=promise,
            force=force,
            talk=lambda text, done, total: terminal.progress(done, total, text),
        )
    _common.made(artifact, as_json=as_json)


def _promise(max_drop: str | None, reference: str | None, metric: str | None) -> Promise | None:
    """Raises UsageError: one of drop and data without the other, or a drop that is no number."""
    if max_drop is None and reference is None and metric is None:
        return None
    if max_drop is None or reference is None:
        raise UsageError(
            "--max-drop and --evaluation-data go together, and --metric with them",
            hint="give both: how much may be lost, and on which data",
        )
    relative = max_drop.endswith("%")
    try:
        allowed = float(max_drop.removesuffix("%")) / (100 if relative else 1)
    except ValueError:
        allowed = math.nan
    if not 0 <= allowed < math.inf:
        raise UsageError(
            f"--max-drop {max_drop!r} is no number from 0 up", hint="write 0.005 or 1%"
        )
    return Promise(_common.required_data(reference), metric or "top1", allowed, relative)


@click.command("build", help=COMMANDS["build"][1])
@click.argument("model")
@_common.output_option
@click.option("--shapes-from", help="Data whose real shapes the optimization profile spans.")
@_options.fields(BuildOptions)
@_common.force_option
@_common.json_option
def build_command(
    model: str,
    output: Path,
    *,
    shapes_from: str | None,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Build an engine."""
    source, options = open_model(model, native=True), _options.make(BuildOptions, given)
    data = _common.data(shapes_from)
    with Terminal() as terminal:
        terminal.step(model, "build")
        artifact = build(
            source,
            options,
            out=output,
            data=data,
            force=force,
            talk=lambda text, done, total: terminal.progress(done, total, text),
        )
    _common.made(artifact, as_json=as_json)
