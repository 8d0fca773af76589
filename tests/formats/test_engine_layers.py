"""Inspector JSON written by hand after TensorRT's documented form; none is from a real engine."""

from __future__ import annotations

import json

import pytest

from deploykit.formats import engine_layers
from deploykit.values import Json


def layer(kind: str, *reads: str, name: str = "", writes: str = "Float") -> Json:
    def tensors(types: tuple[str, ...]) -> list[Json]:
        return [{"Name": "t", "Format/Datatype": told} for told in types]

    made = {"Name": name or kind, "LayerType": kind}
    return {**made, "Inputs": tensors(reads), "Outputs": tensors((writes,))}


def account(*layers: object) -> Json:
    return engine_layers.account(json.dumps({"Layers": layers, "Bindings": ["x"]}))


@pytest.mark.parametrize(
    ("told", "precision"),
    [
        ("Row major Int8 format", "int8"),
        ("Int8 NC/32HW32", "int8"),
        ("FP8 NHWC", "fp8"),
        ("Row major linear FP8E4M3", "fp8"),
        ("Int4 linear", "int4"),
        ("BFloat16", "bf16"),
        ("BF16 NHWC8", "bf16"),
        ("Row major linear FP16 format", "fp16"),
        ("Half", "fp16"),
        ("Row major linear FP32", "fp32"),
        ("Float", "fp32"),
        ("Int64", "other"),
        ("", "other"),
    ],
)
def test_the_type_behind_a_format(told: str, precision: str) -> None:
    assert engine_layers.precision(layer("gemm", told)) == precision


def test_the_narrowest_of_what_is_read_is_what_a_kernel_computes_in() -> None:
    assert engine_layers.precision(layer("gemm", "Float", "Int8", "Half")) == "int8"
    assert engine_layers.precision(layer("gemm", "Float", writes="Int8")) == "fp32"
    assert engine_layers.precision(layer("gemm", writes="Half")) == "fp16"
    assert engine_layers.precision({}) == "other"


def test_work_is_counted_apart_from_reformats_and_from_what_is_no_kernel() -> None:
    found = account(
        layer("CaskConvolution", "Int8", name="conv1"),
        layer("CaskGemmConvolution", "Half", name="fc"),
        layer("Reformat", "Float", name="reformat of conv1", writes="Int8"),
        layer("PoolingV2", "Int8", name="pool"),
        layer("kgen", "Half", name="__myl_MatMulAdd_0"),
        layer("Constant", name="w"), layer("NoOp", "Float"), layer("Wait"), layer("signal"),
    )  # fmt: skip
    assert found["engine_layers"] == 5
    assert found["engine_layers_by_precision"] == {"int8": 2, "fp16": 2, "fp32": 1}
    assert found["engine_compute_layers_by_precision"] == {"fp16": 2, "int8": 1}
    assert found["reformats"] == ["reformat of conv1"]
    assert found["ran_on_gpu"] is True


def test_an_engine_that_tells_names_only_has_an_empty_account() -> None:
    found = account("conv1", "fc")  # verbosity LAYER_NAMES_ONLY
    assert found["engine_layers"] == 0
    assert found["engine_layers_by_precision"] == {}
    assert engine_layers.account("{}")["reformats"] == []


def test_a_layer_without_a_name_is_counted() -> None:
    found = account({"LayerType": "Reformat"}, {"LayerType": "gemm"}, {})
    assert found["engine_layers"] == 3
    assert len(found["reformats"]) == 1
