"""`package`, `sign`, `verify`, `publish`, `rollback`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploykit import _files, _json, backends
from deploykit.bundle import (
    BundleError,
    PackagedModel,
    PackageOptions,
    Published,
    PublishOptions,
    package,
    publish,
    rollback,
    sign,
    verify,
)
from deploykit.cli import COMMANDS, _common, _options
from deploykit.cli._observer import Terminal
from deploykit.dataset import Dataset
from deploykit.environment import Environment
from deploykit.errors import DeploykitError, InputError, UsageError
from deploykit.formats import open_model
from deploykit.measure import Candidate
from deploykit.tuning import TOLD, Tuned, tune
from deploykit.values import Artifact, Json, parse

EVIDENCE = "deploykit.evidence/1"
_path = click.Path(path_type=Path)
public_key_option = click.option(
    "--public-key", type=_path, help="Whose signature the bundle must have: a PEM file."
)
min_version_option = click.option(
    "--min-version", type=click.IntRange(1), help="Refuse older versions: a replayed bundle."
)


@click.command("package", help=COMMANDS["package"][1])
@click.argument("models", nargs=-1, required=True)
@_common.output_option
@_common.data_option(text="Real inputs; the first samples become the golden inputs.")
@click.option("--backend", help="ort-cpu or openvino, for the ONNX models.")
@click.option(
    "--evidence", multiple=True, type=_path, help="What evaluate, compare or bench --json printed."
)
@click.option(
    "--slo",
    help="As in p99=20ms: which of the models is served first, its batch size, copies, threads and "
    "queue delay are chosen by measurement on this machine, for most samples a second.",
)
@_options.fields(PackageOptions)
@_common.force_option
@_common.json_option
def package_command(
    models: tuple[str, ...], output: Path, *, data: str, force: bool, as_json: bool, **given: Any
) -> None:
    """Pack models."""
    backend, evidence, slo = (given.pop(name) for name in ("backend", "evidence", "slo"))
    options = _options.make(PackageOptions, given)
    opened = _common.required_data(data)
    packed = [
        PackagedModel(artifact=artifact, backend=_backend(artifact, backend))
        for artifact in map(open_model, models)
    ]
    told = _documents(evidence)
    if slo:
        _files.check_free(output, force=force)
        tuned = _tuned(packed, slo, opened, {**given, "layout": options.layout})
        packed.sort(key=lambda model: _entry(model).name != tuned.chosen.model)
        options = options.model_copy(update=tuned.options)
        told.append(tuned.model_dump(mode="json", by_alias=True))
        click.echo(_told(tuned), err=True)
    evidence = {"schema": EVIDENCE, "documents": told} if told else None
    bundle = package(packed, options, out=output, data=opened, evidence=evidence, force=force)
    text = f"{output}: {bundle.name} version {bundle.version}, {len(bundle.files)} files"
    _common.show(bundle, text, as_json=as_json)


def _backend(artifact: Artifact, asked: str | None) -> str:
    """The backend that a packaged model is for: as asked, or the first that takes its format."""
    if artifact.format == "engine":
        return str(artifact.facts.get("flavour", "tensorrt"))
    return asked or backends.fitting(artifact)[0]


def _entry(model: PackagedModel) -> Candidate:
    """The model as one to measure; its name tells it apart from the others of a bundle."""
    name = f"{model.artifact.path.name} ({model.artifact.precision})"
    return Candidate(name=name, artifact=model.artifact, backend=model.backend)


def _tuned(models: list[PackagedModel], slo: str, data: Dataset, given: dict[str, Any]) -> Tuned:
    """Raises UsageError: the layout has no server, or what is to be chosen is given."""
    if given["layout"] == "plain":
        raise UsageError(
            "--slo chooses for a server, and the plain layout has none",
            hint="--layout triton, kserve or oci",
        )
    if fixed := [name for name in TOLD if given.get(name) is not None]:
        flag = "--" + fixed[0].replace("_", "-")
        raise UsageError(f"--slo chooses {flag}, which is given too", hint="leave one of them out")
    entries = [_entry(model) for model in models]
    with Terminal() as terminal:
        terminal.step(", ".join(entry.name for entry in entries), "tune")
        return tune(
            entries, slo, data=data,
            progress=lambda text, done, total: terminal.progress(done, total, text),
        )  # fmt: skip


def _told(tuned: Tuned) -> str:
    best = tuned.chosen
    return (
        f"{tuned.slo}: {best.model} in batches of up to {best.batch_size}, {best.instances} x "
        f"{best.threads} threads, queue delay {tuned.queue_delay_us} us: "
        f"{best.samples_per_second:.4g} samples/s, a call takes {best.call_ms:.3g} ms; "
        f"{len(tuned.tried)} settings were measured; {'; '.join(tuned.notes)}"
    )


def _documents(paths: tuple[Path, ...]) -> list[Json]:
    """What was measured before. Raises InputError: one is not of deploykit."""
    documents = [_json.read(path) for path in paths]
    for path, document in zip(paths, documents, strict=True):
        if not str(document.get("schema")).startswith("deploykit."):
            raise InputError(
                f"{path} is no document of deploykit (it has no such schema)",
                hint="give what evaluate, compare or bench printed with --json",
            )
    return documents


@click.command("sign", help=COMMANDS["sign"][1])
@click.argument("bundle", type=_path)
@click.option("--private-key", type=_path, required=True, help="An elliptic-curve key: a PEM file.")
@_common.force_option
@_common.json_option
def sign_command(bundle: Path, *, private_key: Path, force: bool, as_json: bool) -> None:
    """Sign a bundle."""
    signature = sign(bundle, private_key, force=force)
    text = f"{bundle}: signed; verify it with --public-key"
    plain = {"bundle": str(bundle), "signature": str(signature)}
    _common.show(plain, text, as_json=as_json, schema="deploykit.signature/1")


target_option = click.option(
    "--target", type=_path, help="Check for another machine: what `doctor --json` printed there."
)


@click.command("verify", help=COMMANDS["verify"][1])
@click.argument("bundle", type=_path)
@public_key_option
@min_version_option
@target_option
@_common.json_option
def verify_command(
    bundle: Path,
    *,
    public_key: Path | None,
    min_version: int | None,
    target: Path | None,
    as_json: bool,
) -> None:
    """Check a bundle."""
    machine = _machine(target) if target else None
    try:
        result = verify(bundle, public_key=public_key, min_version=min_version, target=machine)
    except DeploykitError as error:
        if as_json:
            _common.show(_failure(bundle, error), "", as_json=True)
        raise
    _common.show(result, f"{bundle}: {result}", as_json=as_json, schema="deploykit.verification/1")


@click.command("publish", help=COMMANDS["publish"][1])
@click.argument("bundle", type=_path)
@click.argument("repository", type=_path)
@_options.fields(PublishOptions)
@public_key_option
@min_version_option
@target_option
@_common.json_option
def publish_command(
    bundle: Path, repository: Path, *, target: Path | None, as_json: bool, **given: Any
) -> None:
    """Publish a bundle."""
    machine = _machine(target) if target else None
    made = publish(
        bundle,
        repository,
        _options.make(PublishOptions, given),
        public_key=given["public_key"],
        min_version=given["min_version"],
        target=machine,
    )
    _show_published(made, as_json=as_json)


@click.command("rollback", help=COMMANDS["rollback"][1])
@click.argument("repository", type=_path)
@click.argument("name")
@_options.fields(PublishOptions, without=("keep",))
@_common.json_option
def rollback_command(repository: Path, name: str, *, as_json: bool, **given: Any) -> None:
    """Go back."""
    made = rollback(repository, name, _options.make(PublishOptions, given))
    _show_published(made, as_json=as_json)


def _show_published(made: Published, *, as_json: bool) -> None:
    lines = [f"{made.repository / made.name}: serves version {made.version} ({made.engine})"]
    lines += [f"passed over: {path}: {why}" for path, why in made.passed_over.items()]
    others = [str(v) for v in made.versions if v != made.version]
    if others:
        lines.append(f"stays loaded: version {', '.join(others)}")
    if made.ready:
        lines.append("the server is ready and answers the golden inputs within tolerance")
    else:
        lines.append("NO SERVER ASKED: give --url, or let Triton poll the repository")
    _common.show(made, "\n  ".join(lines), as_json=as_json, schema="deploykit.published/1")


def _machine(path: Path) -> Environment:
    """The description of a machine, alone or in the document of `doctor`."""
    told = _json.read(path)
    return parse(Environment, told.get("environment", told), str(path))


def _failure(bundle: Path, error: DeploykitError) -> Json:
    """What is wrong with a bundle, for a program."""
    wrong = error if isinstance(error, BundleError) else None
    return {
        "schema": "deploykit.failure/1",
        "path": str(bundle),
        "code": wrong.code if wrong else type(error).__name__,
        "exit_code": error.exit_code,
        "problems": list(wrong.problems) if wrong else [str(error)],
        "hint": error.hint,
    }
