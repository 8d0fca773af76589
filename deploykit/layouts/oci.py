"""OCI: a bundle as an OCI image layout with the media types of CNCF ModelPack, plain files.

`oci-layout`, `index.json`, `blobs/sha256/DIGEST`: one layer a file, named by its annotation. Any
OCI tool pushes it (`oras cp --from-oci-layout`, `skopeo copy oci:DIR ...`). What is read from one
is checked blob by blob and lies in a private folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploykit import _files
from deploykit.errors import IntegrityError
from deploykit.values import Json, Value

VERSION = {"imageLayoutVersion": "1.0.0"}
MARK, INDEX, BLOBS = "oci-layout", "index.json", "blobs"
IMAGE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
LAYER = "application/vnd.cncf.model.{}.v1.raw"
KINDS = {"model": "weight", "config": "weight.config", "golden": "dataset"}
"""Role of a file to ModelPack's kind of layer; all others are documents."""
FILEPATH = "org.cncf.model.filepath"
LARGEST_JSON, MOST_LAYERS = 16 << 20, 10_000
AGAIN = "get the layout again from where it was made"


class Described(Value):
    """What the layout says of the bundle in it."""

    name: str
    version: int
    created: str
    precision: str
    format: str
    roles: dict[str, str]
    """Path to role."""


def is_layout(folder: Path) -> bool:
    """Whether an OCI image layout lies there."""
    return (folder / MARK).is_file() and not (folder / MARK).is_symlink()


