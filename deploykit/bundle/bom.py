"""What went into a bundle, as a CycloneDX 1.6 ML-BOM."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path

from deploykit.bundle.manifest import Engine, FileEntry
from deploykit.environment import versions
from deploykit.values import Artifact, Json, StageRecord

FILE = "bom.cdx.json"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/schema/bom-1.6")


def render(
    name: str,
    version: int,
    created: str,
    models: Sequence[tuple[Artifact, Engine]],
    files: Sequence[FileEntry],
) -> str:
    """The JSON of the BOM; the same files give the same, but for the time.

    Each model is a component with a model card: tensors, stages with their options, digests of
    calibration and other data, library versions. Every other file is a component with its digest.
    """
    digests = {entry.path: entry.sha256 for entry in files}
    served = {engine.path for _, engine in models}
    libraries: dict[str, str] = {}
    for artifact, _ in models:
        for record in artifact.history:
            libraries |= record.versions
    serial = uuid.uuid5(_NAMESPACE, "\n".join(f"{p} {d}" for p, d in sorted(digests.items())))
    root = {"type": "machine-learning-model", "bom-ref": "bundle", "name": name,
            "version": str(version)}  # fmt: skip
    components = [
        *(_model(artifact, engine, digests[engine.path]) for artifact, engine in models),
        *(_file(entry) for entry in files if entry.path not in served),
        *(_library(library, number) for library, number in sorted(libraries.items())),
    ]
    bom = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        "metadata": {"timestamp": created, "tools": {"components": _tools()}, "component": root},
        "components": components,
        "dependencies": [
            {"ref": "bundle", "dependsOn": [engine.path for _, engine in models]},
            *({"ref": engine.path, "dependsOn": _needed(artifact)} for artifact, engine in models),
        ],
    }
    return json.dumps(bom, indent=1) + "\n"


def _model(artifact: Artifact, engine: Engine, digest: str) -> Json:
    properties = {
        "deploykit:precision": engine.precision,
        "deploykit:backend": engine.backend,
        "deploykit:native-code": str(engine.native_code).lower(),
    }
    for index, record in enumerate(artifact.history):
        properties |= _stage(index, record)
    return {
        "type": "machine-learning-model",
        "bom-ref": engine.path,
        "name": Path(engine.path).name,
        "hashes": [{"alg": "SHA-256", "content": digest}],
        "modelCard": {
            "modelParameters": {
                "inputs": [{"format": str(spec)} for spec in engine.inputs],
                "outputs": [{"format": str(spec)} for spec in engine.outputs],
            },
        },
        "properties": [{"name": k, "value": v} for k, v in properties.items()],
    }


def _stage(index: int, record: StageRecord) -> dict[str, str]:
    """The options of a stage and the digests of what went in: weights, calibration data, ..."""
    what = f"deploykit:stage:{index}:{record.stage}"
    inputs = {f"{what}:{role}:sha256": digest for role, digest in record.inputs.items()}
    return {what: json.dumps(record.options, sort_keys=True), **inputs}


def _file(entry: FileEntry) -> Json:
    return {
        "type": "data" if entry.role == "golden" else "file",
        "bom-ref": entry.path,
        "name": entry.path,
        "hashes": [{"alg": "SHA-256", "content": entry.sha256}],
    }


def _library(name: str, version: str) -> Json:
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version.replace('+', '%2B')}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _needed(artifact: Artifact) -> list[str]:
    return sorted(
        {str(_library(n, v)["bom-ref"]) for r in artifact.history for n, v in r.versions.items()}
    )


def _tools() -> list[Json]:
    return [
        {"type": "application", "name": name, "version": number}
        for name, number in versions(("deploykit",)).items()
    ]
