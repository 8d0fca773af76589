"""The one place that speaks to ONNX Runtime's quantization tools."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit._lazy import needs
from deploykit.errors import StageError
from deploykit.stages.quantize.presets import Preset
from deploykit.stages.quantize.ranges import Ranges

if TYPE_CHECKING:
    import onnx


def prepare(path: Path) -> tuple[onnx.ModelProto, str]:
    """Fold batch norms and constants and infer shapes; say which way worked.

    Symbolic shape inference fails on several real models; the pass is then run without it.
    """
    with needs("onnxruntime"), _quiet():
        import onnx
        from onnxruntime.quantization.quant_utils import (
            add_infer_metadata,
            load_model_with_shape_infer,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "prepared.onnx"
        for way, skip in (("symbolic shapes", False), ("without symbolic shapes", True)):
            try:
                with _quiet():
                    quant_pre_process(path, target, skip_symbolic_shape=skip)
                    return load_model_with_shape_infer(target), way
            except Exception:  # noqa: BLE001, S112 - it raises many kinds; the way taken is a fact
                continue
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    add_infer_metadata(model)
    return model, "no folding: ONNX Runtime's pass fails on it"


def default_op_types() -> tuple[str, ...]:
    """Operators that ONNX Runtime can put Q/DQ pairs around."""
    with needs("onnxruntime"), _quiet():
        from onnxruntime.quantization.registry import QDQRegistry
    return tuple(sorted(QDQRegistry))


def insert_qdq(
    model: onnx.ModelProto,
    ranges: Ranges,
    preset: Preset,
    *,
    op_types: Sequence[str],
    left_out: Sequence[str],
) -> onnx.ModelProto:
    """A copy of the model with explicit Q/DQ pairs for the given ranges."""
    with needs("onnxruntime"), _quiet():
        from onnxruntime.quantization import CalibrationMethod, QuantType
        from onnxruntime.quantization.calibrate import TensorData, TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    data = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }
    types = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
    copy = type(model)()
    copy.CopyFrom(model)
    try:
        with _quiet():
            quantizer = QDQQuantizer(
                copy,
                per_channel=True,
                reduce_range=preset.reduce_range,
                weight_qType=QuantType.QInt8,
                activation_qType=types[preset.activation],
                tensors_range=TensorsData(CalibrationMethod.MinMax, data),
                nodes_to_quantize=[],
                nodes_to_exclude=list(left_out),
                op_types_to_quantize=list(op_types),
                extra_options={
                    "ActivationSymmetric": preset.symmetric_activation,
                    "WeightSymmetric": True,
                    "QuantizeBias": preset.quantize_bias,
                    "OpTypesToExcludeOutputQuantization": []
                    if preset.quantize_outputs
                    else list(op_types),
                },
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
    except Exception as error:
        raise StageError(
            f"ONNX Runtime's quantizer fails: {type(error).__name__}: {error}",
            hint="leave the node that it names out with --nodes-to-exclude",
        ) from error
    result: onnx.ModelProto = quantizer.model.model
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the tools' prints and root-logger lines off the user's terminal."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        root.setLevel(level)
