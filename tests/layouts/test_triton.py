"""Level 1 and 2 of three: Triton's schema and our rules.

Level 3, a real Triton, agreed with them on every case here that it can tell (version 2.51, with its
Python backend under the name `onnxruntime`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.errors import InputError, MissingError, UsageError
from deploykit.layouts import LAYOUTS, Laid, Member, Serving, batched, kserve, triton
from deploykit.layouts.triton_rules import Served
from deploykit.values import Artifact, Format, StageRecord, TensorSpec

ACCELERATED = """optimization { execution_accelerators {
  gpu_execution_accelerator { name: "tensorrt" } } }"""
Shape = tuple[int | str, ...]
IMAGES = TensorSpec(name="images", dtype="float32", shape=("batch", 3, "height", 224))
IDS = TensorSpec(name="ids", dtype="int64", shape=("batch",))
LOGITS = TensorSpec(name="logits", dtype="float32", shape=("batch", 10))


def artifact(
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    *,
    kind: Format = "onnx",
    facts: dict[str, Any] | None = None,
) -> Artifact:
    record = StageRecord(
        stage="s", options={}, facts=facts or {}, inputs={}, versions={}, seconds=1, key="k"
    )
    return Artifact(
        path=Path("m"),
        format=kind,
        precision="fp32",
        inputs=inputs,
        outputs=outputs,
        sha256="0" * 64,
        history=(record,),
    )


def feed(inputs: tuple[TensorSpec, ...]) -> dict[str, Any]:
    """Two samples of each input."""
    size = {"batch": 2}
    return {
        spec.name: np.zeros(
            spec.fixed(size),
            np.uint16 if spec.dtype == "bfloat16" else spec.dtype,
        )
        for spec in inputs
    }


def lay(
    model: Artifact, *, backend: str = "ort-cpu", label: str = "", serving: Serving | None = None
) -> Laid:
    member = Member(artifact=model, backend=backend, label=label)
    return triton.lay([member], serving or Serving(), feed(model.inputs))


def config_text(laid: Laid) -> str:
    (path,) = laid.configs
    return laid.files[str(path)].decode()


def parsed(text: str) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse(text, ModelConfig())


def config(model: Artifact, serving: Serving | None = None, backend: str = "ort-cpu") -> Any:
    """The configuration of a model, parsed by Triton's schema."""
    laid = lay(model, backend=backend, serving=serving)
    assert laid.configs == ("model/config.pbtxt",)
    return parsed(config_text(laid))


def test_a_batched_model():
    serving = Serving(
        name="net", version=3, threads=2, instances=4, queue_delay_us=50, max_queue_size=9
    )
    laid = lay(artifact((IMAGES, IDS), (LOGITS,)), label="-int8", serving=serving)
    assert laid.models == ("net-int8/3/model.onnx",)
    assert laid.configs == ("net-int8/config.pbtxt",)
    assert sorted(laid.files)[1:] == ["net-int8/warmup/input_0", "net-int8/warmup/input_1"]
    assert len(laid.files["net-int8/warmup/input_0"]) == 3 * 1 * 224 * 4
    assert len(laid.files["net-int8/warmup/input_1"]) == 8
    assert parsed(config_text(laid)) == parsed(
        (Path(__file__).parent / "batched.pbtxt").read_text()
    )


def test_a_fixed_batch_is_listed_in_full():
    fixed = [spec.model_copy(update={"shape": (4, *spec.shape[1:])}) for spec in (IMAGES, LOGITS)]
    found = config(artifact((fixed[0],), (fixed[1],)))
    assert found.max_batch_size == 0
    assert list(found.input[0].dims) == [4, 3, -1, 224]
    assert list(found.output[0].dims) == [4, 10]
    assert found.dynamic_batching.default_queue_policy.max_queue_size == 256
    (warmup,) = found.model_warmup
    assert (warmup.batch_size, list(warmup.inputs["images"].dims)) == (1, [4, 3, 1, 224])


def test_batching_can_be_turned_off():
    found = config(artifact((IMAGES,), (LOGITS,)), Serving(max_batch_size=0))
    assert found.max_batch_size == 0
    assert list(found.input[0].dims) == [-1, 3, -1, 224]
    assert list(found.model_warmup[0].inputs["images"].dims) == [1, 3, 1, 224]


def test_one_value_a_sample_is_reshaped():
    found = config(artifact((IMAGES,), (IDS,)))
    assert (list(found.output[0].dims), list(found.output[0].reshape.shape)) == ([1], [])
    assert found.output[0].HasField("reshape")


class TestEngine:
    facts = {"profile": {"images": [[1, 3, 1, 224], [4, 3, 9, 224], [16, 3, 9, 224]]}}

    def test_it_is_a_plan_on_the_gpu(self):
        model = artifact((IMAGES,), (LOGITS,), kind="engine", facts=self.facts)
        assert lay(model, backend="tensorrt").models == ("model/1/model.plan",)
        found = config(model, backend="tensorrt")
        assert (found.platform, found.backend) == ("tensorrt_plan", "tensorrt")
        assert type(found.instance_group[0]).Kind.Name(found.instance_group[0].kind) == "KIND_GPU"
        assert not found.parameters

    def test_its_profile_bounds_the_batch(self):
        model = artifact((IMAGES,), (LOGITS,), kind="engine", facts=self.facts)
        assert config(model, backend="tensorrt").max_batch_size == 16
        smaller = Serving(max_batch_size=8)
        assert config(model, smaller, backend="tensorrt").max_batch_size == 8


