"""Triton: the bundle is a model repository, `NAME/config.pbtxt` and `NAME/VERSION/model.onnx`.

The configuration is complete (serve with `--disable-auto-complete-config`), written through
Triton's own schema, and checked by its rules (`triton_rules`) before it is written.
"""

from __future__ import annotations

from typing import Any

from deploykit._lazy import needs
from deploykit.errors import InputError, StageError, UsageError
from deploykit.layouts import triton_rules
from deploykit.layouts.interface import Placed, Serving, batched
from deploykit.layouts.triton_rules import Runtime, Served
from deploykit.values import Artifact, Json, TensorSpec

CONFIG = "config.pbtxt"
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


def place(artifact: Artifact, *, backend: str, label: str, serving: Serving) -> Placed:
    """Place a model with its configuration.

    Raises UsageError: Triton has no such backend. MissingError: tritonclient, which holds Triton's
    schema, is not installed.
    """
    if backend not in RUNTIMES:
        raise UsageError(
            f"the triton layout does not serve {backend}",
            hint=f"it serves {', '.join(RUNTIMES)}; or take --layout plain",
        )
    name = f"{serving.name}{label}"
    served = Served(
        name=name,
        versions=(serving.version,),
        runtime=RUNTIMES[backend],
        inputs=tuple(_tensor(spec) for spec in artifact.inputs),
        outputs=tuple(_tensor(spec) for spec in artifact.outputs),
        batched=batched(artifact.inputs, artifact.outputs),
    )
    text = render(served, serving, max_batch_size=_max_batch_size(artifact, serving))
    model = f"{name}/{serving.version}/{served.runtime.file}"
    return Placed(model=model, texts={f"{name}/{CONFIG}": text})


def render(served: Served, serving: Serving, *, max_batch_size: int) -> str:
    """The text of `config.pbtxt`, read back through the schema and checked against the rules."""
    with needs("tritonclient"):
        from google.protobuf import text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig

    config = ModelConfig(**_config(served, serving, max_batch_size))
    text: str = text_format.MessageToString(config)
    if text_format.Parse(text, ModelConfig()) != config:
        raise StageError(f"{served.name}: {CONFIG} does not read back", hint="report this defect")
    check(text, served)
    return text


def check(text: str, served: Served) -> None:
    """Check a `config.pbtxt` by Triton's schema and rules. Raises InputError: all that is wrong."""
    with needs("tritonclient"):
        from google.protobuf import text_format
        from tritonclient.grpc.model_config_pb2 import ModelConfig

    try:
        config = text_format.Parse(text, ModelConfig())
    except text_format.ParseError as error:
        raise InputError(
            f"{served.name}/{CONFIG}: line {error}", hint="correct it by inference.ModelConfig"
        ) from error
    if problems := triton_rules.problems(config, served):
        raise InputError(
            f"{served.name}/{CONFIG}: {'; '.join(problems)}", hint="Triton would not load it so"
        )


def _config(served: Served, serving: Serving, max_batch_size: int) -> dict[str, Any]:
    batching: Json = {
        "dynamic_batching": {
            "max_queue_delay_microseconds": serving.queue_delay_us,
            "default_queue_policy": {"max_queue_size": serving.max_queue_size},
        }
    }
    return {
        "name": served.name,
        "platform": served.runtime.platform,
        "backend": served.runtime.backend,
        "default_model_filename": served.runtime.file,
        "version_policy": {"specific": {"versions": list(served.versions)}},
        "max_batch_size": max_batch_size,
        "input": [_described(spec, max_batch_size) for spec in served.inputs],
        "output": [_described(spec, max_batch_size) for spec in served.outputs],
        "instance_group": [{"kind": served.runtime.kind, "count": serving.instances}],
        **(batching if max_batch_size else {}),
        **({"parameters": _parameters(serving)} if served.runtime.kind == "KIND_CPU" else {}),
    }


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
