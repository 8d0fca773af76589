"""Static quantization to explicit Q/DQ pairs, with real calibration data."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deploykit import store
from deploykit.backends import backend
from deploykit.dataset import Dataset
from deploykit.environment import has_int8_dot_product, is_arm
from deploykit.environment import read as read_environment
from deploykit.errors import AnswerIsNo, InputError, UsageError, did_you_mean
from deploykit.formats import onnx_file, onnx_weights
from deploykit.formats.onnx_graph import Graph
from deploykit.stages.quantize import findings, gain, guard, placement, sound
from deploykit.stages.quantize.lab import Lab, Point, Talk
from deploykit.stages.quantize.methods import EXACT, Method
from deploykit.stages.quantize.options import QuantizeOptions
from deploykit.stages.quantize.prepare import NOT_FOLDED, TOO_LARGE
from deploykit.stages.quantize.presets import OPSETS, SCOPES, Preset, preset
from deploykit.stages.quantize.promise import Promise
from deploykit.stages.quantize.search import damage, search, speed_claim
from deploykit.stages.quantize.workshop import Variant, Workshop
from deploykit.store import Job, Made
from deploykit.values import Artifact, Json

__all__ = ["Preset", "Promise", "QuantizeOptions", "preset", "quantize"]

LIBRARIES = ("onnx", "onnxruntime", "onnxruntime-gpu", "openvino")
HELD_SHARE, HELD_AT_MOST = 4, 32
"""One sample in four or more is held back from calibration to choose on."""
log = logging.getLogger("deploykit")
FEWEST = 8
"""Samples below which nothing is chosen."""
COMMON: Method = "minmax"
"""The method where there is too little data to choose one."""


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
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            order = _Order(source, options, bound, promise, talk or _silent)
            facts = _made(order, Path(folder), path)
        weights = onnx_weights.files(onnx_file.shell(path))
        kept = {path, *(path.with_name(name) for name in weights)}
        for file in set(path.parent.iterdir()) - kept:  # the weights of what was broken
            file.unlink()
        return Made(
            format="onnx",
            precision=chosen.precision,
            inputs=source.inputs,
            outputs=source.outputs,
            weights=weights,
            facts={
                **facts,
                "calibration_data": Path(bound.reference).name,
            },
            preprocessing=bound.preprocessing,
        )

    others = {"calibration": bound.digest, "preset": store.digest_of(chosen.model_dump())}
    if promise:
        others["promise"] = promise.digest
    if options.chooses or promise:
        machine = read_environment().lasting()
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
    guard.check_preprocessing(order.source.preprocessing, order.data)
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
    unlike = guard.compared(order.data, evaluated)
    for warning in unlike:
        log.warning(warning)  # now, not after a search of minutes
    warnings = guard.check_enough(shop.seen, rest) + unlike
    if len(rest) < FEWEST:
        warnings += [f"calibrated on {len(rest)} samples only: give dozens"]
    warnings += [told for told in shop.told if told in (NOT_FOLDED, TOO_LARGE)]
    candidates = _candidates(shop.graph, options, chooses=held is not None)
    found: Json = {}
    if held is None:
        ((name, variant),) = candidates.items()
        variant, broken = sound.checked(shop, variant, order.data, out)
        if judged:
            few = f"{len(rest)} samples are too few to choose on, or to measure damage"
            warnings += [f"{few}: give at least {FEWEST}; {name} was taken unmeasured"]
    else:
        runtime, simulated, elsewhere = _runtime(options)
        warnings += elsewhere
        lab = Lab(shop, runtime, held, order.promise, folder, order.talk, simulated)
        try:
            point, told, doubts = _searched(lab, candidates, options, timed=not elsewhere)
        except AnswerIsNo as no:
            no.facts |= findings.of_search(lab, None, {})
            for warning in warnings:
                no.add_note(warning)
            if unlike:
                no.hint = f"the calibration data may be why: {'; '.join(unlike)} ({no.hint})"
            raise
        name, variant, warnings = point.name, point.variant, warnings + doubts
        found, broken = {"search": told}, lab.broken
        _publish(point.artifact, out)  # what was judged, not made again
    facts = shop.facts(
        variant, findings.left_in_float(shop.graph, options, candidates, variant) | broken
    )
    return {
        **facts,
        "candidate": name,
        "calibration_samples": len(rest),
        "warnings": warnings + findings.little(facts, options),
        "op_types": sorted({shop.graph.nodes[n].op_type for n in variant.nodes}),
        **found,
    }


def _searched(
    lab: Lab, candidates: Mapping[str, Variant], options: QuantizeOptions, *, timed: bool
) -> tuple[Point, Json, list[str]]:
    """The chosen candidate, what was found on the way, and what is to be warned of.

    `timed`: times are the target's own. Raises AnswerIsNo: no candidate will do.
    """
    chooses = (options.chooses or lab.promise) and not lab.shop.large
    point = search(lab, candidates, options.tried_corrections if chooses else ())
    speed = speed_claim(point) if timed else None
    doubts = findings.doubts(lab, point, speed)
    if options.node_damage and not lab.damages:
        damage(lab, point.variant)
    probed = gain.probe(lab, point) if options.node_damage else {}
    return point, findings.of_search(lab, point, probed, speed), doubts


def _publish(artifact: Artifact, out: Path) -> None:
    """Put a candidate where the result is to lie, its weights beside it."""
    if artifact.weights:
        onnx_weights.write(onnx_file.shell(artifact.path), out, folder=artifact.path.parent)
    else:
        shutil.copyfile(artifact.path, out)


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
            graph, op_types, include=options.nodes_to_quantize, exclude=options.keep_float
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


def _runtime(options: QuantizeOptions) -> tuple[str, bool, list[str]]:
    """Where candidates run, whether it is simulated, and a warning where it is not the target."""
    target, here = options.target, "candidates are chosen by their times on this CPU"
    if target == "tensorrt":
        why = "engines are built here, not run"
        return "ort-cpu", True, [f"{why}: scores are simulated, {here}"]
    elsewhere = [here] if options.processor == "arm" and not is_arm() else []
    if options.preset.weight_bits == 8 and not has_int8_dot_product():
        why = "this CPU sums 8-bit products in 16 bits, which overflow"
        return "ort-cpu", True, [f"{why}: scores are simulated, {here}"]
    if reason := backend(target).unavailable():
        elsewhere = [f"scores and times are of ort-cpu, not of {target}: {reason}"]
        return "ort-cpu", False, elsewhere
    return target, False, elsewhere
