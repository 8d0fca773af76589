"""`doctor`, `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploykit import _files, backends
from deploykit._shapes import parse_shape
from deploykit.bundle import Bundle, manifest
from deploykit.cli import COMMANDS, _common, _options
from deploykit.environment import read as read_environment
from deploykit.environment import versions
from deploykit.errors import UsageError
from deploykit.formats.onnx_anatomy import Anatomy, anatomy
from deploykit.report import anatomy as report_anatomy
from deploykit.report import damage, history
from deploykit.report.summary import size
from deploykit.stages import build
from deploykit.stages.quantize import preset
from deploykit.stages.quantize.gain import keep_float, probed
from deploykit.values import Artifact, Json


@click.command("doctor", help=COMMANDS["doctor"][1])
@_common.json_option
def doctor_command(*, as_json: bool) -> None:
    """Say what works here."""
    checks: dict[str, str | None] = {b.name: b.unavailable() for b in backends.BACKENDS}
    reason = build.unavailable()
    checks["build (TensorRT)"] = f"{reason}: {build.INSTALL}" if reason else None
    from deploykit.backends._common import missing_library

    checks["triton layout"] = missing_library("tritonclient")
    checks["onnxruntime packages"] = _conflict()
    environment = read_environment()
    chosen = preset("ort-cpu")
    lines = [f"{'ok ' if why is None else 'no '} {name}{f': {why}' if why else ''}"
             for name, why in checks.items()]  # fmt: skip
    lines += [
        f"cpu: {environment.cpu}, {environment.cores} cores, {', '.join(environment.cpu_features)}",
        f"int8 preset here: {chosen.name} ({chosen.reason})",
        "versions: " + ", ".join(f"{k} {v}" for k, v in environment.libraries.items()),
    ]
    document: Json = {
        "checks": {name: {"ok": why is None, "reason": why} for name, why in checks.items()},
        "environment": environment.model_dump(mode="json"),
        "int8_preset": chosen.model_dump(mode="json"),
    }
    _common.show(document, "\n".join(lines), as_json=as_json, schema="deploykit.doctor/1")


def _conflict() -> str | None:
    both = versions(("onnxruntime", "onnxruntime-gpu"))
    if len(both) < 2:
        return None
    return (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
        "uninstall both, then install one"
    )


@click.command("inspect", help=COMMANDS["inspect"][1])
@click.argument("model")
@click.option(
    "--keep-float",
    "patterns",
    type=_options.Items(str),
    multiple=True,
    help="Patterns of node names: what the model gains with them in float.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Draw what each quantized node costs: a .png or .svg.",
)
@_common.factory_options
@_common.force_option
@_common.json_option
def inspect_command(
    model: str,
    *,
    patterns: tuple[tuple[str, ...], ...],
    plot: Path | None,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Say what a model is."""
    asked = tuple(pattern for part in patterns for pattern in part)
    if (Path(model) / manifest.MANIFEST).is_file():
        if asked or plot:
            raise UsageError(
                f"{model} is a bundle, --keep-float and --plot take a quantized model",
                hint="give the model that was packed",
            )
        bundle = manifest.read(Path(model))
        _common.show(bundle, _bundle_text(model, bundle), as_json=as_json)
        return
    shapes = given["input_shapes"]
    if not _common.is_factory(model):  # an ONNX file's work is counted at these
        given = {**given, "input_shapes": ()}
    artifact = _common.model(model, given, native=True)
    found = _anatomy(artifact, shapes)
    graph: Json = found.model_dump(mode="json") if found else {}
    document = {**artifact.model_dump(mode="json"), "graph": graph}
    lines = [_text(artifact, found)]
    if asked:
        document["keep_float"] = kept = _gains(artifact, asked)
        lines += [f"  keep float {damage.gain(each)}" for each in kept]
    if plot:
        damage.check_suffix(plot)
        _files.check_free(plot, force=force)
        damage.plot(probed(artifact), artifact.path.name, plot)
        document["plot"] = str(plot)
        lines.append(f"  plot: {plot}")
    _common.show(document, "\n".join(lines), as_json=as_json, schema="deploykit.artifact/1")


def _gains(artifact: Artifact, patterns: tuple[str, ...]) -> list[Json]:
    """What each pattern gives, and then all of them together."""
    facts = probed(artifact)
    together = [patterns] if len(patterns) > 1 else []
    return [keep_float(facts, each) for each in [*((p,) for p in patterns), *together]]


def _bundle_text(path: str, bundle: Bundle) -> str:
    lines = [f"{path}: bundle {bundle.name} version {bundle.version}, layout {bundle.layout}"]
    for engine in bundle.engines:
        lines.append(f"  {engine.path}: {engine.format}, {engine.precision}, for {engine.backend}")
        lines += [f"    in   {spec}" for spec in engine.inputs]
        lines += [f"    out  {spec}" for spec in engine.outputs]
    lines.append(f"  {len(bundle.files)} files, not checked here: `deploykit verify {path}`")
    return "\n".join(lines)


def _anatomy(artifact: Artifact, shapes: tuple[str, ...]) -> Anatomy | None:
    """What an ONNX file is made of. Raises UsageError: an input has two shapes, or one is none."""
    if artifact.format != "onnx":
        return None
    pairs = [parse_shape(text) for text in shapes]
    if len(dict(pairs)) < len(pairs):
        raise UsageError("an input has two shapes", hint="give one an input")
    return anatomy(artifact.path, dict(pairs))


def _text(artifact: Artifact, found: Anatomy | None) -> str:
    weight = size(sum(map(_files.size_bytes, artifact.files)))
    lines = [f"{artifact.path}: {artifact.format}, {artifact.precision}, {weight}"]
    lines += [f"  in   {spec}" for spec in artifact.inputs]
    lines += [f"  out  {spec}" for spec in artifact.outputs]
    if found:
        lines += [f"  {line}" for line in report_anatomy.lines(found)]
    if artifact.preprocessing:
        lines.append(f"  preprocessing: {artifact.preprocessing}")
    lines += [f"  {line}" for line in history.lines(artifact.history)]
    costs = artifact.facts.get("search", {})
    told = damage.table(costs.get("damage", []), costs.get("probe") or {})
    lines += [f"    {line}" for line in told]
    if not artifact.history:
        lines.append("  no record: not made by deploykit, or its record is gone")
    return "\n".join(map(_printable, lines))


def _printable(line: str) -> str:
    """Names out of a file may hold what steers a terminal."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)
