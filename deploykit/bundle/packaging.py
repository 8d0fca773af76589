"""Package models: a folder that carries what it takes to verify and serve them elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from deploykit import _files, environment, store
from deploykit.bundle import golden, inventory, manifest
from deploykit.bundle.manifest import Bundle, Engine, FileEntry, GoldenInputs, Role
from deploykit.bundle.requirements import requirements
from deploykit.dataset import Dataset
from deploykit.environment import Environment
from deploykit.errors import InputError, IntegrityError, UsageError
from deploykit.layouts import LAYOUTS, Placed, Serving
from deploykit.values import Artifact, Feed, Json, Preprocessing, Value

EVIDENCE = "evidence.json"


class PackagedModel(NamedTuple):
    """A model and the backend that it will run on; a pair of the two is as good."""

    artifact: Artifact
    backend: str


class PackageOptions(Serving):
    """How to package."""

    layout: Literal["plain", "triton"] = Field(
        default="plain", description="plain files, or a Triton model repository"
    )
    golden_samples: int = Field(
        default=8, ge=1, description="samples of the data that the bundle carries to verify itself"
    )


class Part(Value):
    """A model with its place in the bundle."""

    artifact: Artifact
    backend: str
    label: str
    """Tells the names of its files apart from those of others; empty for a single model."""
    placed: Placed


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

    The first model is the one to serve, the others stand in for it, in this order. Each is run,
    from its place in the bundle, on the first samples of `data`; these and its answers go into the
    bundle. `evidence` is written as it is.

    Raises UsageError: a model that cannot be packaged so, or `out` is in the way. InputError: the
    data or a model is bad. IntegrityError: a model changed since it was opened. StageError: two
    runs of a model differ. MissingError: its backend cannot run here.
    """
    _check_out(out, force=force)
    parts = _parts(models, options)
    artifacts = tuple(artifact for artifact, _ in models)
    preprocessing = _preprocessing(artifacts, data)
    machine = environment.read()
    with _files.staged(out) as folder:
        folder.mkdir()
        feed = golden.take(data, artifacts, options.golden_samples)
        golden.write_arrays(folder / golden.INPUTS, feed)
        engines = tuple(_add(folder, part, feed, machine) for part in parts)
        if evidence is not None:
            text = store.json_text(evidence)
            (folder / EVIDENCE).write_text(text, encoding="utf-8")
        bundle = Bundle(
            name=options.name,
            version=options.version,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            layout=options.layout,
            files=_entries(folder, engines),
            engines=engines,
            golden=_golden_inputs(data, feed),
            preprocessing=preprocessing,
            evidence=None if evidence is None else EVIDENCE,
        )
        (folder / manifest.MANIFEST).write_text(manifest.to_json(bundle), encoding="utf-8")
        inventory.check(folder, manifest.read(folder))
    return bundle


def _check_out(out: Path, *, force: bool) -> None:
    """Refuse to write over anything but a bundle. Raises UsageError."""
    _files.check_free(out, force=force)
    if out.exists() and not (out / manifest.MANIFEST).is_file() and not _is_empty(out):
        raise UsageError(
            f"{out} is no bundle ({manifest.MANIFEST} is missing), it is not replaced",
            hint="give another output path, or remove it yourself",
        )


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _parts(models: Sequence[tuple[Artifact, str]], options: PackageOptions) -> tuple[Part, ...]:
    """Where each model goes. Raises UsageError: none, one that cannot be packaged, or two alike."""
    if not models:
        raise UsageError("there is no model to package", hint="give at least one")
    place, parts = LAYOUTS[options.layout], []
    for artifact, backend in models:
        _check_format(artifact)
        label = f"-{artifact.precision}-{backend}" if len(models) > 1 else ""
        placed = place(artifact, backend=backend, label=label, serving=options)
        parts.append(Part(artifact=artifact, backend=backend, label=label, placed=placed))
    labels = [part.label for part in parts]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UsageError(
            f"two models are {twice[0].removeprefix('-')}", hint="package each in its own bundle"
        )
    return tuple(parts)


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


def _add(folder: Path, part: Part, feed: Feed, machine: Environment) -> Engine:
    """Write a model, its record, its texts and its golden outputs into the bundle."""
    source, backend, placed = part.artifact, part.backend, part.placed
    requires = requirements(source, backend, machine)
    for path, text in placed.texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    model = _copy(source, folder / placed.model)
    record = f"model{part.label}{model.path.suffix}.record.json"
    (folder / record).write_text(store.record_text(source), encoding="utf-8")
    outputs = f"{golden.OUTPUTS}{part.label}.npz"
    reason = golden.no_runner(source.format)
    native = source.format == "engine"
    return Engine(
        path=placed.model,
        record=record,
        format="engine" if native else "onnx",
        native_code=native,
        precision=source.precision,
        backend=backend,
        inputs=source.inputs,
        outputs=source.outputs,
        requires=requires,
        built_on=None if reason else machine,
        golden=None if reason else golden.record(model, backend, feed, folder / outputs),
        no_golden=reason,
    )


def _copy(source: Artifact, path: Path) -> Artifact:
    """Copy the model. Raises IntegrityError: it is not the file that was opened."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source.path, path)
    if _files.sha256(path) != source.sha256:
        raise IntegrityError(
            f"{source.path} changed since it was opened (sha256 differs)",
            hint="package it again when nothing writes to it",
        )
    return source.model_copy(update={"path": path})


def _golden_inputs(data: Dataset, feed: Feed) -> GoldenInputs:
    return GoldenInputs(
        path=golden.INPUTS,
        samples=len(next(iter(feed.values()))),
        data=Path(data.reference).name,
        data_digest=data.digest,
    )


def _entries(folder: Path, engines: tuple[Engine, ...]) -> tuple[FileEntry, ...]:
    """The files written so far, with their roles."""
    roles: dict[str, Role] = {golden.INPUTS: "golden", EVIDENCE: "evidence"}
    for engine in engines:
        roles |= {engine.path: "model", engine.record: "record"}
        if engine.golden:
            roles[engine.golden.path] = "golden"
    return tuple(
        FileEntry(
            path=name,
            size=_files.size_bytes(folder / name),
            sha256=_files.sha256(folder / name),
            role=roles.get(name, "config"),
        )
        for name in _files.tree(folder)
    )
