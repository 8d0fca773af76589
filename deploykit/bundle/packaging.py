"""Package models: a folder that carries what it takes to verify and serve them elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from deploykit import _files, _json, environment, store
from deploykit.bundle import bom, golden, inventory, manifest
from deploykit.bundle.manifest import Bundle, Engine, FileEntry, GoldenInputs, Role
from deploykit.bundle.requirements import requirements
from deploykit.dataset import Dataset
from deploykit.environment import Environment
from deploykit.errors import InputError, IntegrityError, UsageError
from deploykit.layouts import LAYOUTS, Member, Serving, oci
from deploykit.values import Artifact, Feed, Json, Preprocessing, TensorSpec

EVIDENCE = "evidence.json"
OWN_SUFFIXES = frozenset({".json", ".npz", ".yaml", ".pbtxt", ".onnx", ".engine", ".plan"})
"""Endings of files that the bundle has of its own."""


class PackagedModel(NamedTuple):
    """A model and the backend that it will run on; a pair of the two is as good."""

    artifact: Artifact
    backend: str


class PackageOptions(Serving):
    """How to package."""

    layout: Literal["plain", "triton", "kserve", "oci"] = Field(
        default="plain",
        description="plain files; a Triton model repository; the same with a KServe "
        "InferenceService; the same as an OCI image layout (ModelPack)",
    )
    golden_samples: int = Field(
        default=8, ge=1, description="samples of the data that the bundle carries to verify itself"
    )


def package(
    models: Sequence[tuple[Artifact, str]],
    options: PackageOptions,
    *,
    out: Path,
    data: Dataset,
    evidence: Mapping[str, Json] | None = None,
    force: bool = False,
) -> Bundle:
    """Write a bundle of models, each with its backend, at `out` and return the manifest.

    The first model is the one to serve, the others stand in for it, in this order; native code
    needs an ONNX model among them. Each is run, from its place in the bundle, on the first samples
    of `data`; these and its answers go into the bundle. `evidence` is written as it is.

    Raises UsageError: a model that cannot be packaged so, or `out` is in the way. InputError: the
    data or a model is bad. IntegrityError: a model changed since it was opened. StageError: two
    runs of a model differ. MissingError: its backend cannot run here.
    """
    _check_out(out, force=force)
    machine = environment.read()
    members = _members(models, machine)
    preprocessing = _preprocessing(tuple(m.artifact for m in members), data)
    with _files.staged(out) as folder:
        folder.mkdir()
        inner = folder / "bundle" if options.layout == "oci" else folder
        inner.mkdir(exist_ok=True)
        feed = golden.take(data, tuple(m.artifact for m in members), options.golden_samples)
        golden.write_arrays(inner / golden.INPUTS, feed)
        engines = _engines(inner, members, options, feed, machine)
        if evidence is not None:
            text = _json.text(evidence)
            (inner / EVIDENCE).write_text(text, encoding="utf-8")
        created = datetime.now(UTC).isoformat(timespec="seconds")
        _write_bom(inner, options, created, members, engines)
        bundle = Bundle(
            name=options.name,
            version=options.version,
            created=created,
            layout="triton" if options.layout == "oci" else options.layout,
            files=_entries(inner, members, engines),
            engines=engines,
            golden=_golden_inputs(data, feed),
            preprocessing=preprocessing,
            evidence=None if evidence is None else EVIDENCE,
            bom=bom.FILE,
        )
        (inner / manifest.MANIFEST).write_text(manifest.to_json(bundle), encoding="utf-8")
        _set_modes(inner)
        inventory.check(inner, manifest.read(inner))
        if options.layout == "oci":
            oci.write(inner, folder, manifest.described(bundle))
            _files.remove(inner)
    return bundle


def _set_modes(folder: Path) -> None:
    """Whatever the umask: everyone may read, only the owner may write."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _check_out(out: Path, *, force: bool) -> None:
    """Refuse to write over anything but a bundle. Raises UsageError."""
    _files.check_free(out, force=force)
    known = (out / manifest.MANIFEST).is_file() or oci.is_layout(out)
    if out.exists() and not known and not _is_empty(out):
        raise UsageError(
            f"{out} is no bundle ({manifest.MANIFEST} is missing), it is not replaced",
            hint="give another output path, or remove it yourself",
        )


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _members(models: Sequence[tuple[Artifact, str]], machine: Environment) -> tuple[Member, ...]:
    """The models with what they need. Raises UsageError: none, or one that cannot be packaged."""
    if not models:
        raise UsageError("there is no model to package", hint="give at least one")
    for artifact, _ in models:
        _check_format(artifact)
    if all(artifact.format == "engine" for artifact, _ in models):
        raise UsageError(
            f"{models[0][0].path} is native code, which needs a portable ONNX model beside it",
            hint="give the ONNX model that it was built from too, after the engine",
        )
    members = tuple(_member(artifact, backend, machine) for artifact, backend in models)
    _check_members(members)
    return (members[0].model_copy(update={"label": ""}), *members[1:])