def write(bundle: Path, out: Path, described: Described) -> None:
    """Write the files of a bundle as an image layout into the empty folder `out`, index last."""
    (out / BLOBS / "sha256").mkdir(parents=True)
    (out / MARK).write_text(json.dumps(VERSION), encoding="utf-8")
    layers = [_layer(bundle, name, out, described) for name in _files.tree(bundle)]
    config = {
        "descriptor": {
            "createdAt": described.created,
            "name": described.name,
            "version": str(described.version),
        },
        "config": {"format": described.format, "precision": described.precision},
        "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": IMAGE,
        "artifactType": ARTIFACT,
        "config": _text(out, config, CONFIG),
        "layers": layers,
    }
    name = {"org.opencontainers.image.ref.name": str(described.version)}
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [
            {**_text(out, manifest, IMAGE), "artifactType": ARTIFACT, "annotations": name}
        ],
    }
    (out / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


@contextmanager
def opened(path: Path) -> Iterator[Path]:
    """The folder of a bundle: `path`, or a private folder with what the image layout there holds.

    Raises IntegrityError: the layout is not as its descriptors say.
    """
    if not is_layout(path):
        yield path
        return
    with _files.scratch() as folder:
        unpack(path, folder / "bundle")
        yield folder / "bundle"


def unpack(layout: Path, out: Path) -> None:
    """Check an image layout and write its files into the new folder `out`.

    Raises IntegrityError: everything that is wrong with its names; the first wrong blob.
    """
    index = _json(layout, layout / INDEX)
    manifests = index.get("manifests")
    if not isinstance(manifests, list) or len(manifests) != 1:
        raise _broken(layout, f"{INDEX} does not name one manifest")
    top = _descriptor(layout, manifests[0])
    manifest = _json(layout, _blob(layout, top[0]), top)
    layers = manifest.get("layers")
    if not isinstance(layers, list) or not 0 < len(layers) <= MOST_LAYERS:
        raise _broken(layout, "its manifest names no layers, or too many")
    config = _descriptor(layout, manifest.get("config"))
    _json(layout, _blob(layout, config[0]), config)
    named = [(_path(layout, layer), _descriptor(layout, layer)) for layer in layers]
    _check_names(
        layout, [name for name, _ in named], {top[0], config[0]} | {d for _, (d, _) in named}
    )
    out.mkdir(mode=0o755)
    for name, (digest, size) in named:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(layout, _blob(layout, digest), out / name, (digest, size))


def _layer(bundle: Path, name: str, out: Path, described: Described) -> Json:
    """Put a file of the bundle among the blobs, and describe it."""
    digest, size = _files.sha256(bundle / name), _files.size_bytes(bundle / name)
    shutil.copyfile(bundle / name, out / BLOBS / "sha256" / digest)
    kind = KINDS.get(described.roles.get(name, ""), "doc")
    return {
        "mediaType": LAYER.format(kind),
        "digest": f"sha256:{digest}",
        "size": size,
        "annotations": {FILEPATH: name},
    }


def _text(out: Path, content: Json, media_type: str) -> Json:
    data = json.dumps(content, indent=1).encode()
    digest = hashlib.sha256(data).hexdigest()
    (out / BLOBS / "sha256" / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def _check_names(layout: Path, names: list[str], digests: set[str]) -> None:
    """No two layers at one path, no path below another's file, no blob that nothing names."""
    folded = [name.casefold() for name in names]
    problems = [f"two layers are {name!r}" for name in names if folded.count(name.casefold()) > 1]
    problems += [
        f"{name!r} is a file and a folder"
        for name in names
        if any(other.startswith(f"{name.casefold()}/") for other in folded)
    ]
    lying = {path.name for path in (layout / BLOBS / "sha256").iterdir()}
    problems += [f"nothing names the blob {name!r}" for name in sorted(lying - digests)]
    allowed = {MARK, INDEX, BLOBS}
    problems += [
        f"{path.name!r} is no part of an image layout"
        for path in sorted(layout.iterdir())
        if path.name not in allowed
    ]
    problems += [
        f"{p.name!r} is no part of it" for p in (layout / BLOBS).iterdir() if p.name != "sha256"
    ]
    if problems:
        raise _broken(layout, "; ".join(problems[:6]))


def _path(layout: Path, layer: Any) -> str:
    annotations = layer.get("annotations") if isinstance(layer, dict) else None
    name = annotations.get(FILEPATH) if isinstance(annotations, dict) else None
    if not isinstance(name, str) or _files.unsafe(name):
        raise _broken(layout, f"a layer's path is {name!r}")
    return name


def _descriptor(layout: Path, told: Any) -> tuple[str, int]:
    """Digest (hexadecimal) and size in bytes."""
    digest = told.get("digest") if isinstance(told, dict) else None
    size = told.get("size") if isinstance(told, dict) else None
    if (
        not isinstance(digest, str)
        or not re.fullmatch("sha256:[0-9a-f]{64}", digest)
        or type(size) is not int
        or size < 0
    ):
        raise _broken(layout, f"no descriptor: {json.dumps(told)[:200]}")
    return digest.removeprefix("sha256:"), size


def _blob(layout: Path, digest: str) -> Path:
    return layout / BLOBS / "sha256" / digest


def _json(layout: Path, path: Path, want: tuple[str, int] | None = None) -> Json:
    """A JSON object of the layout, checked against its descriptor."""
    try:
        with os.fdopen(_files.open_regular(path), "rb") as file:
            data = file.read(LARGEST_JSON + 1)
    except OSError as error:
        raise _broken(layout, f"{path.name} cannot be read: {error.strerror}") from error
    if len(data) > LARGEST_JSON or (want and (hashlib.sha256(data).hexdigest(), len(data)) != want):
        raise _broken(layout, f"{path.name} is not what its descriptor says")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _broken(layout, f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise _broken(layout, f"{path.name} is no JSON object")
    return content


def _copy(layout: Path, source: Path, out: Path, want: tuple[str, int]) -> None:
    """Copy a blob, never more than its size, and check what was copied."""
    digest, left = hashlib.sha256(), want[1]
    try:
        descriptor = _files.open_regular(source)
    except FileNotFoundError as error:
        raise _broken(layout, f"blob {want[0]} is missing") from error
    except OSError as error:
        raise _broken(layout, f"blob {want[0]} is no regular file") from error
    with os.fdopen(descriptor, "rb") as blob, out.open("xb") as file:
        while block := blob.read(min(left + 1, 1 << 20)):
            left -= len(block)
            if left < 0:
                break
            digest.update(block)
            file.write(block)
    if left or digest.hexdigest() != want[0]:
        raise _broken(layout, f"blob {want[0]} is not what its descriptor says")


def _broken(layout: Path, fact: str) -> IntegrityError:
    return IntegrityError(f"{layout}: {fact}", hint=AGAIN)
