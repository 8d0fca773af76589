from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from deploykit.errors import InputError, IntegrityError
from deploykit.formats import onnx_file, open_model
from deploykit.store import digest, record_path, record_text
from deploykit.values import TensorSpec
from tests.fixtures_core import fine_or_refused, refused

Shape = Sequence[int | str | None] | None
FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
WEIGHT = numpy_helper.from_array(np.ones((4, 2), np.float32), "w")


def value(name: str, shape: Shape = ("batch", 4), kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(**changes: Any) -> onnx.ModelProto:
    """y = relu(x w), sound unless changed."""
    parts: dict[str, Any] = {
        "nodes": [
            helper.make_node("MatMul", ["x", "w"], ["m"]),
            helper.make_node("Relu", ["m"], ["y"]),
        ],
        "name": "graph",
        "inputs": [value("x")],
        "outputs": [value("y", ("batch", 2))],
        "initializer": [WEIGHT],
        **changes,
    }
    opsets = parts.pop("opsets", [helper.make_opsetid("", 17)])
    return helper.make_model(helper.make_graph(**parts), opset_imports=opsets, ir_version=9)


def weights(kind: int, *shapes: tuple[int, ...]) -> list[onnx.TensorProto]:
    return [
        helper.make_tensor(f"w{i}", kind, shape, np.zeros(shape)) for i, shape in enumerate(shapes)
    ]


def saved(folder: Path, proto: onnx.ModelProto, **options: Any) -> Path:
    onnx.save(proto, folder / "model.onnx", **options)
    return folder / "model.onnx"


# --- what a file declares


def test_a_file_is_opened_by_what_it_declares(tmp_path: Path) -> None:
    path = saved(tmp_path, model())
    artifact = open_model(path)
    assert (artifact.path, artifact.format, artifact.precision) == (path, "onnx", "fp32")
    assert artifact.inputs == (TensorSpec(name="x", dtype="float32", shape=("batch", 4)),)
    assert artifact.outputs == (TensorSpec(name="y", dtype="float32", shape=("batch", 2)),)
    assert artifact.sha256 == digest(path)
    assert (artifact.history, artifact.preprocessing) == ((), None)


def test_a_weight_that_is_listed_as_an_input_is_none() -> None:
    proto = model(inputs=[value("x"), value("w", (4, 2))])
    assert [spec.name for spec in onnx_file.inputs(proto)] == ["x"]


@pytest.mark.parametrize(
    ("shape", "kind", "want"),
    [
        (("batch", 3, None), FLOAT, "x: float32[batch, 3, x_2]"),
        ((None, None), TensorProto.INT64, "x: int64[x_0, x_1]"),
        ((-1, 4), FLOAT, "x: float32[x_0, 4]"),
        ((0, 1), FLOAT16, "x: float16[0, 1]"),
        ((), TensorProto.BOOL, "x: bool[]"),
        ((1,), BFLOAT16, "x: bfloat16[1]"),
        ((1,), TensorProto.UINT8, "x: uint8[1]"),
    ],
)
def test_shapes_and_dtypes_are_read(shape: Shape, kind: int, want: str) -> None:
    proto = model(inputs=[value("x", shape, kind)])
    assert [str(spec) for spec in onnx_file.inputs(proto)] == [want]


def test_what_is_no_tensor_is_refused() -> None:
    sequence = helper.make_tensor_sequence_value_info("x", FLOAT, None)
    for odd in (sequence, value("x", (1,), 99)):
        with refused(InputError, "'x' is no tensor", hint="dense tensors"):
            onnx_file.inputs(model(inputs=[odd]))


@pytest.mark.parametrize(
    ("opsets", "want"),
    [
        ([("", 17)], 17),
        ([("ai.onnx", 21)], 21),
        ([("com.microsoft", 99), ("", 18)], 18),
        ([("com.microsoft", 1)], 0),
    ],
)
def test_the_opset_is_of_the_standard_operators(opsets: list[tuple[str, int]], want: int) -> None:
    proto = model(opsets=[helper.make_opsetid(*opset) for opset in opsets])
    assert onnx_file.opset(proto) == want


def test_operators_are_counted_the_most_frequent_first() -> None:
    nodes = [
        helper.make_node(op, ["x"], ["y"]) for op in ("Relu", "Abs", "Abs", "Neg", "Abs", "Neg")
    ]
    counts = onnx_file.operators(model(nodes=nodes))
    assert list(counts.items()) == [("Abs", 3), ("Neg", 2), ("Relu", 1)]


def test_parameters_are_counted() -> None:
    proto = model(initializer=weights(FLOAT, (4, 2), (3,), ()))
    assert onnx_file.parameters(proto) == 8 + 3 + 1


# --- precision

QUANTIZE = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])]


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, "fp32"),
        ({"initializer": []}, "fp32"),
        ({"initializer": weights(FLOAT16, (2, 2), (2, 2)) + weights(FLOAT, (2, 2))}, "fp16"),
        ({"initializer": weights(FLOAT16, (2, 2)) + weights(FLOAT, (2, 2), (2, 2))}, "fp32"),
        ({"initializer": weights(FLOAT16, (2, 2)) + weights(FLOAT, (2,), (2,), (2,))}, "fp16"),
        ({"initializer": weights(BFLOAT16, (2, 2), (2, 2)) + weights(FLOAT, (2, 2))}, "bf16"),
        ({"initializer": weights(BFLOAT16, (2, 2)) + weights(FLOAT, (2, 2))}, "fp32"),
        ({"nodes": QUANTIZE}, "int8"),
        ({"nodes": QUANTIZE, "initializer": weights(FLOAT16, (2, 2))}, "int8"),
        ({"nodes": QUANTIZE, "initializer": weights(TensorProto.FLOAT8E4M3FN, (1,))}, "fp8"),
        ({"nodes": QUANTIZE, "initializer": weights(TensorProto.FLOAT8E5M2, (1,))}, "fp8"),
        ({"initializer": weights(TensorProto.INT8, (2, 2))}, "fp32"),
    ],
)
def test_precision_is_the_lowest_that_is_computed_in(changes: dict[str, Any], want: str) -> None:
    assert onnx_file.precision(model(**changes)) == want


