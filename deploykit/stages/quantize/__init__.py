"""Static quantization to explicit Q/DQ pairs, with real calibration data."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from pydantic import Field

from deploykit import store
from deploykit.backends import backend
from deploykit.dataset import Dataset
from deploykit.environment import read as read_environment
from deploykit.errors import InputError, UsageError, did_you_mean
from deploykit.stages.quantize import guard, placement, sound
from deploykit.stages.quantize.graph import Graph
from deploykit.stages.quantize.lab import Lab, Point, Promise, Talk, pareto
from deploykit.stages.quantize.methods import EXACT, Method
from deploykit.stages.quantize.presets import (
    OPSETS,
    SCOPES,
    Preset,
    Quantized,
    Scope,
    Target,
    preset,
)
from deploykit.stages.quantize.search import damage, search
from deploykit.stages.quantize.workshop import Variant, Workshop
from deploykit.store import Job, Made
from deploykit.values import Artifact, Json, Value

__all__ = ["Preset", "Promise", "QuantizeOptions", "preset", "quantize"]

LIBRARIES = ("onnx", "onnxruntime", "onnxruntime-gpu", "openvino")
HELD_SHARE, HELD_AT_MOST = 4, 32
"""One sample in four or more is held back from calibration to choose on."""
FEWEST = 8
"""Samples below which nothing is chosen."""
COMMON: Method = "minmax"
"""The method where there is too little data to choose one."""


class QuantizeOptions(Value):
    """How to quantize."""

    target: Target = Field(
        default="ort-cpu", description="the runtime that the quantized file is for"
    )
    precision: Quantized = Field(
        default="int8",
        description="int8; fp8 (E4M3, tensorrt only); or int4, the large weights of MatMul and "
        "Gemm alone. There is no 16-bit kind: no target computes with 16-bit integers",
    )
    processor: Literal["this", "vnni", "any"] = Field(
        default="this",
        description="the CPU that will serve: like this one, one that sums 8-bit products in 32 "
        "bits (vnni), or any, at the price of 7-bit weights",
    )
    scope: Scope | Literal["auto"] = Field(
        default="auto",
        description="operators to quantize: compute (convolutions and matrix products), residual "
        "(and what joins them), all (and element-wise functions), or auto: by measurement",
    )
    op_types_to_quantize: tuple[str, ...] = Field(
        default=(), description="operator types to quantize, in place of a scope"
    )
    nodes_to_quantize: tuple[str, ...] = Field(
        default=(), description="patterns of node names to quantize; by default all in scope"
    )
    nodes_to_exclude: tuple[str, ...] = Field(
        default=(), description="patterns of node names to leave in float"
    )
    calibration_method: Method | Literal["auto"] = Field(
        default="auto",
        description="how an activation's range follows from its values; auto: by measurement",
    )
    percentile: float = Field(
        default=99.99, gt=50, le=100, description="percent of the values kept by percentile"
    )
    calibration_samples: int = Field(
        default=0, ge=0, description="use the first N samples of the calibration data; 0 for all"
    )

    node_damage: bool = Field(
        default=False,
        description="measure what quantizing each node alone does to the outputs, for the record",
    )
    calibration_cache: str = Field(
        default="",
        description="file that keeps what was seen of the tensors, for the next time with the same "
        "model, data and versions",
    )

    @property
    def preset(self) -> Preset:
        """Types and places of the pairs."""
        wide = {"this": None, "vnni": True, "any": False}[self.processor]
        return preset(self.target, self.precision, int8_dot_product=wide)

    @property
    def scopes(self) -> dict[str, tuple[str, ...]]:
        """The sets of operator types to try, by name."""
        if self.op_types_to_quantize:
            return {"chosen": self.op_types_to_quantize}
        if self.scope != "auto":
            return {self.scope: SCOPES[self.scope]}
        return {name: SCOPES[name] for name in self.preset.scopes}

    @property
    def methods(self) -> tuple[Method, ...]:
        """The calibration methods to try. Raises UsageError: one that does not fit."""
        fitting = self.preset.methods
        if self.calibration_method == "auto":
            return fitting
        if self.calibration_method not in fitting:
            raise UsageError(
                f"{self.calibration_method} is no calibration method for {self.precision}",
                hint=f"take auto, or of {', '.join(fitting)}",
            )
        return (self.calibration_method,)

    @property
    def chooses(self) -> bool:
        """Whether something is left to choose by measurement."""
        return len(self.scopes) * len(self.methods) > 1


def quantize(  # noqa: PLR0913 - what goes in, what comes out, how, and who listens
    source: Artifact,
    options: QuantizeOptions,
    *,
    data: Dataset,
    out: Path,
    promise: Promise | None = None,
    force: bool = False,
    talk: Talk | None = None,
) -> Artifact:
    """Calibrate on `data` and write a quantized model with explicit Q/DQ pairs.

    Activations are quantized per tensor, weights per channel, as the target's preset says; with
    int4 weights alone, in blocks. Where the options leave a choice, or a promise must hold, it is
    made by measurement (`search`).

    Raises InputError: the data does not fit, or a tensor is NaN on it. UsageError: the target does
    not take the precision. StageError: no result loads. AnswerIsNo: nothing that computes could be
    quantized, or no candidate keeps the promise.
    """
    if source.format != "onnx":
        raise InputError(
            f"{source.path} is {source.format}, quantize takes an ONNX model",
            hint="export it first",
        )
    if source.precision in OPSETS:
        raise InputError(f"{source.path} is quantized already", hint="give the float model")
    bound = data.matching(source.inputs)
    if options.calibration_samples:
        bound = bound.first(options.calibration_samples)
    if promise and len(bound) < FEWEST:
        raise InputError(
            f"{bound.reference} has {len(bound)} samples, too few to choose on",
            hint=f"give at least {FEWEST} samples",
        )
    chosen = options.preset

    def work(path: Path) -> Made:
        with tempfile.TemporaryDirectory() as folder:
            order = _Order(source, options, bound, promise, talk or _silent)
            facts = _made(order, Path(folder), path)
        return Made(
            format="onnx",
            precision=chosen.precision,
            inputs=source.inputs,
            outputs=source.outputs,
            facts={
                **facts,
                "calibration_samples": len(bound),
                "calibration_data": Path(bound.reference).name,
            },
            preprocessing=bound.preprocessing,
        )

    others = {"calibration": bound.digest, "preset": store.digest_of(chosen.model_dump())}
    if promise:
        others["promise"] = promise.digest
    if options.chooses or promise:
        machine = read_environment().model_dump(mode="json", exclude={"load_average"})
        others["machine"] = store.digest_of(machine)  # what is chosen by timing is chosen for it
    job = Job(stage="quantize", source=source, options=options, others=others, libraries=LIBRARIES)
    return store.produce(job, work, out=out, force=force)


def _silent(text: str, done: int, total: int) -> None:
    del text, done, total


@dataclass(frozen=True)
class _Order:
    """What was asked for."""

    source: Artifact
    options: QuantizeOptions
    data: Dataset
    promise: Promise | None
    talk: Talk


def _made(order: _Order, folder: Path, out: Path) -> Json:
    """Write the model at `out`; the facts of it."""
    options = order.options
    _check_op_types(options.op_types_to_quantize)
    evaluated = order.promise.data.matching(order.source.inputs) if order.promise else None
    guard.check_samples(order.data, evaluated)
    judged = (
        options.chooses or options.node_damage or order.promise or not options.preset.activation
    )
    rest, held = _held_back(order.data) if judged else (order.data, None)
    shop = Workshop.open(
        order.source,
        options.preset,
        rest,
        op_types={name for op_types in options.scopes.values() for name in op_types},
        binned=bool({*options.methods} - EXACT),
        cache=Path(options.calibration_cache) if options.calibration_cache else None,
        progress=lambda done, total: order.talk("calibrate", done, total),
    )
    warnings = guard.check_enough(shop.seen, rest) + guard.compared(order.data, evaluated)
    candidates = _candidates(shop.graph, options, chooses=held is not None)
    found: Json = {}
    known: dict[str, str] = {}
    if held is None:
        ((name, variant),) = candidates.items()
    else:
        runtime, elsewhere = _runtime(options.target)
        warnings += elsewhere
        lab = Lab(shop, runtime, held, order.promise, folder, order.talk)
        point = search(lab, candidates)
        name, variant = point.name, point.variant
        if options.node_damage and not lab.damages:
            damage(lab, variant)
        found, known = {"search": _found(lab, point)}, lab.broken
    written, broken = sound.checked(shop, variant, order.data, out)
    return {
        **shop.facts(written, _why(shop.graph, options, candidates, written) | known | broken),
        "candidate": name,
        "warnings": warnings,
        "op_types": sorted({shop.graph.nodes[n].op_type for n in written.nodes}),
        **found,
    }


def _found(lab: Lab, point: Point) -> Json:
    """The account of a search."""
    return {
        "runtime": lab.backend,
        "held_back_samples": len(lab.held),
        "candidates": [p.told for p in lab.points],
        "pareto": [p.name for p in pareto(lab.points)],
        "float_score": lab.float_score and lab.float_score.score.value,
        "chosen": point.told,
        "damage": _damage(lab, point),
    }


def _damage(lab: Lab, point: Point) -> list[Json]:
    """What each node alone does, the worst first, and what leaving it in float would give.

    The prediction takes the noises of the nodes for independent: the node's own is subtracted.
    """
    whole = 10 ** (-point.sqnr_db / 10)
    return [
        {
            "node": row.node,
            "operator": lab.shop.graph.nodes[row.node].op_type,
            "sqnr_db": round(row.sqnr_db, 2),
            "multiply_accumulates": row.work,
            "sqnr_db_if_float": round(
                -10 * math.log10(max(whole - 10 ** (-row.sqnr_db / 10), whole / 100)), 2
            ),
        }
        for row in lab.damages
    ]


def _why(
    graph: Graph, options: QuantizeOptions, candidates: Mapping[str, Variant], written: Variant
) -> dict[str, str]:
    """Why nodes of the operators that were tried are in float all the same."""
    tried = {name for variant in candidates.values() for name in variant.nodes}
    named = placement.chosen(graph, SCOPES["all"]) if options.nodes_to_exclude else ()
    left = {name for name in named if any(fnmatchcase(name, p) for p in options.nodes_to_exclude)}
    back = dict.fromkeys(tried - set(written.nodes), "in float by measurement")
    return back | dict.fromkeys(left, "left out by request")


def _held_back(data: Dataset) -> tuple[Dataset, Dataset | None]:
    """The samples to calibrate on, and those to choose on; None where there are too few."""
    if len(data) < FEWEST:
        return data, None
    return data.split(max(HELD_SHARE, len(data) // HELD_AT_MOST))


def _candidates(graph: Graph, options: QuantizeOptions, *, chooses: bool) -> dict[str, Variant]:
    """Variants by name; scopes that come to the same nodes are tried once."""
    scopes, methods = options.scopes, options.methods
    if not chooses:
        standard = options.preset.scope
        name = standard if len(scopes) > 1 else next(iter(scopes))
        scopes = {name: scopes[name]}
        methods = methods if len(methods) == 1 else (COMMON,)
    found: dict[str, Variant] = {}
    taken: set[tuple[str, ...]] = set()
    for name, op_types in scopes.items():
        nodes = placement.chosen(
            graph, op_types, include=options.nodes_to_quantize, exclude=options.nodes_to_exclude
        )
        if nodes not in taken:
            taken.add(nodes)
            for method in methods:
                label = method if options.preset.activation else options.precision
                found[f"{name}-{label}"] = Variant(nodes, method, options.percentile)
    return found


def _check_op_types(asked: tuple[str, ...]) -> None:
    known = SCOPES["all"]
    for name in asked:
        if name not in known:
            raise UsageError(
                f"operator type {name!r} cannot be quantized", hint=did_you_mean(name, known)
            )


def _runtime(target: Target) -> tuple[str, list[str]]:
    """The backend on which candidates run, and a warning where it is not the target's own."""
    if target == "tensorrt":
        reason: str | None = "engines are built here, not run"
    else:
        reason = backend(target).unavailable()
    if reason is None:
        return target, []
    return "ort-cpu", [f"scores and times are of ort-cpu, not of {target}: {reason}"]
