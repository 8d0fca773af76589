"""One float model, prepared and calibrated once, from which quantized variants are cut."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from deploykit import store
from deploykit.dataset import Dataset
from deploykit.environment import versions
from deploykit.errors import AnswerIsNo
from deploykit.formats import onnx_weights
from deploykit.formats.onnx_graph import COMPUTE, Graph
from deploykit.stages.quantize import blocks, guard, placement, qdq
from deploykit.stages.quantize.account import account
from deploykit.stages.quantize.bias import bias_corrected
from deploykit.stages.quantize.calibration import (
    Calibration,
    Progress,
    observe,
    remembered,
    sample_shapes,
)
from deploykit.stages.quantize.channels import Channels, observe_channels
from deploykit.stages.quantize.equalize import cross_layer, smooth
from deploykit.stages.quantize.levels import Grid
from deploykit.stages.quantize.methods import EXACT, Method, Range, calibrate
from deploykit.stages.quantize.placement import Plan
from deploykit.stages.quantize.prepare import TOO_LARGE, prepare
from deploykit.stages.quantize.presets import OPSETS, Preset
from deploykit.stages.quantize.rounding import adaptive
from deploykit.values import Array, Artifact, Json

if TYPE_CHECKING:
    import onnx

HUGE = 1e4
"""A range beyond this leaves almost no levels for ordinary values."""


Correction = Literal[
    "cross_layer_equalization",
    "smooth_quant",
    "smooth_quant_strong",
    "adaptive_rounding",
    "bias_correction",
]
CORRECTIONS: tuple[Correction, ...] = (
    "cross_layer_equalization", "smooth_quant", "smooth_quant_strong", "adaptive_rounding",
    "bias_correction",
)  # fmt: skip
"""In the order in which they are tried: the first make other weights, which the last two mend."""
STRENGTHS: dict[Correction, float] = {"smooth_quant": 0.5, "smooth_quant_strong": 0.7}
"""How far outliers go from the activations over to the weights; one of the two is taken."""
EQUALIZATIONS: tuple[Correction, ...] = ("cross_layer_equalization", *STRENGTHS)


@dataclass(frozen=True)
class Variant:
    """What is quantized, how ranges follow from values, and what makes up for the rounding."""

    nodes: tuple[str, ...]
    method: Method
    percentile: float = 99.99
    corrections: tuple[Correction, ...] = ()

    def with_correction(self, name: Correction) -> Variant:
        """This and one correction more; of two strengths of one, the new one."""
        same = STRENGTHS if name in STRENGTHS else ()
        kept = (c for c in self.corrections if c not in same)
        return replace(self, corrections=(*kept, name))


@dataclass
class Workshop:
    """A prepared graph with the histograms of all tensors that a variant may want."""

    source: Artifact
    graph: Graph
    preset: Preset
    data: Dataset
    look: Callable[[Graph], Calibration]
    """Calibrate a graph of the same function."""
    seen: Calibration
    told: tuple[str, ...]
    """What was done to the graph."""
    others: dict[Correction, Workshop | None] = field(default_factory=dict)
    """The workshops of equalized graphs, once they were asked for; None: nothing to equalize."""
    ranges: dict[tuple[str, Method, float], Range] = field(default_factory=dict)
    """By tensor, method and percentile, as far as they were asked for."""
    rounded: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    """Scale and adaptively rounded weights by node, as far as they were asked for."""

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
        binned = binned or cache is not None

        def look(graph: Graph) -> Calibration:
            widest = placement.plan(graph, placement.chosen(graph, op_types), chosen)
            if not widest.nodes:
                raise nothing(account(graph, widest, {}), chosen)
            tensors = widest.written | set(widest.read) or graph.ends & graph.floats
            return observe(
                graph.model, tensors, data,
                binned=binned, progress=progress, folder=graph.folder,
            )  # fmt: skip

        graph = Graph(model, source.path.parent)
        graph = replace(graph, shapes=sample_shapes(graph, data))
        identity = {
            "model": source.sha256,
            "data": data.digest,
            "op_types": sorted(op_types),
            "preset": chosen.model_dump(mode="json"),
            "versions": versions(("onnx", "onnxruntime", "onnxruntime-gpu")),
            "code": store.code_digest(),
        }
        seen = remembered(cache, identity, lambda: look(graph))
        guard.check_inputs(source.inputs, seen, data)
        return cls(source, graph, chosen, data, look, seen if chosen.activation else {}, told)

    def corrected(self, variant: Variant) -> Workshop:
        """The workshop of the graph that the variant's equalizations make."""
        shop = self
        for name in EQUALIZATIONS:
            if name in variant.corrections:
                shop = shop.equalized(name) or shop
        return shop

    def equalized(self, name: Correction) -> Workshop | None:
        """This with another graph of the same function; None where there is nothing to equalize."""
        if name not in self.others:
            if name == "cross_layer_equalization":
                graph = cross_layer(self.graph)
            else:
                graph = smooth(self.graph, self.channels, STRENGTHS[name])
            self.others[name] = (
                replace(self, graph=graph, seen=self.look(graph), others={}, ranges={}, rounded={})
                if graph
                else None
            )
        return self.others[name]

    @cached_property
    def channels(self) -> Mapping[str, Channels]:
        """What the channels of activations are like."""
        return observe_channels(self.graph, self.data)

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
        shop = self.corrected(variant)
        made = shop.plan(variant.nodes)
        if not any(bare or shop.graph.nodes[n].op_type in COMPUTE for n in made.nodes):
            raise nothing(account(shop.graph, made, {}), self.preset)
        model = shop.cut(made, variant)
        weights = onnx_weights.write(model, path, folder=shop.graph.folder)
        return self.source.model_copy(
            update={
                "path": path, "precision": self.preset.precision, "weights": weights,
                "sha256": "", "history": (),
            }
        )  # fmt: skip

    @property
    def large(self) -> bool:
        """Whether the weights stay in their files: they are not held twice."""
        return TOO_LARGE in self.told

    def cut(self, made: Plan, variant: Variant) -> onnx.ModelProto:
        """The quantized model of a plan on this graph."""
        grids, graph = self.grids(made, variant), self.graph
        if not variant.corrections:
            return qdq.write(graph, made, grids, self.preset)
        scales = qdq.scales(graph, made, grids, self.preset)
        integers = self.rounding(scales) if "adaptive_rounding" in variant.corrections else {}
        if "bias_correction" in variant.corrections:
            errors = qdq.errors(graph, made, scales, integers, self.preset)
            if better := bias_corrected(graph, errors, self.channels):
                graph = better
                made = placement.plan(graph, variant.nodes, self.preset, barred=self.barred)
        return qdq.write(graph, made, grids, self.preset, integers=integers)

    def rounding(self, scales: Mapping[str, Array]) -> dict[str, Array]:
        """Adaptively rounded weights by node; those of equal scale are made once."""
        missing = {
            name: scale
            for name, scale in scales.items()
            if name not in self.rounded or not np.array_equal(self.rounded[name][0], scale)
        }
        made = adaptive(self.graph, missing, self.preset.weight_levels, self.data)
        self.rounded |= {name: (missing[name], integers) for name, integers in made.items()}
        return {name: self.rounded[name][1] for name in scales if name in self.rounded}

    def grids(self, made: Plan, variant: Variant) -> dict[str, Grid]:
        """The grid of each tensor of a plan."""
        levels, how = self.preset.levels, (variant.method, variant.percentile)
        for name in made.tensors:
            if (name, *how) not in self.ranges:
                self.ranges[name, *how] = calibrate(
                    self.seen[name], variant.method, levels, percentile=variant.percentile
                )
        return {name: levels.fitted(*self.ranges[name, *how]) for name in made.tensors}

    def facts(self, variant: Variant, why: dict[str, str]) -> Json:
        """What was quantized, what not and why, as far as it is not the graph's own affair."""
        shop = self.corrected(variant)
        return shop.own_facts(variant, why)

    def own_facts(self, variant: Variant, why: dict[str, str]) -> Json:
        """As `facts`, of a variant of this very graph."""
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
            "corrections": list(variant.corrections),
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
        facts=facts,
    )
