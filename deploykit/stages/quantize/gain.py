"""What each node costs, and what leaving nodes in float would give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from deploykit.errors import AnswerIsNo, InputError, UsageError, did_you_mean
from deploykit.formats.onnx_graph import modules, multiply_accumulates
from deploykit.stages.quantize.clock import times, times_of_float
from deploykit.stages.quantize.lab import Lab, Point
from deploykit.stages.quantize.search import PROBED
from deploykit.values import Artifact, Json


def probe(lab: Lab, point: Point) -> Json:
    """Measure the chosen model without each of its nodes in turn, and the time of each node.

    Signal to noise is of the same few held-back samples as the damage of each node, times are
    of one sample and one thread. The float model is the prepared one, whose nodes have names.
    """
    few = lab.held.first(PROBED)
    whole = lab.follow(point.artifact, few)
    without: dict[str, float] = {}
    names = [row.node for row in lab.damages if row.node in point.variant.nodes]
    for number, name in enumerate(names):
        lab.talk("all but each node", number, len(names))
        rest = tuple(n for n in point.variant.nodes if n != name)
        try:
            path = lab.folder / "without.onnx"
            made = lab.shop.write(replace(point.variant, nodes=rest), path, bare=True)
            without[name] = round(lab.follow(made, few).sqnr_db, 2)
        except (AnswerIsNo, InputError):  # nothing is left, or the runtime does not take it
            continue
    before, float_total = times_of_float(lab)
    after, quantized_total = times(lab, point.artifact)
    return {
        "samples": len(few),
        "sqnr_db": round(whole.sqnr_db, 2),
        "cosine": round(whole.cosine, 6),
        "sqnr_db_if_float": without,
        "float_us": before,
        "quantized_us": after,
        "float_us_in_all": float_total,
        "quantized_us_in_all": quantized_total,
    }


def rows(lab: Lab, found: Json) -> list[Json]:
    """What each node does when it alone is quantized, the worst first, and what was probed."""
    macs = multiply_accumulates(lab.shop.graph.model, lab.shop.graph)
    return [
        {
            "node": row.node,
            "operator": lab.shop.graph.nodes[row.node].op_type,
            "modules": list(modules(lab.shop.graph.nodes[row.node])),
            "sqnr_db": round(row.sqnr_db, 2),
            "cosine": round(row.cosine, 6),
            "multiply_accumulates": macs[row.node],
            **{
                key: found.get(key, {}).get(row.node)
                for key in ("sqnr_db_if_float", "float_us", "quantized_us")
            },
        }
        for row in lab.damages
    ]


def probed(artifact: Artifact) -> Json:
    """The facts of a quantized model in which `probe` has told what each node costs.

    Raises InputError: there are none.
    """
    facts = artifact.facts
    if not (facts.get("search") or {}).get("probe"):
        raise InputError(
            f"the record of {artifact.path} does not say what each node costs",
            hint="quantize the float model with --node-damage, on 8 samples or more",
        )
    return facts


def keep_float(facts: Json, patterns: Sequence[str]) -> Json:
    """What a `probed` model would gain with the matching nodes in float.

    Of one node that was measured. Several together were not, and their noises do not add up (a
    tensor stays rounded for its other readers): what the best of them gives alone is told.

    Raises UsageError: a pattern matches no node that was probed.
    """
    whole, damage = facts["search"]["probe"], facts["search"]["damage"]
    for pattern in patterns:
        if not any(_matches(row, pattern) for row in damage):
            names = [name for row in damage for name in (row["node"], *row["modules"])]
            raise UsageError(
                f"no quantized node or module matches {pattern!r}",
                hint=did_you_mean(pattern, names),
            )
    left = {node["node"] for node in facts["float_nodes"]}
    named = [row for row in damage if any(_matches(row, p) for p in patterns)]
    back = [row for row in named if row["node"] not in left]
    measured = [row["sqnr_db_if_float"] for row in back if row["sqnr_db_if_float"] is not None]
    return {
        "patterns": list(patterns),
        "nodes": [row["node"] for row in back],
        "in_float_already": [row["node"] for row in named if row["node"] in left],
        "sqnr_db": whole["sqnr_db"],
        "sqnr_db_if_float": max(measured, default=None),
        "measured": len(back) == 1 and bool(measured),
        "multiply_accumulates": sum(row["multiply_accumulates"] for row in back),
        "multiply_accumulates_quantized": facts["multiply_accumulates_quantized"],
        "extra_us": _extra(back),
        "quantized_us": whole["quantized_us_in_all"],
    }


def _matches(row: Json, pattern: str) -> bool:
    return any(n == pattern or fnmatchcase(n, pattern) for n in (row["node"], *row["modules"]))


def _extra(back: Sequence[Json]) -> float | None:
    """Microseconds more, as far as each node has a time in both models; None where one has not."""
    pairs = [(row["float_us"], row["quantized_us"]) for row in back]
    if not pairs or any(time is None for pair in pairs for time in pair):
        return None
    return round(math.fsum(before - after for before, after in pairs), 1)
