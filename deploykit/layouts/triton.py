"""Triton: the bundle is a model repository, `NAME/config.pbtxt` and `NAME/VERSION/model.onnx`.

The configuration is complete (serve with `--disable-auto-complete-config`), written through
Triton's own schema, and checked by its rules (`triton_rules`) before it is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deploykit._lazy import needs
from deploykit.errors import InputError, StageError, UsageError
from deploykit.layouts import triton_rules
from deploykit.layouts.interface import Laid, Member, Serving, batched
from deploykit.layouts.triton_rules import Runtime, Served
from deploykit.values import Array, Artifact, Feed, Json, TensorSpec

CONFIG = "config.pbtxt"
WARMUP = "warmup"
"""Folder beside the versions where Triton looks for the data of its warm-up."""
RUNTIMES = {
    "ort-cpu": Runtime(
        platform="onnxruntime_onnx", backend="onnxruntime", file="model.onnx", kind="KIND_CPU"
    ),
    "tensorrt": Runtime(
        platform="tensorrt_plan", backend="tensorrt", file="model.plan", kind="KIND_GPU"
    ),
}
TYPES = {
    "bool": "TYPE_BOOL", "object": "TYPE_STRING",
    "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32",
    "int64": "TYPE_INT64", "float16": "TYPE_FP16", "float32": "TYPE_FP32",
    "float64": "TYPE_FP64", "bfloat16": "TYPE_BF16",
}  # fmt: skip


def lay(members: Sequence[Member], serving: Serving, feed: Feed) -> Laid:
    """Place the models, each with its configuration and the data of its warm-up.

    Engines that differ only in the GPU that they were built for are one model of several plans.
    Raises UsageError: Triton has no such backend. MissingError: tritonclient, which holds Triton's
    schema, is not installed.
    """
    models: dict[str, str] = {}
    configs: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for group in _groups(members):
        first = group[0]
        if first.backend not in RUNTIMES:
            raise UsageError(
                f"the triton layout does not serve {first.backend}",
                hint=f"it serves {', '.join(RUNTIMES)}; or take --layout plain",
            )
        name = f"{serving.name}{first.label}"
        plans = _plans(group)
        served = served_as(first.artifact, first.backend, name, (serving.version,), plans)
        size = _max_batch_size(first.artifact, serving)
        warmup = _warmup(first.artifact, feed, size)
        text = render(served, serving, warmup, max_batch_size=size)
        files[f"{name}/{CONFIG}"] = text.encode()
        files |= {f"{name}/{WARMUP}/{key}": data.tobytes() for key, data in warmup.items()}
        for index, member in enumerate(group):
            file = list(plans.values())[index] if plans else served.runtime.file
            models[member.label] = f"{name}/{serving.version}/{file}"
            configs[member.label] = f"{name}/{CONFIG}"
    return Laid(
        models=tuple(models[m.label] for m in members),
        configs=tuple(configs[m.label] for m in members),
        files=files,
    )


def served_as(
    artifact: Artifact, backend: str, name: str, versions: tuple[int, ...], plans: dict[str, str]
) -> Served:
    """The model as a configuration describes it. Raises UsageError: a tensor Triton cannot take."""
    runtime = RUNTIMES[backend]
    if plans:
        runtime = runtime.model_copy(update={"file": next(iter(plans.values()))})
    return Served(
        name=name,
        versions=versions,
        runtime=runtime,
        inputs=tuple(_tensor(spec) for spec in artifact.inputs),
        outputs=tuple(_tensor(spec) for spec in artifact.outputs),
        batched=batched(artifact.inputs, artifact.outputs),
        plans=plans,
    )


def render(
    served: Served, serving: Serving, warmup: dict[str, Array], *, max_batch_size: int
) -> str:
    """The text of `config.pbtxt`, read back through the schema and checked against the rules."""
    with needs("tritonclient"):
        from google.protobuf import text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig

    config = ModelConfig(**_config(served, serving, warmup, max_batch_size))
    text: str = text_format.MessageToString(config)
    if text_format.Parse(text, ModelConfig()) != config:
        raise StageError(f"{served.name}: {CONFIG} does not read back", hint="report this defect")
    check(text, served)
    return text


def check(text: str, served: Served) -> None:
    """Check a `config.pbtxt` by Triton's schema and rules. Raises InputError: all that is wrong."""
    config = parse(text, served.name)
    if problems := triton_rules.problems(config, served):
        raise InputError(
            f"{served.name}/{CONFIG}: {'; '.join(problems)}", hint="Triton would not load it so"
        )


def parse(text: str, name: str) -> Any:
    """A `config.pbtxt` by Triton's schema. Raises InputError: the line that is wrong."""
    with needs("tritonclient"):
        from google.protobuf import text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        return text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        raise InputError(
            f"{name}/{CONFIG}: line {error}", hint="correct it by inference.ModelConfig"
        ) from error