def _member(artifact: Artifact, backend: str, machine: Environment) -> Member:
    wanted = requirements(artifact, backend, machine)
    gpu = f"-{wanted.gpus[0].replace('+', 'plus')}" if wanted.gpus else ""
    files = (artifact.path.name, *artifact.weights)
    return Member(
        artifact=artifact,
        backend=backend,
        label=f"-{artifact.precision}-{backend}{gpu}",
        machine=wanted.machine,
        cpu_features_any=wanted.cpu_features_any,
        gpus=wanted.gpus,
        size_bytes=sum(_files.size_bytes(artifact.path.parent / name) for name in files),
    )


def _check_members(members: Sequence[Member]) -> None:
    """Refuse two models that cannot be told apart, or that cannot stand in for each other."""
    labels, first = [member.label for member in members], members[0].artifact
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UsageError(
            f"two models are {twice[0].removeprefix('-')}", hint="package each in its own bundle"
        )
    for other in (member.artifact for member in members[1:]):
        if (_seen(first.inputs), _seen(first.outputs)) != (
            _seen(other.inputs),
            _seen(other.outputs),
        ):
            raise UsageError(
                f"{other.path} cannot stand in for {first.path}: it has other inputs or outputs",
                hint="package each in its own bundle",
            )


def _seen(specs: tuple[TensorSpec, ...]) -> set[tuple[str, str, int]]:
    """What a caller sees of tensors; a fixed size may stand in for a dynamic one."""
    return {(spec.name, spec.dtype, len(spec.shape)) for spec in specs}


def _check_format(artifact: Artifact) -> None:
    if artifact.format == "torch":
        raise UsageError(
            f"{artifact.path} is a torch artifact, which no server loads",
            hint="export it first: deploykit export",
        )
    if artifact.format == "onnx" and artifact.precision == "fp8":
        raise UsageError(
            f"{artifact.path} is FP8 in ONNX, which ONNX Runtime answers wrongly and slowly",
            hint="build an engine of it: deploykit build",
        )
    if artifact.format == "engine" and not artifact.history:
        raise UsageError(
            f"{artifact.path} is native code without a history",
            hint="build it with `deploykit build`, which records how it was made",
        )


def _preprocessing(artifacts: tuple[Artifact, ...], data: Dataset) -> Preprocessing | None:
    """What the models say, else what the golden data says. Raises InputError: they disagree."""
    said = [artifact.preprocessing for artifact in artifacts] + [data.preprocessing]
    known = [spec for spec in said if spec]
    for spec in known:
        if spec != known[0]:
            raise InputError(
                f"the models and {data.reference} are preprocessed differently: "
                f"{known[0].model_dump()} and {spec.model_dump()}",
                hint="give golden data that is prepared as the model was calibrated",
            )
    return known[0] if known else None


def _engines(
    folder: Path,
    members: tuple[Member, ...],
    options: PackageOptions,
    feed: Feed,
    machine: Environment,
) -> tuple[Engine, ...]:
    """Lay the models out in the bundle, and add each with its record and golden outputs."""
    laid = LAYOUTS[options.layout](members, options, feed)
    for path, content in laid.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    places = zip(members, laid.models, laid.configs, strict=True)
    return tuple(
        _add(folder, member, model, feed, machine).model_copy(update={"config": config})
        for member, model, config in places
    )


