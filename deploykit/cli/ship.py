"""`package`, `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploykit import backends
from deploykit.bundle import PackagedModel, PackageOptions, package, verify
from deploykit.cli import COMMANDS, _common, _options
from deploykit.formats import open_model
from deploykit.values import Artifact


@click.command("package", help=COMMANDS["package"][1])
@click.argument("models", nargs=-1, required=True)
@_common.output_option
@_common.data_option(text="Real inputs; the first samples become the golden inputs.")
@_common.backend_option
@_options.fields(PackageOptions)
@_common.force_option
@_common.json_option
def package_command(
    models: tuple[str, ...],
    output: Path,
    *,
    data: str,
    backend: str | None,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Pack models."""
    options = _options.make(PackageOptions, given)
    opened = _common.required_data(data)
    packed = [
        PackagedModel(artifact=artifact, backend=backend or _backend(artifact))
        for artifact in map(open_model, models)
    ]
    bundle = package(packed, options, out=output, data=opened, evidence=None, force=force)
    text = f"{output}: {bundle.name} version {bundle.version}, {len(bundle.files)} files"
    _common.show(bundle, text, as_json=as_json)


def _backend(artifact: Artifact) -> str:
    """The backend that a packaged model is for: the first that takes its format."""
    if artifact.format == "engine":
        return str(artifact.facts.get("flavour", "tensorrt"))
    fitting = backends.available(artifact.format)
    if not fitting:
        raise backends.no_backend(artifact)
    return fitting[0].name


@click.command("verify", help=COMMANDS["verify"][1])
@click.argument("bundle", type=click.Path(path_type=Path))
@_common.json_option
def verify_command(bundle: Path, *, as_json: bool) -> None:
    """Check a bundle."""
    result = verify(bundle)
    _common.show(result, f"{bundle}: {result}", as_json=as_json, schema="deploykit.verification/1")
