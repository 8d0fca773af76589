"""What the stages of a model did, as lines to read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from types import MappingProxyType

from deploykit.report.anatomy import share
from deploykit.report.made import choice
from deploykit.values import Json, StageRecord

_REASON = re.compile(r"(?<=: ).*")
"""What is a node's own in the reason that it is given."""


def lines(history: tuple[StageRecord, ...]) -> Iterator[str]:
    """Each stage with what it found out; the whole of it is in the record."""
    for record in history:
        took = f"{record.seconds:.1f} s, deploykit {record.versions.get('deploykit', '?')}"
        yield f"{record.stage} ({took})"
        tell = TOLD.get(record.stage, _nothing)
        yield from (f"  {line}" for line in tell(record.facts))
        yield from (f"  warning: {warning}" for warning in record.facts.get("warnings", ()))


def _nothing(facts: Json) -> Iterator[str]:
    del facts
    yield from ()


def _take(facts: Json) -> Iterator[str]:
    if "parameters" in facts:
        yield f"{facts['parameters']:,} parameters, by the {facts.get('weights', 'factory')}"


def _prune(facts: Json) -> Iterator[str]:
    for key, name in (("parameters", "parameters"), ("macs", "multiply-accumulates")):
        before, after = facts.get(f"{key}_before"), facts.get(f"{key}_after")
        if before and after:
            yield f"{name}: {before:,} to {after:,} ({share(after, before)})"


def _distill(facts: Json) -> Iterator[str]:
    if losses := facts.get("loss_per_epoch"):
        seen = facts.get("samples_seen", 0)
        yield f"{len(losses)} epochs, {seen:,} samples: loss {losses[0]:.4g} to {losses[-1]:.4g}"
    if (agreement := facts.get("engine_agreement_db")) is not None:
        samples = facts["engine_compared_samples"]
        how = " (simulated: this CPU sums 8-bit products in 16 bits)"
        how = how if facts["engine_simulated"] else ""
        yield f"ONNX Runtime gives what was trained: {agreement:.0f} dB on {samples} samples{how}"


def _proven(facts: Json, against: str) -> Iterator[str]:
    off, on = facts.get("largest_relative_difference"), facts.get("verified_on")
    if off is not None and on:
        yield f"within {off:.1e} of {against} on {on}, of each output's largest value"


def _export(facts: Json) -> Iterator[str]:
    yield from _proven(facts, "PyTorch")
    for name, kept in facts.get("dynamic", {}).items():
        refused = kept.get("refused_by_the_model") or ""
        more = f", refused by the model itself: {_listed(refused)}" if refused else ""
        yield f"{name} checked at {_listed(kept.get('checked', []))}{more}"


def _convert(facts: Json) -> Iterator[str]:
    yield from facts.get("prepared", ())
    if "nodes_lowered" in facts:
        done, total = facts["multiply_accumulates_lowered"], facts["multiply_accumulates"]
        yield f"{facts['nodes_lowered']} nodes lowered, {share(done, total)} of the work"
    yield from _left(facts)
    yield from _proven(facts, "its source")


def _left(facts: Json) -> Iterator[str]:
    """How many nodes stayed in float, by the reason."""
    reasons = Counter(_REASON.sub("...", node["reason"]) for node in facts.get("float_nodes", ()))
    if reasons:
        yield "in float: " + ", ".join(f"{n} {why}" for why, n in reasons.most_common())


def _quantize(facts: Json) -> Iterator[str]:
    if "compute_nodes" in facts:
        done, total = facts["multiply_accumulates_quantized"], facts["multiply_accumulates"]
        yield (
            f"{facts['compute_nodes_quantized']} of {facts['compute_nodes']} computing nodes "
            f"quantized, {share(done, total)} of the work"
        )
    if preset := facts.get("preset"):
        yield f"preset {preset['name']}: {preset['reason']}"
    if data := facts.get("calibration_data"):
        method = facts.get("calibration_method") or "weights alone, chosen"
        yield f"{method} on {facts.get('calibration_samples', '?')} samples of {data}"
    if found := facts.get("search"):
        yield ", ".join(choice(facts["candidate"], found))
    yield from _left(facts)
    yield from facts.get("prepared") or ()


def _build(facts: Json) -> Iterator[str]:
    yield f"{facts.get('flavour', 'tensorrt')} {facts.get('flavour_version', '')}".strip()
    if layers := facts.get("compute_layers_by_precision"):
        yield f"computing layers: {', '.join(f'{name} {n}' for name, n in layers.items())}"


def _listed(values: object) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list) else str(values)


TOLD: MappingProxyType[str, Callable[[Json], Iterator[str]]] = MappingProxyType({
    "take": _take, "prune": _prune, "distill": _distill, "export": _export,
    "convert": _convert, "quantize": _quantize, "build": _build,
})  # fmt: skip