def test_a_backend_that_triton_does_not_have_is_refused():
    with pytest.raises(UsageError, match="does not serve openvino"):
        lay(artifact((IMAGES,), (LOGITS,)), backend="openvino")


@pytest.mark.parametrize(
    "spec", [{"dtype": "float8_e4m3fn"}, {"shape": ("batch", 0)}, {"shape": ()}]
)
def test_a_tensor_that_triton_does_not_know_is_refused(spec: dict[str, Any]):
    odd = LOGITS.model_copy(update=spec)
    with pytest.raises(UsageError, match="cannot serve the tensor logits"):
        lay(artifact((IMAGES,), (odd,)))


def test_without_tritonclient_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tritonclient.grpc.model_config_pb2", None)
    with pytest.raises(MissingError) as caught:
        lay(artifact((IMAGES,), (LOGITS,)))
    assert "deploykit[triton]" in caught.value.hint


def test_every_type_is_in_the_schema():
    from tritonclient.grpc.model_config_pb2 import DataType

    assert set(triton.TYPES.values()) == set(DataType.keys()) - {"TYPE_INVALID"}


dims = st.one_of(st.integers(1, 7), st.sampled_from(["h", "w"]))
specs = st.builds(
    TensorSpec,
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8),
    dtype=st.sampled_from(sorted(triton.TYPES)),
    shape=st.lists(dims, min_size=1, max_size=3).map(tuple)
    | st.lists(dims, max_size=3).map(lambda d: ("batch", *d)),
)
tensors = st.lists(specs, min_size=1, max_size=3, unique_by=lambda spec: spec.name).map(tuple)


@settings(deadline=None)
@given(tensors, tensors, st.integers(0, 64))
def test_every_model_gets_a_configuration_that_passes_its_own_check(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], most: int
):
    found = config(artifact(inputs, outputs), Serving(max_batch_size=most))
    assert found.max_batch_size == (most if batched(inputs, outputs) else 0)
    skipped = 1 if found.max_batch_size else 0
    for spec, tensor in zip((*inputs, *outputs), (*found.input, *found.output), strict=True):
        listed = [] if tensor.HasField("reshape") else list(tensor.dims)
        want = [-1 if isinstance(d, str) else d for d in spec.shape[skipped:]]
        assert (tensor.name, listed) == (spec.name, want)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (("batch", 3), ("batch", 9), True),
        (("batch",), ("batch",), True),
        (("x_0", 3), ("y_0", 9), True),
        (("batch", 3), ("y_0", 9), True),
        (("batch", 3), ("found", 9), False),
        (("batch", 3), (4, 9), False),
        ((4, 3), (4, 9), False),
        (("batch", 3), (), False),
        (("y_0", 3), ("batch", 3), False),
    ],
)
def test_batched(first: Shape, second: Shape, same: bool):
    x = TensorSpec(name="x", dtype="float32", shape=first)
    y = TensorSpec(name="y", dtype="float32", shape=second)
    assert batched((x,), (y,)) == same