def _add(folder: Path, member: Member, path: str, feed: Feed, machine: Environment) -> Engine:
    """Write a model, its record and its golden outputs into the bundle."""
    source, backend = member.artifact, member.backend
    model = _copy(source, folder / path)
    native = source.format == "engine"
    record = f"model{member.label}.{source.format}.record.json"
    (folder / record).write_text(store.record_text(source), encoding="utf-8")
    outputs = f"{golden.OUTPUTS}{member.label}.npz"
    reason = golden.no_runner(source.format)
    return Engine(
        path=path,
        record=record,
        timing_cache=_add_timing_cache(folder, member),
        format="engine" if native else "onnx",
        native_code=native,
        precision=source.precision,
        backend=backend,
        inputs=source.inputs,
        outputs=source.outputs,
        requires=requirements(source, backend, machine),
        built_on=None if reason else machine,
        golden=None if reason else golden.record(model, backend, feed, folder / outputs),
        no_golden=reason,
    )


def _add_timing_cache(folder: Path, member: Member) -> str | None:
    """Keep what TensorRT measured when it built: a build of the same again is quick."""
    history = member.artifact.history
    told = history[-1].options.get("timing_cache") if history else None
    if member.artifact.format != "engine" or not told or not Path(str(told)).is_file():
        return None
    name = f"timing{member.label}.cache"
    shutil.copyfile(str(told), folder / name)
    return name


def _write_bom(
    folder: Path,
    options: PackageOptions,
    created: str,
    members: tuple[Member, ...],
    engines: tuple[Engine, ...],
) -> None:
    models = [(member.artifact, engine) for member, engine in zip(members, engines, strict=True)]
    files = _entries(folder, members, engines)
    text = bom.render(options.name, options.version, created, models, files)
    (folder / bom.FILE).write_text(text, encoding="utf-8")


def _copy(source: Artifact, path: Path) -> Artifact:
    """Copy the model, and beside it the files of its weights under the names that it has for them.

    Raises IntegrityError: it is not the model that was opened. InputError: one of the files would
    be in the way of the bundle's own, or of another model's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source.path, path)
    for name in source.weights:
        _copy_weights(source.path.parent / name, path.parent / name)
    if store.digest(path, source.weights) != source.sha256:
        raise IntegrityError(
            f"{source.path} changed since it was opened (sha256 differs)",
            hint="package it again when nothing writes to it",
        )
    return source.model_copy(update={"path": path})


def _copy_weights(source: Path, path: Path) -> None:
    if path.suffix in OWN_SUFFIXES or _files.unsafe(path.name):
        raise InputError(
            f"{source}: these weights have a name that the bundle's own files may have",
            hint="give them one of another ending, such as .data: onnx.save_model(..., "
            "save_as_external_data=True, location=NAME)",
        )
    if path.exists() and _files.sha256(path) != _files.sha256(source):
        raise InputError(
            f"two models have other weights in files of one name, {path.name!r}",
            hint="package each in its own bundle, or rename one",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)


def _golden_inputs(data: Dataset, feed: Feed) -> GoldenInputs:
    return GoldenInputs(
        path=golden.INPUTS,
        samples=len(next(iter(feed.values()))),
        data=Path(data.reference).name,
        data_digest=data.digest,
    )


def _entries(
    folder: Path, members: Sequence[Member], engines: tuple[Engine, ...]
) -> tuple[FileEntry, ...]:
    """The files written so far, with their roles."""
    roles: dict[str, Role] = {golden.INPUTS: "golden", EVIDENCE: "evidence", bom.FILE: "bom"}
    for member, engine in zip(members, engines, strict=True):
        folder_of = Path(engine.path).parent
        roles |= {(folder_of / name).as_posix(): "model" for name in member.artifact.weights}
        roles |= {engine.path: "model", engine.record: "record"}
        if engine.golden:
            roles[engine.golden.path] = "golden"
        if engine.timing_cache:
            roles[engine.timing_cache] = "cache"
    return tuple(
        FileEntry(
            path=name,
            size=_files.size_bytes(folder / name),
            sha256=_files.sha256(folder / name),
            role=roles.get(name, "config"),
        )
        for name in _files.tree(folder)
    )
