"""What Triton refuses beyond its schema, which lets `max_batch_size: -3` and `dims: [-7]` pass.

Each rule gives the sentences for what is wrong with a parsed `inference.ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Literal

from deploykit.values import TensorSpec, Value


class Runtime(Value):
    """A backend of Triton."""

    platform: str
    backend: str
    file: str
    kind: Literal["KIND_CPU", "KIND_GPU"]


class Served(Value):
    """The model that a configuration is for; the dtypes are Triton's (`TYPE_FP32`)."""

    name: str
    """Also the name of its folder."""
    versions: tuple[int, ...]
    """The version folders that there are."""
    runtime: Runtime
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool
    """Whether the first axis of every tensor is the dynamic batch."""
    plans: dict[str, str] = {}
    """Compute capability (`9.0`) to file name, where there is one plan for each GPU."""


FIELDS = frozenset({
    "name", "platform", "backend", "default_model_filename", "version_policy", "max_batch_size",
    "input", "output", "instance_group", "dynamic_batching", "model_warmup", "cc_model_filenames",
    "parameters",
})  # fmt: skip
"""What a configuration of a bundle has; others load libraries, ensembles, agents, caches."""
PARAMETERS = ("intra_op_thread_count", "inter_op_thread_count")


def problems(config: Any, served: Served) -> list[str]:
    """Everything that is wrong, in the order of the rules; empty for a sound configuration."""
    rules = (
        _identity, _versions, _batch_size, _tensors, _batching, _instances, _parameters, _warmups,
    )  # fmt: skip
    return list(chain.from_iterable(rule(config, served) for rule in rules))


def dims(spec: TensorSpec, *, batched: bool) -> list[int]:
    """The sizes that a configuration lists: -1 for a dynamic one, the batch left out if batched."""
    shape = spec.shape[1:] if batched else spec.shape
    return [-1 if isinstance(size, str) else size for size in shape]


def _identity(config: Any, served: Served) -> Iterator[str]:
    runtime = served.runtime
    for field, _ in config.ListFields():
        if field.name not in FIELDS:
            yield f"{field.name} is not part of a bundle"
    for key, want in (
        ("name", served.name),
        ("platform", runtime.platform),
        ("backend", runtime.backend),
        ("default_model_filename", runtime.file),
    ):
        if (have := getattr(config, key)) != want:
            yield f"{key} is {have!r}, not {want!r}"
    if (plans := dict(config.cc_model_filenames)) != served.plans:
        yield f"cc_model_filenames are {plans}, not {served.plans}"


def _versions(config: Any, served: Served) -> Iterator[str]:
    listed = list(config.version_policy.specific.versions)
    if not listed:
        yield "version_policy names no specific version"
    for version in listed:
        if version not in served.versions:
            yield f"version_policy names version {version}, there is only {served.versions}"
    if not all(version >= 1 for version in served.versions):
        yield f"version folders are numbers from 1, not {served.versions}"


def _batch_size(config: Any, served: Served) -> Iterator[str]:
    if config.max_batch_size < 0:
        yield f"max_batch_size is {config.max_batch_size}, below 0"
    if config.max_batch_size > 0 and not served.batched:
        yield f"max_batch_size is {config.max_batch_size}, the model's batch is fixed"


def _tensors(config: Any, served: Served) -> Iterator[str]:
    batched = config.max_batch_size > 0
    for role, listed, wanted in (
        ("input", config.input, served.inputs),
        ("output", config.output, served.outputs),
    ):
        specs = {spec.name: spec for spec in wanted}
        names = [tensor.name for tensor in listed]
        if sorted(names) != sorted(specs):
            yield f"{role}s are {names}, the model has {list(specs)}"
        for tensor in listed:
            if tensor.name in specs:
                what = f"{role} {tensor.name!r}"
                yield from _tensor(what, tensor, specs[tensor.name], batched=batched)


def _tensor(what: str, tensor: Any, spec: TensorSpec, *, batched: bool) -> Iterator[str]:
    kind = tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type
    if (have := kind.values_by_number[tensor.data_type].name) != spec.dtype:
        yield f"{what}: data_type is {have}, the model has {spec.dtype}"
    listed, want = list(tensor.dims), dims(spec, batched=batched)
    if any(size == 0 or size < -1 for size in listed):
        yield f"{what}: dims {listed} must be -1 or above 0"
    lone = batched and not want and listed == [1] and tensor.HasField("reshape")
    if listed != want and not lone:
        yield f"{what}: dims are {listed}, the model has {want or '[1] reshaped to []'}"
    elif tensor.HasField("reshape") and list(tensor.reshape.shape) != want:
        yield f"{what}: reshape is {list(tensor.reshape.shape)}, the model has {want}"


def _batching(config: Any, served: Served) -> Iterator[str]:
    del served
    if not config.HasField("dynamic_batching"):
        yield "dynamic_batching is missing: without its queue limit an overload never ends"
        return
    batching = config.dynamic_batching
    for size in batching.preferred_batch_size:
        if not 0 < size <= config.max_batch_size:
            yield f"preferred_batch_size {size} is not in 1..{config.max_batch_size}"
    if batching.default_queue_policy.max_queue_size < 1:
        yield "max_queue_size is not set: an overload would never end"


def _warmups(config: Any, served: Served) -> Iterator[str]:
    specs = {spec.name: spec for spec in served.inputs}
    for warmup in config.model_warmup:
        what = f"model_warmup {warmup.name!r}"
        if not 1 <= warmup.batch_size <= max(config.max_batch_size, 1):
            yield f"{what}: batch_size {warmup.batch_size} is not in 1..{config.max_batch_size}"
        if set(warmup.inputs) != set(specs):
            yield f"{what}: inputs are {sorted(warmup.inputs)}, the model has {sorted(specs)}"
            continue
        for name, data in warmup.inputs.items():
            want = dims(specs[name], batched=config.max_batch_size > 0) or [1]
            fits = len(want) == len(data.dims) and all(
                w in (-1, h) and h > 0 for w, h in zip(want, data.dims, strict=True)
            )
            if not fits:
                yield f"{what}: {name!r} has dims {list(data.dims)}, the model has {want}"


def _instances(config: Any, served: Served) -> Iterator[str]:
    if not config.instance_group:
        yield "instance_group is missing"
    for group in config.instance_group:
        kind = type(group).Kind.Name(group.kind)
        if kind != served.runtime.kind:
            yield f"instance_group kind is {kind}, not {served.runtime.kind}"
        if group.count < 1:
            yield f"instance_group count is {group.count}, below 1"


def _parameters(config: Any, served: Served) -> Iterator[str]:
    del served
    for name in sorted(set(config.parameters) - set(PARAMETERS)):
        yield f"parameter {name} is not part of a bundle"
    for name in PARAMETERS:
        value = config.parameters[name].string_value if name in config.parameters else "1"
        if not value.isdecimal() or int(value) < 1:
            yield f"parameter {name} is {value!r}, not a number from 1"
