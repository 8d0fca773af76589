"""What a quantization found: facts of the search, doubts about it, a no where it is little."""

from __future__ import annotations

import math
from collections.abc import Mapping

from deploykit.errors import AnswerIsNo
from deploykit.formats.onnx_graph import Graph, matches
from deploykit.metrics import samples_to_settle
from deploykit.stages.quantize import gain, placement
from deploykit.stages.quantize.account import MEASURED
from deploykit.stages.quantize.lab import Lab, Point, pareto
from deploykit.stages.quantize.options import QuantizeOptions
from deploykit.stages.quantize.presets import SCOPES
from deploykit.stages.quantize.workshop import Variant
from deploykit.values import Json

LITTLE = 0.01
"""Share of the multiply-accumulates below which the answer is no."""
FAITHFUL_DB = 20.0
"""Below this (noise a tenth of the signal's amplitude) a result without a promise is warned of."""


def little(facts: Json, options: QuantizeOptions) -> list[str]:
    """A warning where little of the work is quantized and that was not asked for.

    Raises AnswerIsNo: next to nothing is.
    """
    done, total = facts["multiply_accumulates_quantized"], facts["multiply_accumulates"]
    inside, nodes = facts["compute_nodes_in_subgraphs"], facts["compute_nodes"]
    told = f"{done:,} of {total:,} multiply-accumulates"
    told += f", {inside} of {nodes} compute nodes are in branches or loops" if inside else ""
    if not options.partial and done < LITTLE * total:
        raise AnswerIsNo(
            f"{told} could be quantized",
            hint="the work of this model lies in operators that stay in float, such as LSTM",
            facts=facts,
        )
    little = done < total / 2 or 2 * inside > nodes
    return [f"{told}: quantized alone"] if little and not options.partial else []


def doubts(lab: Lab, point: Point, speed: str | None) -> list[str]:
    """What the measurements of the chosen point leave open, or speak against it."""
    told = []
    if not lab.promise and point.sqnr_db < FAITHFUL_DB:
        near = f"the outputs follow the float model's at {point.sqnr_db:.0f} dB only"
        told.append(f"{near}: judge them by --max-drop on evaluation data")
    if lab.promise and lab.float_score and point.drop and point.scored_samples:
        limit = lab.promise.limit(lab.float_score)
        needed = samples_to_settle(point.drop, limit, point.scored_samples)
        if needed > point.scored_samples:
            more = "no number of them" if needed == math.inf else f"about {needed:.1g} samples"
            told.append(
                f"the promise holds on these {point.scored_samples} samples, but the interval of "
                f"the drop reaches over the limit: {more} would settle it"
            )
    if speed == "no difference":
        told.append(f"no difference in speed from the float model on {lab.backend} was measured")
    if speed == "slower":
        shares = lab.where_time_goes(point.artifact)
        goes = ", ".join(f"{share:.0%} {name}" for name, share in shares.items())
        told.append(
            f"NOT FASTER than the float model on {lab.backend}: deploy that one there (of this "
            f"one's time go {goes})"
        )
    return told


def of_search(lab: Lab, point: Point | None, probed: Json, speed: str | None = None) -> Json:
    """The account of a search, and of the point it ended with if there is one."""
    totals = {name: value for name, value in probed.items() if not isinstance(value, dict)}
    return {
        "runtime": lab.backend,
        "simulated": lab.simulate,
        "held_back_samples": len(lab.held),
        "batch_size": lab.batch_size,
        "timed_on_target": speed is not None,
        "speed": speed,
        "candidates": [p.told for p in lab.points],
        "pareto": [p.name for p in pareto(lab.points)],
        "float_score": lab.float_score and lab.float_score.score.value,
        "metric": lab.promise and lab.promise.metric,
        "max_drop": lab.promise and lab.float_score and lab.promise.limit(lab.float_score),
        "chosen": point and point.told,
        "damage": gain.rows(lab, probed),
        "probe": totals or None,
    }


def left_in_float(
    graph: Graph, options: QuantizeOptions, candidates: Mapping[str, Variant], written: Variant
) -> dict[str, str]:
    """Why nodes of the operators that were tried are in float all the same."""
    tried = {name for variant in candidates.values() for name in variant.nodes}
    named = placement.chosen(graph, SCOPES["all"]) if options.keep_float else ()
    left = {n for n in named if any(matches(graph.nodes[n], p) for p in options.keep_float)}
    back = dict.fromkeys(tried - set(written.nodes), MEASURED)
    return back | dict.fromkeys(left, "left out by request")
