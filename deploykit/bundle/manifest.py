"""The manifest of a bundle, `manifest.json`: BUNDLE_FORMAT.md says what each key means."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from deploykit import _files, _json
from deploykit.environment import Environment
from deploykit.errors import InputError, IntegrityError
from deploykit.layouts import oci
from deploykit.values import Precision, Preprocessing, TensorSpec, Value, parse

MANIFEST = "manifest.json"
SCHEMA: Final = "deploykit.bundle/2"
SCHEMAS = ("deploykit.bundle/1", SCHEMA)
"""All that this version reads."""
SIGNATURE = "signature.json"
"""The one file beside the manifest that no manifest lists."""
LARGEST_MANIFEST = 64 << 20
GET_AGAIN = "get the bundle again from where it was made"

Tolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Role = Literal["model", "record", "config", "golden", "evidence", "bom", "cache"]
Code = Literal["MANIFEST", "FILES", "UNSIGNED", "SIGNATURE", "WRONG_KEY", "OLD_VERSION"]


class BundleError(IntegrityError):
    """A bundle is not what its manifest or signature says; `problems` lists all that was found.

    `code` tells the first of them to a program.
    """

    def __init__(self, path: Path, problems: Iterable[str], *, code: Code = "MANIFEST") -> None:
        self.problems, self.code = tuple(problems), code
        count, rest = len(self.problems), self.problems[1:6]
        more = [f"and {count - 6} more"] if count > 6 else []
        also = f"also: {'; '.join((*rest, *more))}; " if rest else ""
        super().__init__(
            f"{path}: {count} problem{'s' * (count > 1)}: {self.problems[0]}",
            hint=also + GET_AGAIN,
        )


class FileEntry(Value):
    """A file of the bundle; the path is relative to the bundle, with `/`."""

    path: str
    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    role: Role


class Requirements(Value):
    """What an engine needs to run at all and to give the answers that were measured."""

    system: str | None = None
    """`Linux`; None where any system will do."""
    machine: str | None = None
    """`x86_64`; None where any architecture will do."""
    cpu_features_any: tuple[str, ...] = ()
    """One of these, by their Linux names; empty for none."""
    runtimes: tuple[str, ...]
    """Names of the Python distributions, one of which must be installed."""
    version: str
    match: Literal["at least", "exactly"]
    opset: int | None = None
    """Version of the standard operator set that the file declares; None for native code."""
    gpus: tuple[str, ...] = ()
    """Compute capabilities that native code was built for: `sm90`; `sm80+` for newer ones too."""
    driver: str | None = None
    """Oldest NVIDIA driver; None where it is not known."""


class GoldenOutputs(Value):
    """The engine's own outputs for the golden inputs, and how far a later run may be from them.

    A value v agrees with its golden value g where |v - g| <= atol + rtol * |g|.
    """

    path: str
    batch_size: Annotated[int, Field(ge=1)]
    atol: dict[str, Tolerance]
    """By output, in its unit; whole numbers must be equal."""
    rtol: dict[str, Tolerance]
    """By output."""
    max_error: float
    """Largest |difference| between two runs when the bundle was made."""


class Engine(Value):
    """A model of the bundle, and what it requires of the machine."""

    path: str
    record: str
    """Path of the model's record: its history, stage by stage."""
    format: Literal["onnx", "engine"]
    native_code: bool
    """Whether loading it runs machine code from the file."""
    precision: Precision
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    requires: Requirements
    built_on: Environment | None
    """The machine that computed the golden outputs; None for native code that was not run."""
    golden: GoldenOutputs | None
    no_golden: str | None = None
    """Why there are no golden outputs; None where there are."""
    config: str | None = None
    """Path of the server's configuration of the model; None where the layout has none."""
    timing_cache: str | None = None
    """Path of the kernel times that TensorRT measured for native code; None where none was kept."""


class GoldenInputs(Value):
    """The samples that every engine was run on, as the model takes them."""

    path: str
    samples: int
    data: str
    """Last part of the reference of the data that they come from."""
    data_digest: str


class Bundle(Value):
    """The manifest."""

    schema_: Literal["deploykit.bundle/1", "deploykit.bundle/2"] = Field(
        default=SCHEMA, alias="schema"
    )
    name: str
    version: Annotated[int, Field(ge=1)]
    created: str
    """UTC, ISO 8601."""
    layout: str
    files: tuple[FileEntry, ...]
    """Every file but the manifest itself."""
    engines: tuple[Engine, ...]
    """The one to serve first."""
    golden: GoldenInputs
    preprocessing: Preprocessing | None
    evidence: str | None
    """Path of the scores and measurements; None where none were given."""
    bom: str | None = None
    """Path of the CycloneDX bill of materials; None in bundles of format 1."""


