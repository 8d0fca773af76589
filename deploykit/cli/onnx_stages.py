"""`quantize`, `build`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploykit.cli import COMMANDS, _common, _options
from deploykit.cli._observer import Terminal
from deploykit.formats import open_model
from deploykit.stages.build import BuildOptions, build
from deploykit.stages.quantize import QuantizeOptions, quantize


@click.command("quantize", help=COMMANDS["quantize"][1])
@click.argument("model")
@_common.output_option
@_common.data_option("--calibration-data", text="Real inputs to calibrate on.")
@_options.fields(QuantizeOptions)
@_common.force_option
@_common.json_option
def quantize_command(
    model: str, output: Path, *, data: str, force: bool, as_json: bool, **given: Any
) -> None:
    """Quantize to INT8."""
    opened, options = _common.required_data(data), _options.make(QuantizeOptions, given)
    source = open_model(model)
    with Terminal() as terminal:
        terminal.step(model, "calibrate")
        artifact = quantize(
            source, options, data=opened, out=output, force=force, progress=terminal.progress
        )
    _common.made(artifact, as_json=as_json)


@click.command("build", help=COMMANDS["build"][1])
@click.argument("model")
@_common.output_option
@_options.fields(BuildOptions)
@_common.force_option
@_common.json_option
def build_command(model: str, output: Path, *, force: bool, as_json: bool, **given: Any) -> None:
    """Build an engine."""
    artifact = build(open_model(model), _options.make(BuildOptions, given), out=output, force=force)
    _common.made(artifact, as_json=as_json)
