"""`convert`, `quantize`, `build`."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deploykit import _files, store
from deploykit.bundle import Origin, origin, prove
from deploykit.cli import COMMANDS, _common, _options
from deploykit.cli._observer import Terminal
from deploykit.dataset import Dataset
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
    before = store.last_record(output)
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
    _common.made(artifact, before, as_json=as_json)


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
    before = store.last_record(output)
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
    _common.made(artifact, before, as_json=as_json)


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
@click.argument("model", required=False)
@_common.output_option
@click.option(
    "--from",
    "bundle",
    type=click.Path(path_type=Path),
    help="Make the engine of a bundle again, from its portable model and with its options; those "
    "given here come first. Proven on its golden inputs.",
)
@click.option("--public-key", type=click.Path(path_type=Path), help="Who must have signed --from.")
@click.option("--shapes-from", help="Data whose real shapes the optimization profile spans.")
@_options.fields(BuildOptions)
@_common.force_option
@_common.json_option
def build_command(
    model: str | None,
    output: Path,
    *,
    bundle: Path | None,
    shapes_from: str | None,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Build an engine."""
    key, data = given.pop("public_key"), _common.data(shapes_from)
    if (model is None) == (bundle is None):
        raise UsageError(
            "give a model, or --from a bundle", hint="deploykit build m.onnx -o m.engine"
        )
    if bundle is not None:
        _rebuild(bundle, output, given, data=data, key=key, force=force, as_json=as_json)
        return
    assert model is not None  # noqa: S101 - one of the two is
    source, options = open_model(model, native=True), _options.make(BuildOptions, given)
    before = store.last_record(output)
    with Terminal() as terminal:
        terminal.step(model, "build")
        artifact = build(source, options, out=output, data=data, force=force, talk=_talk(terminal))
    _common.made(artifact, before, as_json=as_json)


def _talk(terminal: Terminal) -> Callable[[str, int, int], None]:
    return lambda text, done, total: terminal.progress(done, total, text)


def _rebuild(  # noqa: PLR0913 - as they were asked
    bundle: Path,
    output: Path,
    given: dict[str, Any],
    *,
    data: Dataset | None,
    key: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build into a private folder, prove, then put it in its place."""
    _files.check_free(output, force=force)
    with origin(bundle, public_key=key) as told, _files.scratch() as folder:
        if told.plugins and not given.get("plugins"):
            raise UsageError(
                f"the engine was built with the plugin {', '.join(told.plugins)}, and a bundle "
                "brings no native code that is run to build",
                hint="give your own copy of it: --plugins FILE",
            )
        options = _options.make(BuildOptions, _over(told, given, folder))
        with Terminal() as terminal:
            terminal.step(str(bundle), "build")
            made = build(
                told.source, options, out=folder / "m.engine", data=data, talk=_talk(terminal)
            )
        result = prove(told, made, output)
        store.place(made, output, force=force)
    _common.show(result, str(result), as_json=as_json, schema="deploykit.rebuilt/1")


def _over(told: Origin, given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Options of the bundle's build under those that are given; its timing cache to start from."""
    mine = {name: value for name, value in given.items() if value not in (None, ())}
    if any(name.endswith("_shapes") for name in mine):
        mine = {"min_shapes": (), "opt_shapes": (), "max_shapes": (), **mine}
    merged = {**told.options, **mine}
    if told.timing_cache and merged.get("flavour") == "tensorrt" and "timing_cache" not in mine:
        cache = folder / "timing.cache"
        shutil.copyfile(told.timing_cache, cache)
        merged["timing_cache"] = str(cache)
    return merged
