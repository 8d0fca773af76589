"""What a 16-bit type costs a model, node by node, measured on data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deploykit.backends import open_session
from deploykit.dataset import Dataset, padded
from deploykit.environment import read as read_environment
from deploykit.errors import AnswerIsNo, InputError
from deploykit.evaluation import Outputs, collect
from deploykit.formats import onnx_weights
from deploykit.formats.onnx_graph import Graph
from deploykit.formats.onnx_lower import (
    LARGEST,
    SMALLEST_NORMAL,
    SWITCH,
    Half,
    Slots,
    extremes,
    simulated,
)
from deploykit.session import Session
from deploykit.values import Array, Artifact, Feed, SessionOptions, TensorSpec

if TYPE_CHECKING:
    import onnx

HEADROOM = 2.0
"""A tensor stays in float32 if it comes so near to the largest number of the type."""
FEW = 4
"""Samples on which each node alone is tried."""
Talk = Callable[[str, int, int], None]


def loss(reference: Mapping[str, Array], have: Mapping[str, Array]) -> tuple[float, str]:
    """The largest loss of any output, and of which.

    Of floats the largest |difference| over the largest |reference|; of others the share that
    differs. Infinite where the result is not finite and the reference is.
    """
    worst = (0.0, "")
    for name, want in reference.items():
        got = have[name]
        if want.shape != got.shape:
            found = np.inf
        elif want.dtype.kind != "f":
            found = float((want != got).mean()) if want.size else 0.0
        else:
            found = _float_loss(want.astype(np.float64), got.astype(np.float64))
        worst = max(worst, (found, name))
    return worst


def _float_loss(want: Array, got: Array) -> float:
    with np.errstate(invalid="ignore"):
        gap = np.where(want == got, 0.0, np.abs(want - got))  # equal infinities differ by NaN
    largest = float(np.abs(want).max(initial=0.0, where=np.isfinite(want)))
    found = float(gap.max(initial=0.0)) / (largest or 1.0)
    return found if np.isfinite(found) else np.inf


@dataclass(frozen=True)
class Lab:
    """A float32 model, its data, and a folder to try things in."""

    source: Artifact
    data: Dataset
    scratch: Path
    talk: Talk

    def session(self, model: onnx.ModelProto, name: str, artifact: Artifact) -> Session:
        """Open a changed graph without the runtime's own changes."""
        path = self.scratch / f"{name}.onnx"
        folder = self.source.path.parent
        onnx_weights.lend(onnx_weights.files(model), folder, self.scratch)
        onnx_weights.write(model, path, folder=folder)
        changed = artifact.model_copy(update={"path": path, "sha256": "", "history": ()})
        options = SessionOptions(threads=read_environment().cores, simulate=True)
        return open_session(changed, "ort-cpu", options)

    @property
    def integers(self) -> bool:
        """Whether pairs are in it: fused kernels for them differ, and may overflow, by CPU."""
        return self.source.precision not in ("fp32", "fp16", "bf16")

    def outputs(self, artifact: Artifact) -> Outputs:
        """Outputs of a model on the data."""
        return run(artifact, self.data, simulate=self.integers)

    @cached_property
    def reference(self) -> Outputs:
        """Outputs of the float32 model. Raises InputError: one is not finite on the data."""
        outputs = self.outputs(self.source)
        for name, array in outputs.items():
            if array.dtype.kind == "f" and np.isnan(array).any():
                raise InputError(
                    f"{self.source.path}: output {name!r} is NaN on {self.data.reference}",
                    hint="check the preprocessing; the float32 model is broken on this data",
                )
        return outputs

    def overflowing(self, graph: Graph, able: Mapping[str, Slots], kind: Half) -> dict[str, str]:
        """Nodes that read or write what the type cannot hold, with the reason."""
        folder, found = self.source.path.parent, dict[str, str]()
        for name, slot in able.items():
            if why := bad_constant(graph, name, slot, kind, folder):
                found[name] = why
        tensors = {name: tuple(tensors_of(graph, name, slot)) for name, slot in able.items()}
        largest = self._largest(graph, {t for each in tensors.values() for t in each})
        limit = LARGEST[kind] / HEADROOM
        for name, each in tensors.items():
            value = max((largest[t] for t in each), default=0.0)
            if value > limit and name not in found:
                found[name] = f"overflow: magnitudes up to {value:.3g} on the data"
        return found

    def _largest(self, graph: Graph, names: Collection[str]) -> dict[str, float]:
        """The largest magnitude of each tensor over the data."""
        ordered = sorted(names)
        outputs = tuple(
            TensorSpec(name=f"{name}:largest", dtype="float32", shape=()) for name in ordered
        )
        artifact = self.source.model_copy(update={"outputs": outputs})
        found = dict.fromkeys(ordered, 0.0)
        with self.session(extremes(graph, ordered), "extremes", artifact) as session:
            for feed in feeds(self.source, self.data):
                for name, value in session.run(feed).items():
                    plain = name.removesuffix(":largest")
                    found[plain] = max(found[plain], np.nan_to_num(float(value), posinf=0.0))
        return found

    def lossy(
        self, graph: Graph, able: Mapping[str, Slots], kind: Half, tolerance: float
    ) -> tuple[dict[str, str], float]:
        """Nodes to keep in float32, with the reason, so that no output loses more; and the loss.

        If all together lose too much, each is tried alone, and the worst stay in float32: as few as
        it takes, by bisection. Raises AnswerIsNo: it takes all of them.
        """
        numbers = {name: index for index, name in enumerate(able)}
        switch = TensorSpec(name=SWITCH, dtype="bool", shape=(len(able),))
        artifact = self.source.model_copy(update={"inputs": (*self.source.inputs, switch)})
        with self.session(simulated(graph, able, kind), "simulated", artifact) as session:

            def lost(lowered: Collection[str], data: Dataset) -> float:
                flags = np.zeros(len(able), bool)
                flags[[numbers[name] for name in lowered]] = True
                have = switched(session, self.source, data, flags)
                count = len(next(iter(have.values())))
                return loss({n: a[:count] for n, a in self.reference.items()}, have)[0]

            whole = lost(able, self.data)
            if whole <= tolerance:
                return {}, whole
            alone: dict[str, float] = {}
            for done, name in enumerate(able):
                self.talk("try each node", done, len(able))
                alone[name] = lost([name], self.data.first(FEW))
            ranked = sorted(able, key=lambda name: -alone[name])
            low, high, after = 0, len(ranked), 0.0
            while high - low > 1:
                middle = (low + high) // 2
                found = lost(ranked[middle:], self.data)
                low, high = (low, middle) if found <= tolerance else (middle, high)
                after = found if found <= tolerance else after
        if high == len(ranked):
            raise AnswerIsNo(
                f"in {kind.upper()} an output is off by {whole:.2g} of its largest value, "
                f"{tolerance:.2g} allowed, and no choice of nodes keeps to that",
                hint="raise --tolerance only if the model is still good: see `deploykit evaluate`",
            )
        kept = {name: f"loses too much: {alone[name]:.2g} alone" for name in ranked[:high]}
        return kept, after


