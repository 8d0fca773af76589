"""Choose by measurement: which operators, which calibration method, and what stays in float.

Every candidate is a file that the target's runtime loads, runs and times. Two ways to decide:

- With a promise (a metric, data and the drop allowed): the fastest candidate that keeps it, as
  scored on the evaluation data. The nodes that cost most accuracy for the work they save go back to
  float where that makes a faster one keep it (mixed precision).
- Without: the fastest of the candidates whose outputs follow the float model's within NEAR_DB of
  the best, on samples held back from calibration.

Corrections are tried on what would be taken, or on what fails to keep the promise; each stays only
where it helps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from deploykit.errors import AnswerIsNo, InputError
from deploykit.formats.onnx_graph import multiply_accumulates
from deploykit.stages.quantize import clock
from deploykit.stages.quantize.lab import Damage, Lab, Point, pareto
from deploykit.stages.quantize.workshop import STRENGTHS, Correction, Variant

NEAR_DB, LEAST_DB = 1.0, 0.2
SAME_TIME = 0.03
"""Times this near each other count as equal."""
HOPELESS_DB = 10.0
"""A method this far below the best of its operators is not scored."""
PROBED = 8
"""Samples on which the damage of each node is measured."""


def search(
    lab: Lab, candidates: Mapping[str, Variant], corrections: Sequence[Correction] = ()
) -> Point:
    """The best of the candidates, or one that is corrected or has fewer nodes quantized.

    Names are "operators-method"; candidates that quantize the same nodes take the same time.
    Raises AnswerIsNo: no candidate keeps the promise.
    """
    points: list[Point] = []
    for number, (name, variant) in enumerate(candidates.items()):
        lab.talk(f"try {name}", number, len(candidates))
        if point := lab.try_out(name, variant):
            points.append(point)
    if not points:
        raise AnswerIsNo(
            "every quantized candidate gives NaN", hint="leave nodes in float with --keep-float"
        )
    groups = _by_speed(lab, points)
    if lab.promise is None:
        return _mended(lab, _nearest(groups), corrections)
    return _keeping(lab, groups, corrections)


def _by_speed(lab: Lab, points: Sequence[Point]) -> list[list[Point]]:
    """The points in groups of equal nodes, fastest group first, the most faithful point first."""
    groups: dict[tuple[str, ...], list[Point]] = {}
    for point in sorted(points, key=lambda p: -p.sqnr_db):
        groups.setdefault(point.variant.nodes, []).append(point)
    lab.talk("time the candidates", 0, 1)
    timed = lab.timed([group[0] for group in groups.values()])
    result = [
        [lab.know(_timed_as(point, first)) for point in group]
        for first, group in zip(timed, groups.values(), strict=True)
    ]
    return sorted(result, key=lambda group: group[0].time_ratio or 1.0)


def _timed_as(point: Point, other: Point) -> Point:
    """The point with the time of another, which has the same nodes."""
    return replace(
        point,
        time_ratio=other.time_ratio,
        time_bounds=other.time_bounds,
        times_ms=other.times_ms,
        timed_as=other.timed_as,
    )


def speed_claim(point: Point) -> Literal["faster", "slower", "no difference"]:
    """What may be said of a timed point beside the float model.

    Its interval is of one process, and another may differ by SAME_TIME.
    """
    assert point.time_ratio and point.time_bounds  # noqa: S101, PT018
    low, high = point.time_bounds
    if high < 1 and point.time_ratio < 1 - SAME_TIME:
        return "faster"
    return "slower" if low > 1 and point.time_ratio > 1 + SAME_TIME else "no difference"


def _nearest(groups: Sequence[Sequence[Point]]) -> Point:
    """The fastest of the most faithful; of the equally fast the most faithful."""
    best = max(group[0].sqnr_db for group in groups)
    good = [group[0] for group in groups if group[0].sqnr_db >= best - NEAR_DB]
    fastest = min(point.time_ratio or 1.0 for point in good)
    same = [point for point in good if (point.time_ratio or 1.0) <= fastest * (1 + SAME_TIME)]
    return max(same, key=lambda point: point.sqnr_db)


def _mended(lab: Lab, point: Point, corrections: Sequence[Correction]) -> Point:
    """The point with the corrections that help it, tried one upon the other.

    One helps if less score is lost; without a promise, if the outputs follow the float model's
    better by LEAST_DB. One that slows the model down has to give NEAR_DB.
    """
    best = point
    for correction in corrections:
        if lab.promise and lab.keeps(best):
            break
        lab.talk(f"try {correction}", 0, 1)
        variant = best.variant.with_correction(correction)
        tried = lab.try_out("+".join([point.name, *variant.corrections]), variant)
        if tried is None:
            continue
        tried = lab.know(_timed_as(tried, best))
        if lab.promise:
            tried = lab.scored(tried)
        if not _helps(tried, best, LEAST_DB):
            continue
        if correction in STRENGTHS:  # it may have put nodes of its own into the graph
            before, tried = lab.timed([best, tried])
            if _clearly_faster(before, tried) and not _helps(tried, before, NEAR_DB):
                continue
        best = tried
    return best


def _helps(one: Point, other: Point, least_db: float) -> bool:
    """Whether a point loses less than the other."""
    if one.drop and other.drop:
        return one.drop.value < other.drop.value
    return one.sqnr_db > other.sqnr_db + least_db


def _keeping(
    lab: Lab, groups: Sequence[Sequence[Point]], corrections: Sequence[Correction]
) -> Point:
    """The fastest point that keeps the promise, corrected and mixed ones among them."""
    failed: list[Point] = []
    kept: Point | None = None
    for group in groups:
        hopeful = [p for p in group if p.sqnr_db >= group[0].sqnr_db - HOPELESS_DB]
        scored: list[Point] = []
        for point in hopeful:
            lab.talk(f"score {point.name}", 0, 1)
            scored.append(lab.scored(point))
            if lab.keeps(scored[-1]):
                kept = scored[-1]
                break
        if kept:
            break
        nearest = min(scored, key=lambda p: p.drop.value if p.drop else math.inf)
        nearest = _mended(lab, nearest, corrections)
        if lab.keeps(nearest):
            kept = nearest
            break
        failed.append(nearest)
    if failed and (kept is None or _clearly_faster(failed[0], kept)):
        mixed = _mixed(lab, failed[0])
        if mixed and kept:
            mixed, kept = lab.timed([mixed, kept])
            kept = min(mixed, kept, key=lambda p: p.time_ratio or 1.0)
        kept = kept or mixed
    if kept is None:
        raise _broken(lab)
    return kept


def _clearly_faster(one: Point, other: Point) -> bool:
    return (one.time_ratio or 1.0) < (other.time_ratio or 1.0) * (1 - SAME_TIME)


def _mixed(lab: Lab, start: Point) -> Point | None:
    """The fewest nodes back in float that make the promise hold, worst trade first."""
    ranking = damage(lab, start.variant)
    worth = _worth(ranking, _saved(lab, start))
    worst = [row.node for row in sorted(ranking, key=lambda row: -row.noise / worth[row.node])]

    def without(count: int) -> Point | None:
        gone = set(worst[:count])
        nodes = tuple(name for name in start.variant.nodes if name not in gone)
        lab.talk(f"score with {count} nodes in float", 0, 1)
        try:
            point = lab.try_out(f"{start.name}+{count}_float", replace(start.variant, nodes=nodes))
        except AnswerIsNo:
            return None
        if point is None:
            return None
        point = lab.scored(point)
        return point if lab.keeps(point) else None

    most = len(worst) - 1  # with all of them in float it is no INT8 model
    low, high = 0, min(1, most)
    found = without(high) if high else None
    while found is None and high < most:
        low, high = high, min(2 * high, most)
        found = without(high)
    while found is not None and high - low > max(1, high // 16):
        middle = (low + high) // 2
        if better := without(middle):
            found, high = better, middle
        else:
            low = middle
    if found is None:
        return None
    return lab.timed([found])[0]


def _saved(lab: Lab, point: Point) -> dict[str, float]:
    """Microseconds that each node takes less than in float, for those with a time of their own."""
    before, after = clock.times_of_float(lab)[0], clock.times(lab, point.artifact)[0]
    return {name: before[name] - after[name] for name in before if name in after}


def _worth(ranking: Sequence[Damage], saved: Mapping[str, float]) -> dict[str, float]:
    """What integers save in each node: time, or where it has none of its own, its share by work.

    What saves next to nothing, or is slower, goes for a twentieth of the mean. Where integers save
    no time here at all, work alone counts.
    """
    known = {row.node: saved[row.node] for row in ranking if row.node in saved}
    work = sum(row.work for row in ranking if row.node in known)
    total = sum(known.values())
    if total <= 0:
        return {row.node: float(row.work) for row in ranking}
    least = total / len(known) / 20
    return {r.node: max(known.get(r.node, r.work * total / work), least) for r in ranking}


def damage(lab: Lab, variant: Variant) -> list[Damage]:
    """Quantize each node alone, and see how the outputs follow on a few held-back samples."""
    macs = multiply_accumulates(lab.shop.graph.model, lab.shop.graph)
    least = max(min((m for m in macs.values() if m), default=1) // 4, 1)
    few = lab.held.first(PROBED)
    found = []
    for number, node in enumerate(variant.nodes):
        lab.talk("damage of each node", number, len(variant.nodes))
        alone = replace(variant, nodes=(node,))
        try:
            artifact = lab.shop.write(alone, lab.folder / "alone.onnx", bare=True)
            like = lab.follow(artifact, few)
        except (AnswerIsNo, InputError):  # it does not compute, or the runtime does not take it
            continue
        found.append(Damage(node, like.sqnr_db, macs[node] or least, like.cosine))
    lab.damages = sorted(found, key=lambda row: row.sqnr_db)
    return found


def _broken(lab: Lab) -> AnswerIsNo:
    assert lab.promise and lab.float_score  # noqa: S101, PT018
    nearest = min(
        (p for p in lab.points if p.drop), key=lambda p: p.drop.value if p.drop else math.inf
    )
    assert nearest.drop  # noqa: S101
    seen = "; ".join(
        f"{p.name}: loses {p.drop.value:.2g}"
        + (f", {1 / p.time_ratio:.2f}x as fast as in float" if p.time_ratio else "")
        for p in pareto(lab.points)
        if p.drop
    )
    limit = lab.promise.limit(lab.float_score)
    return AnswerIsNo(
        f"no {lab.shop.preset.precision.upper()} model keeps {lab.promise.metric} within "
        f"{limit:.2g} of {lab.float_score.score.value:.4g}; the nearest is {nearest.name}, "
        f"which loses {nearest.drop.value:.2g}",
        hint=f"allow more with --max-drop, or deploy the float model; the best of what was tried: "
        f"{seen}",
        facts={"nearest": nearest.told},
    )