# --- broken files


@pytest.mark.parametrize("data", [b"", b"hello", b"\x00" * 100, b"\x08\x07"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with refused(InputError, path, "not an ONNX file", hint="a sound .onnx file"):
        open_model(path)


def test_a_folder_named_like_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with refused(InputError, tmp_path / "model.onnx", "model.json is missing", hint="factory"):
        open_model(tmp_path / "model.onnx")
    with refused(InputError, "not an ONNX file", hint="a sound .onnx file"):
        onnx_file.read(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"nodes": [helper.make_node("Relu", ["absent"], ["y"])]}, "absent"),
        ({"nodes": [helper.make_node("NoSuchOperator", ["x"], ["y"])]}, "NoSuchOperator"),
        ({"nodes": [helper.make_node("Relu", ["x", "x"], ["y"])]}, "Relu"),
        ({"opsets": [helper.make_opsetid("com.microsoft", 1)]}, "opset"),
        ({"name": ""}, "name"),
    ],
)
def test_a_broken_model_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], fact: str
) -> None:
    path = saved(tmp_path, model(**changes))
    with refused(InputError, path, "broken ONNX model", fact, hint="a sound .onnx file"):
        open_model(path)


def test_weights_that_lie_in_a_lost_file_are_missed(tmp_path: Path) -> None:
    path = saved(tmp_path, model(), save_as_external_data=True, location="w.data", size_threshold=0)
    assert open_model(path).precision == "fp32"
    (tmp_path / "w.data").unlink()
    with refused(InputError, path, "w.data", hint="a sound .onnx file"):
        open_model(path)


def test_weights_in_another_file_are_a_part_of_the_model(tmp_path: Path) -> None:
    path = saved(tmp_path, model(), save_as_external_data=True, location="w.data", size_threshold=0)
    before = open_model(path).sha256
    assert open_model(path).sha256 == before != digest(path)
    (tmp_path / "w.data").write_bytes(np.zeros((4, 2), np.float32).tobytes())
    assert open_model(path).sha256 != before


def test_weights_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "w.data").write_bytes(np.zeros((4, 2), np.float32).tobytes())
    outside = onnx.TensorProto(name="w", data_type=FLOAT, dims=(4, 2), data_location="EXTERNAL")
    outside.external_data.add(key="location", value="../w.data")
    path = tmp_path / "inner" / "model.onnx"
    path.write_bytes(model(initializer=[outside]).SerializeToString())
    with refused(InputError, path, hint="a sound .onnx file"):
        open_model(path)


@settings(max_examples=10)
@given(st.data())
def test_a_damaged_file_is_opened_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(damaged(data))
    with fine_or_refused(""):
        open_model(path)


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_file_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(damaged(data))
    with fine_or_refused(""):
        onnx_file.declared(path)


def damaged(data: st.DataObject) -> bytes:
    """A sound file with a bit or more changed, or its end lost."""
    whole = bytearray(model().SerializeToString())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    return bytes(whole[: data.draw(st.just(len(whole)) | st.integers(0, len(whole)))])


# --- records


def test_a_record_speaks_for_the_file_as_long_as_it_is_the_one(tmp_path: Path) -> None:
    path = saved(tmp_path, model())
    recorded = open_model(path).model_copy(update={"precision": "bf16"})
    record_path(path).write_text(record_text(recorded))
    assert open_model(path) == recorded
    saved(tmp_path, model(name="other"))
    with refused(IntegrityError, path, "sha256 differs", hint="make it again"):
        open_model(path)
