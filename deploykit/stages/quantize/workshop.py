"""One float model, prepared and calibrated once, from which quantized variants are cut."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from deploykit import store
from deploykit.dataset import Dataset
from deploykit.environment import versions
from deploykit.errors import AnswerIsNo
from deploykit.stages.quantize import blocks, guard, placement, qdq
from deploykit.stages.quantize.account import account
from deploykit.stages.quantize.calibration import Calibration, Progress, observe, remembered
from deploykit.stages.quantize.graph import Graph
from deploykit.stages.quantize.levels import Grid
from deploykit.stages.quantize.methods import EXACT, Method, calibrate
from deploykit.stages.quantize.placement import Plan
from deploykit.stages.quantize.prepare import prepare
from deploykit.stages.quantize.presets import COMPUTE, OPSETS, Preset
from deploykit.values import Artifact, Json

HUGE = 1e4
"""A range beyond this leaves almost no levels for ordinary values."""


@dataclass(frozen=True)
class Variant:
    """What is quantized, and how ranges follow from values."""

    nodes: tuple[str, ...]
    method: Method
    percentile: float = 99.99


@dataclass
class Workshop:
    """A prepared graph with the histograms of all tensors that a variant may want."""

    source: Artifact
    graph: Graph
    preset: Preset
    seen: Calibration
    told: tuple[str, ...]
    """What was done to the graph."""

    @classmethod
    def open(  # noqa: PLR0913 - what is looked at, where, how, and who listens
        cls,
        source: Artifact,
        chosen: Preset,
        data: Dataset,
        *,
        op_types: Collection[str],
        binned: bool,
        cache: Path | None = None,
        progress: Progress | None = None,
    ) -> Workshop:
        """Prepare the model and run it once over the data; `op_types` may become integer.

        Raises InputError: an input never changes, or a tensor is NaN. AnswerIsNo: nothing in the
        model can be quantized.
        """
        model, told = prepare(source.path, opset=OPSETS[chosen.precision])
        graph = Graph(model)
        widest = placement.plan(graph, placement.chosen(graph, op_types), chosen)
        if not widest.nodes:
            raise nothing(account(graph, widest, {}), chosen)
        tensors = widest.written | set(widest.read)
        looked_at = tensors or graph.ends & graph.floats
        binned = binned or cache is not None
        identity = {
            "model": source.sha256,
            "data": data.digest,
            "tensors": sorted(looked_at),
            "versions": versions(("onnx", "onnxruntime", "onnxruntime-gpu")),
            "code": store.code_digest(),
        }
        seen = remembered(
            cache,
            identity,
            lambda: observe(model, looked_at, data, binned=binned, progress=progress),
        )
        guard.check_inputs(source.inputs, seen, data)
        return cls(source, graph, chosen, {name: seen[name] for name in tensors}, told)

    @cached_property
    def barred(self) -> frozenset[str]:
        """Tensors that hold masks or infinite values."""
        return frozenset(name for name, histogram in self.seen.items() if histogram.masked)

    def plan(self, nodes: Collection[str]) -> Plan:
        """Where the pairs go for these nodes."""
        return placement.plan(self.graph, nodes, self.preset, barred=self.barred)

    def write(self, variant: Variant, path: Path, *, bare: bool = False) -> Artifact:
        """Write a variant as an ONNX file.

        Raises AnswerIsNo: no compute node is in it; where it may be `bare` of those, no node.
        """
        import onnx

        made = self.plan(variant.nodes)
        if not any(bare or self.graph.nodes[n].op_type in COMPUTE for n in made.nodes):
            raise nothing(account(self.graph, made, {}), self.preset)
        model = qdq.write(self.graph, made, self.grids(made, variant), self.preset)
        onnx.save(model, path)
        return self.source.model_copy(
            update={"path": path, "precision": self.preset.precision, "sha256": "", "history": ()}
        )

    def grids(self, made: Plan, variant: Variant) -> dict[str, Grid]:
        """The grid of each tensor of a plan."""
        levels = self.preset.levels
        return {
            name: levels.fitted(
                *calibrate(self.seen[name], variant.method, levels, percentile=variant.percentile)
            )
            for name in made.tensors
        }

    def facts(self, variant: Variant, why: dict[str, str]) -> Json:
        """What was quantized, what not and why, as far as it is not the graph's own affair."""
        made = self.plan(variant.nodes)
        unfit = {
            name: placement.unfit(self.graph, name, self.barred, self.preset)
            for name in variant.nodes
        }
        if self.preset.activation is None:
            why = why | dict.fromkeys(blocks.relus(self.graph, made.nodes), blocks.AS_MAX)
        grids = self.grids(made, variant)
        largest = {n: max(-self.seen[n].low, self.seen[n].high) for n in made.tensors}
        return {
            **account(self.graph, made, why | {n: w for n, w in unfit.items() if w}),
            "preset": self.preset.model_dump(mode="json"),
            "calibration_method": variant.method if made.tensors else None,
            "prepared": list(self.told),
            "huge_ranges": [name for name, value in largest.items() if value > HUGE],
            "ranges": {name: _bounds(grids[name]) for name in sorted(grids)},
            "share_error": 0.0
            if variant.method in EXACT
            else max((self.seen[n].share_error for n in made.tensors), default=0.0),
        }


def _bounds(grid: Grid) -> list[float]:
    """The smallest and largest value of a grid."""
    lowest, highest = grid.levels.lowest, grid.levels.highest
    return [grid.scale * (level - grid.zero_point) for level in (lowest, highest)]


def nothing(facts: Json, preset: Preset) -> AnswerIsNo:
    """The answer where nothing that computes can be quantized."""
    inside = facts["compute_nodes_in_subgraphs"]
    told = f", {inside} of them in branches or loops" if inside else ""
    return AnswerIsNo(
        f"0 of {facts['multiply_accumulates']:,} multiply-accumulates (0 of "
        f"{facts['compute_nodes']} compute nodes{told}) could be quantized",
        hint="the work of this model lies in operators or subgraphs that stay in float"
        if preset.activation
        else f"weights are quantized to {preset.reason}",
    )
