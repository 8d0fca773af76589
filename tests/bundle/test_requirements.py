from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from deploykit import environment
from deploykit.bundle import Requirements
from deploykit.bundle.requirements import RUNTIMES, mismatches, requirements
from deploykit.errors import InputError, UsageError
from deploykit.formats import open_model
from deploykit.gpu import Gpu
from deploykit.values import Artifact
from tests.bundle.small_models import save, save_engine, save_int8, save_linear

HERE = environment.read()
VNNI = HERE.model_copy(update={"cpu_features": ("avx2", "avx512_vnni")})
HOPPER = Gpu(name="H100", compute_capability="sm90", memory_bytes=1)
AVX2 = HERE.model_copy(update={"cpu_features": ("avx2",)})


def test_a_portable_file_requires_a_runtime_only(linear: Artifact):
    assert requirements(linear, "ort-cpu", VNNI) == Requirements(
        runtimes=("onnxruntime", "onnxruntime-gpu"), version="1.23", match="at least", opset=17
    )


def test_a_new_opset_requires_the_runtime_that_ran_it(tmp_path: Path):
    model = save_linear(tmp_path / "m.onnx", opset=23)
    assert requirements(model, "ort-cpu", HERE).version == HERE.libraries["onnxruntime"]


class TestDotProduct:
    @pytest.fixture
    def wide(self, tmp_path: Path) -> Artifact:
        return save_int8(tmp_path / "wide.onnx", largest_weight=127)

    @pytest.fixture
    def narrow(self, tmp_path: Path) -> Artifact:
        return save_int8(tmp_path / "narrow.onnx", largest_weight=64)

    def test_it_is_required_where_sums_overflow_without(self, wide: Artifact):
        requires = requirements(wide, "ort-cpu", VNNI)
        assert "avx512_vnni" in requires.cpu_features_any
        assert mismatches(requires, VNNI) == []
        (row,) = mismatches(requires, AVX2)
        assert row.endswith("required, avx2 found")

    def test_not_where_weights_have_7_bits(self, narrow: Artifact):
        assert requirements(narrow, "ort-cpu", VNNI).cpu_features_any == ()

    def test_not_where_it_was_measured_without(self, wide: Artifact):
        assert requirements(wide, "ort-cpu", AVX2).cpu_features_any == ()

    def test_a_zero_point_that_is_left_out_is_uint8(self, wide: Artifact):
        model = onnx.load(wide.path)
        for node in model.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[2][0] == "z":
                del node.input[2]
        assert requirements(save(model.graph, wide.path), "ort-cpu", VNNI).cpu_features_any

    def test_not_by_signed_activations(self, wide: Artifact):
        model = onnx.load(wide.path)
        for tensor in model.graph.initializer:
            if tensor.name.startswith("z"):
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(0, np.int8), tensor.name))
        requires = requirements(save(model.graph, wide.path), "ort-cpu", VNNI)
        assert requires.cpu_features_any == ()

    def test_not_by_a_float_model(self, linear: Artifact):
        assert requirements(linear, "ort-cpu", VNNI).cpu_features_any == ()


def test_native_code_requires_its_system_and_version(tmp_path: Path):
    requires = requirements(save_engine(tmp_path / "m.engine"), "tensorrt", HERE)
    host = HERE.model_copy(update={"libraries": {"tensorrt": "11.4.0.106"}, "gpus": (HOPPER,)})
    assert mismatches(requires, host) == []
    assert mismatches(requires, host.model_copy(update={"machine": "aarch64"}))
    assert mismatches(requires, host.model_copy(update={"system": "Windows 11"}))
    newer = host.model_copy(update={"libraries": {"tensorrt": "11.4.0.107"}})
    assert mismatches(requires, newer) == [
        "tensorrt exactly 11.4.0.106 required, tensorrt 11.4.0.107 found"
    ]


@pytest.mark.parametrize(
    ("built_for", "capability", "fits"),
    [
        (("sm90",), "sm90", True),
        (("sm90",), "sm89", False),
        (("sm90",), "sm100", False),
        (("sm89", "sm90"), "sm90", True),
        (("sm80+",), "sm120", True),
        (("sm80+",), "sm75", False),
    ],
)
def test_native_code_requires_its_gpu(built_for: tuple[str, ...], capability: str, fits: bool):
    required = Requirements(runtimes=("t",), version="1", match="exactly", gpus=built_for)
    gpu = HOPPER.model_copy(update={"compute_capability": capability})
    host = HERE.model_copy(update={"libraries": {"t": "1"}, "gpus": (gpu,)})
    assert (mismatches(required, host) == []) == fits
    assert mismatches(required, host.model_copy(update={"gpus": ()}))
    mixed = host.model_copy(
        update={"gpus": (gpu, gpu.model_copy(update={"compute_capability": "sm70"}))}
    )
    assert mismatches(required, mixed), "a server may put the model on any of its GPUs"