def tensors_of(graph: Graph, name: str, slot: Slots) -> Iterator[str]:
    """The tensors of a node that are lowered with it, without constants."""
    node = graph.nodes[name]
    yield from (node.input[i] for i in slot.inputs if node.input[i] in graph.floats)
    yield from (node.output[i] for i in slot.outputs)


def bad_constant(graph: Graph, name: str, slot: Slots, kind: Half, folder: Path) -> str | None:
    """Why a constant of the node does not fit the type, or None."""
    node = graph.nodes[name]
    for i in slot.inputs:
        tensor = graph.constants.get(node.input[i])
        if tensor is None:
            continue
        values = np.abs(onnx_weights.array(tensor, folder))
        values = values[np.isfinite(values)]
        if values.size and (top := float(values.max())) > LARGEST[kind]:
            return f"overflow: the constant {node.input[i]!r} holds {top:.3g}"
        scale = i == 1 and node.op_type in ("QuantizeLinear", "DequantizeLinear")
        if scale and (low := float(values.min())) < SMALLEST_NORMAL[kind]:
            return f"underflow: the scale {node.input[i]!r} is {low:.3g}"
    return None


def run(artifact: Artifact, data: Dataset, *, simulate: bool = False) -> Outputs:
    """Outputs of a model in ONNX Runtime, sample by sample."""
    options = SessionOptions(threads=read_environment().cores, simulate=simulate)
    with open_session(artifact, "ort-cpu", options) as session:
        return collect(session, data, batch_size=1)[0]


def feeds(artifact: Artifact, data: Dataset) -> Iterator[Feed]:
    """The data one sample at a time, or in the fixed batches that the model takes."""
    fixed = artifact.inputs[0].shape[:1]
    size = fixed[0] if fixed and isinstance(fixed[0], int) else 1
    for feed, _ in data.matching(artifact.inputs).batches(size):
        yield {name: padded(array, size) for name, array in feed.items()}


def switched(session: Session, source: Artifact, data: Dataset, flags: Array) -> Outputs:
    """Outputs of a simulated graph with these nodes lowered."""
    parts: dict[str, list[Array]] = {spec.name: [] for spec in source.outputs}
    for feed in feeds(source, data):
        for name, array in session.run({**feed, SWITCH: flags}).items():
            parts[name].append(array)
    return {name: np.concatenate(each)[: len(data)] for name, each in parts.items()}