class TestCheck:
    """Each line is one that a real Triton refuses, or that would hurt under load."""

    served = Served(
        name="model",
        versions=(1,),
        runtime=triton.RUNTIMES["ort-cpu"],
        inputs=(IMAGES.model_copy(update={"dtype": "TYPE_FP32"}),),
        outputs=(LOGITS.model_copy(update={"dtype": "TYPE_FP32"}),),
        batched=True,
    )

    @pytest.fixture
    def text(self) -> str:
        return config_text(lay(artifact((IMAGES,), (LOGITS,))))

    @pytest.mark.parametrize(
        ("good", "bad", "told"),
        [
            ("max_batch_size: 32", "max_batch_size: 32\nmax_batchsize: 3", r"line 9:1 .*no field"),
            ("TYPE_FP32", "TYPE_FLOAT", "line .*TYPE_FLOAT"),
            ("max_batch_size: 32", 'max_batch_size: "32"', "line "),
            ("max_batch_size: 32", "max_batch_size: -3", "max_batch_size is -3, below 0"),
            ('name: "model"', 'name: "modle"', "name is 'modle', not 'model'"),
            ('backend: "onnxruntime"', 'backend: "python"', "backend is 'python'"),
            ("onnxruntime_onnx", "onnxruntime", "platform is 'onnxruntime'"),
            ('"model.onnx"', '"m.onnx"', "default_model_filename is 'm.onnx'"),
            ("versions: 1", "versions: 2", "names version 2"),
            ("specific {\n    versions: 1\n  }", "latest {}", "no specific version"),
            ("KIND_CPU", "KIND_GPU", "kind is KIND_GPU, not KIND_CPU"),
            ("count: 1", "count: -1", "count is -1, below 1"),
            ("dims: 3", "dims: -1\n  dims: 3", r"dims are \[-1, 3, -1, 224\]"),
            ("dims: 3", "dims: 0", r"dims \[0, -1, 224\] must be"),
            ("dims: 3", "dims: -7", r"dims \[-7, -1, 224\] must be"),
            ("dims: 10", "dims: 10\n  reshape { shape: 5 }", r"reshape is \[5\]"),
            ('name: "logits"', 'name: "logit"', "outputs are"),
            ("TYPE_FP32", "TYPE_INT32", "data_type is TYPE_INT32"),
            ("dynamic_batching {", "dynamic_batching {\n preferred_batch_size: 99", "99 is not in"),
            (
                "max_batch_size: 32",
                'max_batch_size: 32\nmodel_operations { op_library_filename: "evil.so" }',
                "model_operations is not part",
            ),
            ("inter_op_thread_count", "trt_extra_plugin_lib_paths", "parameter trt_extra"),
            ("max_queue_size: 256", "", "max_queue_size is not set"),
            ('"golden_32"\n  batch_size: 32', '"g"\n  batch_size: 33', "batch_size 33 is not in 1"),
            ('key: "images"', 'key: "image"', "model_warmup 'golden_1': inputs are"),
            (
                "      dims: 3\n      dims: 1\n",
                "      dims: 3\n      dims: 0\n",
                r"'images' has dims \[3, 0, 224\]",
            ),
            (
                "max_batch_size: 32",
                'max_batch_size: 32\ncc_model_filenames { key: "9.0" value: "a.plan" }',
                "cc_model_filenames are",
            ),
            ('string_value: "1"', 'string_value: "many"', "is 'many', not a number"),
            (
                "instance_group {\n  count: 1\n  kind: KIND_CPU\n}",
                "",
                "instance_group is missing",
            ),
            (
                "max_batch_size: 32",
                f"max_batch_size: 32\n{ACCELERATED}",
                "optimization is not part of a bundle",
            ),
        ],
    )
    def test_what_is_wrong_is_told(self, text: str, good: str, bad: str, told: str):
        assert good in text
        with pytest.raises(InputError, match=told):
            triton.check(text.replace(good, bad, 1), self.served)

    def test_a_missing_queue_limit_is_told(self, text: str):
        start = text.index("dynamic_batching {")
        end = text.index("\n}\n", start) + 3
        with pytest.raises(InputError, match="dynamic_batching is missing"):
            triton.check(text[:start] + text[end:], self.served)

    def test_a_fixed_batch_is_not_batched(self, text: str):
        fixed = self.served.model_copy(update={"batched": False})
        with pytest.raises(InputError, match="the model's batch is fixed"):
            triton.check(text, fixed)

    def test_a_version_below_1_is_told(self, text: str):
        zero = self.served.model_copy(update={"versions": (0, 1)})
        with pytest.raises(InputError, match="numbers from 1"):
            triton.check(text, zero)

    def test_all_problems_are_told_at_once(self, text: str):
        bad = text.replace("max_batch_size: 32", "max_batch_size: -3").replace(
            "count: 1", "count: 0"
        )
        with pytest.raises(InputError) as caught:
            triton.check(bad, self.served)
        assert "below 0" in str(caught.value)
        assert "below 1" in str(caught.value)


Place = Callable[..., Any]


@pytest.mark.parametrize("place", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("label", ["", "-int8-ort-cpu"])
def test_contract_of_every_layout(place: Place, label: str):
    member = Member(artifact=artifact((IMAGES,), (LOGITS,)), backend="ort-cpu", label=label)
    laid = place([member], Serving(storage_uri="pvc://models/net"), feed((IMAGES,)))
    for path in (*laid.models, *laid.files):
        assert not Path(path).is_absolute()
        assert ".." not in path
        assert label in path or path == kserve.FILE
    assert laid.models[0] not in laid.files
    assert Path(laid.models[0]).suffix == ".onnx"
    assert set(laid.configs) - {None} <= set(laid.files)


def test_engines_for_several_gpus_are_one_model():
    model = artifact((IMAGES,), (LOGITS,), kind="engine")
    members = [
        Member(artifact=model, backend="tensorrt", label="", gpus=("sm90",)),
        Member(artifact=model, backend="tensorrt", label="-fp32-tensorrt-sm89", gpus=("sm89",)),
        Member(artifact=artifact((IMAGES,), (LOGITS,)), backend="ort-cpu", label="-fp32-ort-cpu"),
    ]
    laid = triton.lay(members, Serving(name="net"), feed((IMAGES,)))
    assert laid.models == (
        "net/1/model_sm90.plan",
        "net/1/model_sm89.plan",
        "net-fp32-ort-cpu/1/model.onnx",
    )
    found = parsed(laid.files["net/config.pbtxt"].decode())
    assert dict(found.cc_model_filenames) == {"9.0": "model_sm90.plan", "8.9": "model_sm89.plan"}
    assert found.default_model_filename == "model_sm90.plan"
