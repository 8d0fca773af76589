"""What an engine requires of a machine, and how a machine falls short of it."""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np

from deploykit.bundle.manifest import Requirements
from deploykit.environment import INT8_DOT_PRODUCT, Environment
from deploykit.errors import InputError, UsageError, did_you_mean
from deploykit.formats import onnx_file
from deploykit.values import Artifact, Value

if TYPE_CHECKING:
    from pathlib import Path

    import onnx


class Runtime(Value):
    """The Python distributions of a backend, any one of which will do."""

    distributions: tuple[str, ...]
    version: str = ""
    """Oldest version that deploykit supports."""


RUNTIMES = {
    "ort-cpu": Runtime(distributions=("onnxruntime", "onnxruntime-gpu"), version="1.23"),
    "openvino": Runtime(distributions=("openvino",), version="2025.4"),
    "tensorrt": Runtime(distributions=("tensorrt",)),
    "tensorrt-rtx": Runtime(distributions=("tensorrt-rtx-cu13",)),
}
ENGINE_RUNTIMES = frozenset({"tensorrt", "tensorrt-rtx"})

KNOWN_OPSET, KNOWN_IR = 22, 10
"""Newest operator set and file format that the oldest supported runtimes take."""

NO_OVERFLOW = 64
"""Two products u8 * s8 fit in 16 bits, 2 * 255 * 64 <= 32767, for weights up to this magnitude."""


def requirements(artifact: Artifact, backend: str, machine: Environment) -> Requirements:
    """What the artifact needs on this backend, as measured on `machine`.

    A portable ONNX file needs a runtime that is new enough. It needs an 8-bit dot product only
    where its sums overflow without one and its answers were measured with one. Native code needs
    the system, architecture and runtime version that it was built with. Raises UsageError: the
    backend does not run such files. InputError: the file is not fit for a bundle.
    """
    if backend not in RUNTIMES:
        raise UsageError(f"no bundle is made for {backend}", hint=did_you_mean(backend, RUNTIMES))
    if (artifact.format == "engine") != (backend in ENGINE_RUNTIMES):
        raise UsageError(
            f"{backend} does not run {artifact.format} models ({artifact.path})",
            hint="an engine runs on tensorrt or tensorrt-rtx, an ONNX file on ort-cpu or openvino",
        )
    if artifact.format == "engine":
        return _native(artifact, backend, machine)
    return _portable(artifact, RUNTIMES[backend], machine)


def mismatches(requires: Requirements, machine: Environment) -> list[str]:
    """What is required and what was found instead; empty where the engine fits the machine."""
    found = []
    system = machine.system.split()[0]
    if requires.system not in (None, system):
        found.append(f"system {requires.system} required, {system} found")
    if requires.machine not in (None, machine.machine):
        found.append(f"architecture {requires.machine} required, {machine.machine} found")
    wanted = requires.cpu_features_any
    if wanted and not set(wanted) & set(machine.cpu_features):
        have = ", ".join(machine.cpu_features) or "none of note"
        found.append(f"CPU feature {' or '.join(wanted)} required, {have} found")
    installed = {n: v for n in requires.runtimes if (v := machine.libraries.get(n))}
    if not any(_satisfies(version, requires) for version in installed.values()):
        need = f"{' or '.join(requires.runtimes)} {requires.match} {requires.version}"
        have = ", ".join(f"{n} {v}" for n, v in installed.items()) or "none"
        found.append(f"{need} required, {have} found")
    return found


def _satisfies(version: str, requires: Requirements) -> bool:
    if requires.match == "exactly":
        return version == requires.version
    pairs = list(zip_longest(_release(version), _release(requires.version), fillvalue=0))
    return [a for a, _ in pairs] >= [b for _, b in pairs]


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: `2.13.0+cpu` is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _native(artifact: Artifact, backend: str, machine: Environment) -> Requirements:
    facts = artifact.facts
    flavour, version = facts.get("flavour"), facts.get("flavour_version")
    if not version:
        raise InputError(
            f"{artifact.path}: its record does not say which TensorRT version built it",
            hint="build the engine again with `deploykit build`",
        )
    if flavour != backend:
        raise UsageError(f"{artifact.path} was built for {flavour}", hint=f"not for {backend}")
    return Requirements(
        system=machine.system.split()[0],
        machine=machine.machine,
        runtimes=RUNTIMES[backend].distributions,
        version=version,
        match="exactly",
        gpus=tuple(facts.get("compute_capabilities", ())),
    )


def _portable(artifact: Artifact, runtime: Runtime, machine: Environment) -> Requirements:
    model = onnx_file.read(artifact.path)
    _check_portable(model, artifact.path)
    opset = onnx_file.opset(model)
    version = runtime.version
    if opset > KNOWN_OPSET or model.ir_version > KNOWN_IR:
        version = next(
            (v for name in runtime.distributions if (v := machine.libraries.get(name))), version
        )
    measured_with_dot_product = set(INT8_DOT_PRODUCT) & set(machine.cpu_features)
    return Requirements(
        cpu_features_any=INT8_DOT_PRODUCT
        if measured_with_dot_product and _overflows(model)
        else (),
        runtimes=runtime.distributions,
        version=version,
        match="at least",
        opset=opset,
    )


def _check_portable(model: onnx.ModelProto, path: Path) -> None:
    """Refuse what is not one portable file. Raises InputError."""
    import onnx

    shell = onnx.load(path, load_external_data=False)
    if any(onnx.external_data_helper.uses_external_data(t) for t in shell.graph.initializer):
        raise InputError(
            f"{path}: its weights lie in another file (ONNX external data)",
            hint="save it as one file: onnx.save(onnx.load(path), new_path)",
        )
    if any(node.op_type == "EPContext" for node in model.graph.node):
        raise InputError(
            f"{path}: an EPContext node holds native code in a file that looks portable",
            hint="package the model that it was compiled from",
        )
    if any(prop.key == "ort_config" for prop in model.metadata_props):
        raise InputError(
            f"{path}: its metadata sets session options ('ort_config')",
            hint="remove the entry; the bundle says how the model is run",
        )


def _overflows(model: onnx.ModelProto) -> bool:
    """Whether uint8 activations meet int8 weights whose products overflow 16-bit sums."""
    from onnx import numpy_helper

    tensors = {t.name: t for t in model.graph.initializer}
    scaled = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    zeros = [numpy_helper.to_array(tensors[n.input[2]]) for n in scaled if n.input[2:]]
    unsigned = len(zeros) < len(scaled) or any(zero.dtype == np.uint8 for zero in zeros)
    weights = (numpy_helper.to_array(t) for t in tensors.values() if len(t.dims) > 1)
    return unsigned and any(
        w.dtype == np.int8 and np.abs(w.astype(np.int16)).max(initial=0) > NO_OVERFLOW
        for w in weights
    )