@pytest.mark.parametrize(("have", "fits"), [(None, False), ("560.9", False), ("570.1", True)])
def test_an_older_driver_is_told(have: str | None, fits: bool):
    required = Requirements(runtimes=("t",), version="1", match="exactly", driver="570.1")
    host = HERE.model_copy(update={"libraries": {"t": "1"}, "driver": have})
    assert (mismatches(required, host) == []) == fits


def test_an_engine_for_its_own_machines_gpu_is_for_this_one(tmp_path: Path):
    engine = save_engine(tmp_path / "m.engine")
    facts = {**engine.facts, "compute_capabilities": ["this machine's"]}
    record = engine.history[0].model_copy(update={"facts": facts})
    engine = engine.model_copy(update={"history": (record,)})
    with pytest.raises(InputError, match="for which GPU it was built"):
        requirements(engine, "tensorrt", HERE.model_copy(update={"gpus": ()}))
    host = HERE.model_copy(update={"gpus": (HOPPER, HOPPER), "driver": "570.1"})
    found = requirements(engine, "tensorrt", host)
    assert (found.gpus, found.driver) == (("sm90",), "570.1")


def test_a_portable_engine_is_for_newer_gpus_too(tmp_path: Path):
    engine = save_engine(tmp_path / "m.engine", flavour="tensorrt-rtx")
    facts = {**engine.facts, "compute_capabilities": ["portable, sm80 and newer"]}
    record = engine.history[0].model_copy(update={"facts": facts})
    engine = engine.model_copy(update={"history": (record,)})
    assert requirements(engine, "tensorrt-rtx", HERE).gpus == ("sm80+",)


def test_an_engine_of_another_flavour_is_refused(tmp_path: Path):
    engine = save_engine(tmp_path / "m.engine", flavour="tensorrt-rtx")
    with pytest.raises(UsageError, match="built for tensorrt-rtx"):
        requirements(engine, "tensorrt", HERE)


def test_an_engine_of_unknown_version_is_refused(tmp_path: Path):
    engine = save_engine(tmp_path / "m.engine")
    record = engine.history[0].model_copy(update={"facts": {}})
    engine = engine.model_copy(update={"history": (record,)})
    with pytest.raises(InputError, match="which TensorRT version"):
        requirements(engine, "tensorrt", HERE)


def test_a_format_on_the_wrong_backend_is_refused(linear: Artifact, tmp_path: Path):
    with pytest.raises(UsageError, match="does not run onnx"):
        requirements(linear, "tensorrt", HERE)
    with pytest.raises(UsageError, match="does not run engine"):
        requirements(save_engine(tmp_path / "m.engine"), "ort-cpu", HERE)


def test_native_code_in_an_onnx_file_is_refused(tmp_path: Path):
    graph = helper.make_graph(
        [helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch"])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    with pytest.raises(InputError, match="EPContext"):
        requirements(open_model(tmp_path / "m.onnx"), "ort-cpu", HERE)


def test_session_options_in_an_onnx_file_are_refused(linear: Artifact, tmp_path: Path):
    model = onnx.load(linear.path)
    model.metadata_props.add(key="ort_config", value="{}")
    other = save(model.graph, tmp_path / "m.onnx")
    assert requirements(other, "ort-cpu", HERE)
    onnx.save(model, other.path)
    with pytest.raises(InputError, match="ort_config"):
        requirements(other, "ort-cpu", HERE)


versions = st.lists(st.integers(0, 99), min_size=1, max_size=4)


@given(versions, versions, st.sampled_from(["", "+cpu", "rc1", ".dev0"]))
def test_versions_compare_by_number_and_missing_parts_are_zero(
    have: list[int], want: list[int], tail: str
):
    width = max(len(have), len(want))
    padded = [part + [0] * (width - len(part)) for part in (have, want)]
    installed = ".".join(map(str, have)) + tail
    machine = HERE.model_copy(update={"libraries": {"openvino": installed}})
    required = Requirements(
        runtimes=("openvino",), version=".".join(map(str, want)), match="at least"
    )
    assert (mismatches(required, machine) == []) == (padded[0] >= padded[1])


def test_the_runtimes_are_those_that_environments_list():
    for runtime in RUNTIMES.values():
        assert set(runtime.distributions) <= set(environment.LIBRARIES)
