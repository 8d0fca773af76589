"""What an engine requires of a machine, and how a machine falls short of it."""

from __future__ import annotations

import re
from itertools import zip_longest

from deploykit.bundle.manifest import Requirements
from deploykit.environment import INT8_DOT_PRODUCT, Environment
from deploykit.errors import InputError, UsageError, did_you_mean
from deploykit.formats import onnx_file, onnx_portable
from deploykit.values import Artifact, Value


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
    return [*found, *_gpu_mismatches(requires, machine)]


def _gpu_mismatches(requires: Requirements, machine: Environment) -> list[str]:
    """The GPU and its driver; each GPU of the machine must do, the server may take any."""
    found = []
    have = [gpu.compute_capability for gpu in machine.gpus]
    if requires.gpus and (not have or not all(_runs_on(sm, requires.gpus) for sm in have)):
        none = "no GPU"
        need = " or ".join(requires.gpus)
        found.append(f"GPU {need} required, {', '.join(have) or none} found")
    if requires.driver and _release(machine.driver or "0") < _release(requires.driver):
        found.append(f"driver at least {requires.driver} required, {machine.driver} found")
    return found


def _runs_on(gpu: str, built_for: tuple[str, ...]) -> bool:
    number = int(gpu.removeprefix("sm"))
    return any(
        number >= int(wanted[2:-1]) if wanted.endswith("+") else gpu == wanted
        for wanted in built_for
    )


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
        gpus=_gpus(artifact, machine),
        driver=machine.driver,
    )


def _gpus(artifact: Artifact, machine: Environment) -> tuple[str, ...]:
    """The compute capabilities that the engine was built for, as a manifest writes them.

    TensorRT builds for the GPU of its own machine: that is this one's, if it has one. Raises
    InputError: it has none, and the record does not say.
    """
    told = tuple(map(str, artifact.facts.get("compute_capabilities", ())))
    portable = [m for text in told if (m := re.search(r"portable, (sm\d+) and newer", text))]
    if portable:
        return tuple(f"{match[1]}+" for match in portable)
    if told and all(re.fullmatch(r"sm\d+", text) for text in told):
        return told
    here = tuple(gpu.compute_capability for gpu in machine.gpus)
    if not here:
        raise InputError(
            f"{artifact.path}: its record does not say for which GPU it was built, and this "
            "machine has none",
            hint="package it on the machine that built it",
        )
    return tuple(dict.fromkeys(here))


def _portable(artifact: Artifact, runtime: Runtime, machine: Environment) -> Requirements:
    model = onnx_file.shell(artifact.path)
    onnx_portable.check(model, artifact.path)
    opset = onnx_file.opset(model)
    version = runtime.version
    if opset > KNOWN_OPSET or model.ir_version > KNOWN_IR:
        version = next(
            (v for name in runtime.distributions if (v := machine.libraries.get(name))), version
        )
    measured_with_dot_product = set(INT8_DOT_PRODUCT) & set(machine.cpu_features)
    return Requirements(
        cpu_features_any=INT8_DOT_PRODUCT
        if measured_with_dot_product and onnx_portable.sums_overflow(model, artifact.path.parent)
        else (),
        runtimes=runtime.distributions,
        version=version,
        match="at least",
        opset=opset,
    )
