"""Ranges of activations over calibration data, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from deploykit._lazy import needs
from deploykit.dataset import Dataset, padded
from deploykit.errors import InputError

if TYPE_CHECKING:
    import onnx

Ranges = dict[str, tuple[float, float]]
"""Tensor name to its smallest and largest value."""

Progress = Callable[[int, int], None]
"""Called with samples done and samples in all."""


def observe(
    model: onnx.ModelProto,
    tensors: Iterable[str],
    data: Dataset,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> Ranges:
    """Smallest and largest value of each tensor over all samples (minmax calibration).

    They are reduced inside the graph, so one batch of scalars leaves the runtime at a time; the
    result depends neither on the order nor on the batching of the samples. Raises InputError: a
    tensor takes NaN or infinite values.
    """
    with needs("onnxruntime"):
        import onnxruntime as ort
    names = sorted(set(tensors))
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    session = ort.InferenceSession(
        _reduced(model, names).SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    outputs = [f"{kind}({name})" for kind in ("min", "max") for name in names]
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    done = 0
    for feed, _ in data.batches(batch_size):
        # A sample more than once changes no range; a model of fixed batch takes full batches only.
        full = {name: padded(array, batch_size) for name, array in feed.items()}
        found = np.array(session.run(outputs, full), dtype=np.float64)
        low = np.minimum(low, found[: len(names)])
        high = np.maximum(high, found[len(names) :])
        done += len(next(iter(feed.values())))
        if progress:
            progress(done, len(data))
    for name, a, b in zip(names, low, high, strict=True):
        if not np.isfinite([a, b]).all():
            raise InputError(
                f"tensor {name!r} takes NaN or infinite values on the calibration data",
                hint="check the preprocessing; the float model is broken on this data",
            )
    return {n: (float(a), float(b)) for n, a, b in zip(names, low, high, strict=True)}


def _reduced(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """The model with a scalar minimum and maximum of each tensor as its only outputs."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    for kind, operator in (("min", "ReduceMin"), ("max", "ReduceMax")):
        for name in names:
            output = f"{kind}({name})"
            copy.graph.node.append(
                onnx.helper.make_node(operator, [name], [output], name=output, keepdims=0)
            )
            copy.graph.output.append(
                onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, [])
            )
    return copy
