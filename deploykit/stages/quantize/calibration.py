"""Run the model over the calibration data once, and keep an exact histogram of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit import _files, store
from deploykit._lazy import needs
from deploykit.dataset import Dataset, padded
from deploykit.environment import read as read_environment
from deploykit.errors import InputError, UsageError
from deploykit.formats import onnx_weights
from deploykit.formats.onnx_graph import Graph, open_shapes
from deploykit.formats.onnx_sizes import WEIGHTS_FOLDER
from deploykit.stages.quantize.histogram import Histogram
from deploykit.values import Array, Json, Value

if TYPE_CHECKING:
    import onnx

Calibration = Mapping[str, Histogram]
"""Tensor name to what its values were."""

Progress = Callable[[int, int], None]
"""Called with samples done and samples in all."""


def observe(
    model: onnx.ModelProto,
    tensors: Iterable[str],
    data: Dataset,
    *,
    binned: bool = True,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> Calibration:
    """Histograms of the tensors over all samples; with `binned=False` their extremes only.

    Samples are run one at a time (a model of fixed batch takes whole batches, the last one padded
    with its last sample), so the result depends neither on how the data comes in batches nor on its
    order, and the memory not on how much there is.

    `folder` is where the weights of a shell lie. Raises InputError: a tensor takes NaN on the data.
    """
    names = sorted(set(tensors))
    if not names:
        return {}
    seen = {name: Histogram() for name in names}
    rectified = {node.output[0] for node in model.graph.node if node.op_type == "Relu"}

    def count(outputs: Mapping[str, Array]) -> None:
        for name, values in outputs.items():
            try:
                seen[name].add(values, binned=binned, rectified=name in rectified)
            except ValueError as error:
                raise InputError(
                    f"tensor {name!r}: {error} on the calibration data",
                    hint="check the preprocessing; the float model is broken on this data",
                ) from error

    for outputs, done in runs(model, names, data, folder):
        count(outputs)
        if progress:
            progress(done, len(data))
    return seen


def runs(
    model: onnx.ModelProto, names: Sequence[str], data: Dataset, folder: Path | None = None
) -> Iterator[tuple[Mapping[str, Array], int]]:
    """The tensors for each sample (or fixed batch) in turn, and how many samples are done.

    Raises InputError: the model fails on a sample.
    """
    batch, done = _fixed_batch(model), 0
    session = _session(model, list(names), folder)
    for feed, _ in data.batches(batch):
        padded_feed = {name: padded(array, batch) for name, array in feed.items()}
        try:
            outputs = session.run(list(names), padded_feed)
        except Exception as error:  # ONNX Runtime raises many kinds
            reason = str(error).splitlines()[0].rpartition("Status Message: ")[2]
            raise InputError(
                f"{data.reference}, sample {done}: the model fails on it: {reason}",
                hint="check the values: are they what the model takes?",
            ) from error
        done += len(next(iter(feed.values())))
        yield dict(zip(names, outputs, strict=True)), done


def sample_shapes(graph: Graph, data: Dataset) -> dict[str, tuple[int, ...]]:
    """Shapes, on the first sample, of what the model leaves open around its compute nodes.

    Raises InputError: the model fails on the sample.
    """
    names = sorted(open_shapes(graph))
    if not names:
        return {}
    outputs, _ = next(runs(graph.model, names, data, graph.folder))
    return {name: array.shape for name, array in outputs.items()}


class _Kept(Value):
    """Histograms by tensor, as plain data."""

    tensors: dict[str, Json]


def remembered(path: Path | None, identity: Json, make: Callable[[], Calibration]) -> Calibration:
    """The histograms kept in the file if they were made of the same; else made, and kept there.

    `identity` is everything that decides them. A torn or foreign file is a miss.
    """
    if path is None:
        return make()
    _check_cache(path)

    def plain() -> _Kept:
        return _Kept(tensors={name: h.to_json() for name, h in make().items()})

    kept, _ = store.remember(path, store.digest_of(identity), _Kept, plain)
    return {name: Histogram.from_json(plain) for name, plain in kept.tensors.items()}


def _check_cache(path: Path) -> None:
    """Raises UsageError: what lies there is no cache of ours, or none can be written there.

    A torn cache is one of ours: it begins as `store.remember` writes it.
    """
    ours = path.is_file() and (not path.stat().st_size or path.read_bytes()[:8] == b'{"key": ')
    if path.exists() and not ours:
        raise UsageError(
            f"{path} is no calibration cache, it is not replaced",
            hint="give --calibration-cache a file of its own",
        )
    _files.check_free(path, force=True)


def _fixed_batch(model: onnx.ModelProto) -> int:
    """The first axis of the first input, 1 where it is dynamic."""
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        shape = value.type.tensor_type.shape.dim
        if value.name not in weights and shape:
            return max(int(shape[0].dim_value), 1)
    return 1


def _session(model: onnx.ModelProto, names: list[str], weights: Path | None) -> Any:
    """A session that returns these tensors, loaded from a file: no second copy in memory."""
    with needs("onnxruntime"):
        import onnxruntime as ort
    import onnx

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = read_environment().cores
    settings.log_severity_level = 3
    own = list(model.graph.output)
    try:
        del model.graph.output[:]
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
        )
        if weights and onnx_weights.files(model):
            settings.add_session_config_entry(WEIGHTS_FOLDER, str(weights))
            return ort.InferenceSession(
                model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
            )
        with _files.scratch() as folder:
            path = folder / "observed.onnx"
            onnx.save(model, path)
            return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    finally:
        del model.graph.output[:]
        model.graph.output.extend(own)