def described(bundle: Bundle) -> oci.Described:
    """What an image layout says of the bundle."""
    first = bundle.engines[0]
    return oci.Described(
        name=bundle.name,
        version=bundle.version,
        created=bundle.created,
        precision=first.precision,
        format="onnx" if first.format == "onnx" else first.backend,
        roles={entry.path: entry.role for entry in bundle.files},
    )


def to_json(bundle: Bundle) -> str:
    """The text of `manifest.json`; `from_json` gives an equal value back."""
    return json.dumps(json.loads(bundle.model_dump_json(by_alias=True)), indent=1) + "\n"


def from_json(text: str | bytes, where: Path) -> Bundle:
    """Parse a manifest. Raises BundleError: torn, of another schema, unknown keys, bad paths."""
    try:
        data = json.loads(text, object_pairs_hook=_json.unique_keys)
    except (ValueError, RecursionError) as error:
        raise BundleError(where, [f"{MANIFEST} is not JSON: {error}"]) from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema not in SCHEMAS:
        known = f"this version of deploykit reads {' and '.join(SCHEMAS)}"
        raise BundleError(where, [f"{MANIFEST} has the schema {schema!r}; {known}"])
    try:
        bundle = parse(Bundle, data, MANIFEST)
    except InputError as error:
        raise BundleError(where, [str(error)]) from error
    if problems := _problems(bundle):
        raise BundleError(where, problems)
    return bundle


def read(folder: Path) -> Bundle:
    """Read the manifest of a bundle. Raises InputError: no folder. BundleError: see `from_json`."""
    return from_json(read_text(folder), folder)


def read_text(folder: Path) -> bytes:
    """The bytes of the manifest. Raises InputError: no folder. BundleError: it cannot be read."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no bundle (no such folder)", hint="give a bundle's folder")
    path = folder / MANIFEST
    try:
        with os.fdopen(_files.open_regular(path), "rb") as file:
            text = file.read(LARGEST_MANIFEST + 1)
    except FileNotFoundError as error:
        raise BundleError(folder, [f"{MANIFEST} is missing"]) from error
    except OSError as error:
        raise BundleError(folder, [f"{MANIFEST} cannot be read: {error.strerror}"]) from error
    if len(text) > LARGEST_MANIFEST:
        raise BundleError(folder, [f"{MANIFEST} is larger than {LARGEST_MANIFEST} bytes"])
    return text


def path_problem(path: str) -> str | None:
    """Why a path of a manifest must not be used, or None."""
    if _files.unsafe(path):
        return f"path {path!r} is not relative and normalised"
    if path.casefold() in (MANIFEST, SIGNATURE):
        return f"{path!r} is listed, which no manifest lists"
    return None


def _problems(bundle: Bundle) -> list[str]:
    """Bad and repeated paths, and references to files that are not listed in their role."""
    found = [problem for entry in bundle.files if (problem := path_problem(entry.path))]
    counts = Counter(entry.path.casefold() for entry in bundle.files)
    found += [f"path {path!r} is listed {n} times" for path, n in counts.items() if n > 1]
    listed = {(entry.path, entry.role) for entry in bundle.files}
    wanted = _references(bundle)
    found += [f"{p!r} is not listed as {role}" for p, role in wanted if (p, role) not in listed]
    if not bundle.engines:
        found.append("there are no engines")
    found += [f"{engine.path}: {text}" for engine in bundle.engines for text in _claims(engine)]
    portable = any(engine.format == "onnx" for engine in bundle.engines)
    if bundle.schema_ == SCHEMA and bundle.engines and not portable:
        found.append("there is native code without a portable ONNX model beside it")
    return found


def _claims(engine: Engine) -> Iterator[str]:
    """What a manifest says of an engine and cannot be."""
    if (engine.golden is None) == (engine.no_golden is None):
        yield "golden outputs, or the reason why there are none"
    elif engine.golden is None and engine.format == "onnx":
        yield "an ONNX model has golden outputs, this one has none"
    if engine.native_code != (engine.format == "engine"):
        yield f"native_code is {engine.native_code} for the format {engine.format}"
    if (engine.format == "onnx") != engine.path.endswith(".onnx"):
        yield f"its name is not one of the format {engine.format}"


def _references(bundle: Bundle) -> list[tuple[str, Role]]:
    references: list[tuple[str, Role]] = [(bundle.golden.path, "golden")]
    if bundle.evidence is not None:
        references.append((bundle.evidence, "evidence"))
    if bundle.bom is not None:
        references.append((bundle.bom, "bom"))
    for engine in bundle.engines:
        references += [(engine.path, "model"), (engine.record, "record")]
        if engine.golden:
            references.append((engine.golden.path, "golden"))
        if engine.config:
            references.append((engine.config, "config"))
        if engine.timing_cache:
            references.append((engine.timing_cache, "cache"))
    return references
