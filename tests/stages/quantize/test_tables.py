"""Embedding tables as integers: near the float ones, a quarter of the size, never float whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from deploykit.backends import backend, open_session
from deploykit.dataset import open_dataset
from deploykit.errors import InputError
from deploykit.evaluation import collect
from deploykit.formats.onnx_file import open_file
from deploykit.metrics import sqnr_db
from deploykit.stages.quantize import QuantizeOptions, quantize, tables
from deploykit.stages.quantize.presets import Target
from deploykit.values import Artifact
from tests.fixtures_core import refused
from tests.formats.test_onnx_graph import normal, parsed
from tests.stages.quantize.test_search import float_names

ROWS, WIDTH = 2048, 64
TEXT = """(int64[N,5] ids) => (float[N,5,8] y) {
    e = Gather(table, ids) h = MatMul(e, w) r = Relu(h) y = MatMul(r, v)
}"""


def made(folder: Path, target: Target = "ort-cpu", **constants: np.ndarray) -> Artifact:
    """A quantized model that looks rows up."""
    tensors = {"table": normal(ROWS, WIDTH), "w": normal(WIDTH, 8), "v": normal(8, 8)} | constants
    onnx.save(parsed(TEXT, **tensors), folder / "model.onnx")
    ids = np.random.default_rng(0).integers(-ROWS, ROWS, (24, 5))
    np.savez(folder / "data.npz", ids=ids)
    options = QuantizeOptions(target=target, scope="compute", calibration_method="minmax")
    source = open_file(folder / "model.onnx")
    data = open_dataset(str(folder / "data.npz")).matching(source.inputs)
    return quantize(source, options, data=data, out=folder / f"{target}.onnx")


@pytest.mark.parametrize("target", ["ort-cpu", "openvino"])
def test_rows_of_integers_are_near_the_float_ones(target: Target, tmp_path: Path) -> None:
    if why := backend(target).unavailable():
        pytest.skip(why)
    scales = np.logspace(-3, 3, ROWS, dtype=np.float32)[:, None]  # one scale a row, not one in all
    artifact = made(tmp_path, target, table=normal(ROWS, WIDTH))
    onnx.checker.check_model(onnx.load(artifact.path), full_check=True)
    source = open_file(tmp_path / "model.onnx")
    data = open_dataset(str(tmp_path / "data.npz")).matching(source.inputs)
    with open_session(source, "ort-cpu") as one, open_session(artifact, target) as other:
        assert sqnr_db(collect(one, data)[0]["y"], collect(other, data)[0]["y"]) > 25
    integers, row_scales = tables.quantized(normal(ROWS, WIDTH) * scales)
    assert (np.abs(integers).max(axis=1) == 127).all()
    error = np.abs(integers * row_scales - normal(ROWS, WIDTH) * scales)
    assert (error <= row_scales * 0.501).all()


def test_the_float_table_is_gone_and_the_file_a_quarter(tmp_path: Path) -> None:
    artifact = made(tmp_path)
    model = onnx.load(artifact.path)
    big = [t for t in model.graph.initializer if np.prod(t.dims) >= ROWS * WIDTH]
    assert [t.data_type for t in big] == [onnx.TensorProto.INT8]
    readers = [n.op_type for n in model.graph.node if big[0].name in n.input]
    assert readers == ["Gather"]
    assert artifact.path.stat().st_size < (tmp_path / "model.onnx").stat().st_size / 3
    assert artifact.facts["quantized_operators"] == {"Gather": 1, "MatMul": 2}


def test_a_row_of_zeros_stays_zero() -> None:
    integers, scales = tables.quantized(np.zeros((3, 4), np.float32))
    assert not integers.any()
    assert np.isfinite(scales).all()


def test_small_tables_and_those_for_a_gpu_stay_float_and_say_why(tmp_path: Path) -> None:
    small = made(tmp_path, table=normal(ROWS, 16), w=normal(16, 8))
    assert "has 32,768 values" in next(iter(float_names(small.facts).values()))
    gpu = made(tmp_path, "tensorrt")
    assert "integer tables are for CPUs" in float_names(gpu.facts).values()


def test_data_on_which_the_model_fails_is_bad_input(tmp_path: Path) -> None:
    with refused(InputError, "the model fails on it", hint="check the values"):
        made(tmp_path, table=normal(ROWS // 2, WIDTH))