def renamed(text: str, name: str, versions: tuple[int, ...], warmup: str) -> str:
    """The same configuration for a model of another name, serving these versions.

    `warmup` goes before the names of the files of its warm-up.
    """
    from google.protobuf import text_format

    config = parse(text, name)
    config.name = name
    config.version_policy.specific.versions[:] = versions
    for sample in config.model_warmup:
        for data in sample.inputs.values():
            data.input_data_file = f"{warmup}{data.input_data_file}"
    changed: str = text_format.MessageToString(config)
    return changed


def _groups(members: Sequence[Member]) -> list[list[Member]]:
    """The members, those together that are one model for different GPUs."""
    groups: dict[object, list[Member]] = {}
    for member in members:
        alone = member.backend != "tensorrt" or len(member.gpus) != 1
        kind = (member.backend, member.artifact.precision, member.artifact.inputs)
        groups.setdefault(member.label if alone else kind, []).append(member)
    return list(groups.values())


def _plans(group: list[Member]) -> dict[str, str]:
    """Compute capability to file name, where there are several plans."""
    if len(group) == 1:
        return {}
    gpus = [member.gpus[0] for member in group]
    return {f"{gpu[2:-1]}.{gpu[-1]}": f"model_{gpu}.plan" for gpu in gpus}


def _config(
    served: Served, serving: Serving, warmup: dict[str, Array], max_batch_size: int
) -> dict[str, Any]:
    runtime = served.runtime
    timeout = {"default_timeout_microseconds": serving.queue_timeout_us, "timeout_action": "REJECT"}
    return {
        "name": served.name,
        "platform": runtime.platform,
        "backend": runtime.backend,
        "default_model_filename": runtime.file,
        "version_policy": {"specific": {"versions": list(served.versions)}},
        "max_batch_size": max_batch_size,
        "input": [_described(spec, max_batch_size) for spec in served.inputs],
        "output": [_described(spec, max_batch_size) for spec in served.outputs],
        "instance_group": [{"kind": runtime.kind, "count": serving.instances}],
        # Without a batch it bounds the queue all the same.
        "dynamic_batching": {
            "max_queue_delay_microseconds": serving.queue_delay_us if max_batch_size else 0,
            "default_queue_policy": {
                "max_queue_size": serving.max_queue_size,
                **(timeout if serving.queue_timeout_us else {}),
            },
        },
        "model_warmup": _warmups(served, warmup, max_batch_size),
        "cc_model_filenames": served.plans,
        **({"parameters": _parameters(serving)} if runtime.kind == "KIND_CPU" else {}),
    }


def _warmups(served: Served, warmup: dict[str, Array], max_batch_size: int) -> list[Json]:
    """Warm up with one sample, and with a whole batch of it."""
    inputs = {
        spec.name: {
            "data_type": spec.dtype,
            "dims": list(array.shape) or [1],
            "input_data_file": file,
        }
        for spec, (file, array) in zip(served.inputs, warmup.items(), strict=bool(warmup))
    }
    sizes = sorted({1, max_batch_size or 1}) if warmup else []
    return [{"name": f"golden_{n}", "batch_size": n, "inputs": inputs} for n in sizes]


def _warmup(artifact: Artifact, feed: Feed, max_batch_size: int) -> dict[str, Array]:
    """File name to one golden sample of each input, in order; none where one is of text.

    Where the model makes the batch itself, the array is a whole batch.
    """
    found = {}
    for index, spec in enumerate(artifact.inputs):
        array = feed[spec.name]
        if array.dtype == object:
            return {}
        size = spec.shape[0] if isinstance(spec.shape[0], int) else 1
        found[f"input_{index}"] = np.ascontiguousarray(array[0] if max_batch_size else array[:size])
    return found


def _parameters(serving: Serving) -> Json:
    values = {"intra_op_thread_count": serving.threads, "inter_op_thread_count": 1}
    return {key: {"string_value": str(value)} for key, value in values.items()}


def _described(spec: TensorSpec, max_batch_size: int) -> Json:
    """Name, type and dims of a tensor; `dims` leave the batch out where Triton makes the batch."""
    dims = triton_rules.dims(spec, batched=max_batch_size > 0)
    described: Json = {"name": spec.name, "data_type": spec.dtype, "dims": dims or [1]}
    return described if dims else {**described, "reshape": {"shape": []}}


def _max_batch_size(artifact: Artifact, serving: Serving) -> int:
    """What was asked for, 0 for a fixed batch, and no more than an engine's profile allows."""
    if not batched(artifact.inputs, artifact.outputs):
        return 0
    profile = artifact.facts.get("profile") if artifact.format == "engine" else None
    largest = [int(shapes[-1][0]) for shapes in (profile or {}).values()]
    return min([serving.max_batch_size, *largest])


def _tensor(spec: TensorSpec) -> TensorSpec:
    """The same tensor with Triton's name of its dtype.

    Raises UsageError: it has none, or the tensor is a scalar or holds nothing.
    """
    if spec.dtype not in TYPES or 0 in spec.shape or not spec.shape:
        raise UsageError(
            f"Triton cannot serve the tensor {spec}", hint="--layout plain, or another model"
        )
    return spec.model_copy(update={"dtype": TYPES[spec.dtype]})
