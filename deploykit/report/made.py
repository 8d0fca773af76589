"""What a stage made, in words."""

from __future__ import annotations

from collections.abc import Sequence

from deploykit import _files
from deploykit.report.summary import size
from deploykit.stages.quantize.account import MEASURED
from deploykit.values import Artifact, Json


def describe(artifact: Artifact) -> str:
    """What a stage made, in one line, and one more for each warning."""
    facts = artifact.facts
    told = [artifact.precision, size(sum(map(_files.size_bytes, artifact.files)))]
    for key, text in (
        ("parameters_after", "{:,} parameters"),
        ("compute_nodes_quantized", "{} of {compute_nodes} compute nodes quantized"),
        ("largest_relative_difference", "differs from its source by {:.0e} of the largest output"),
    ):
        if key in facts:
            told.append(text.format(facts[key], **facts))
    total, quantized = (
        facts.get(f"multiply_accumulates{end}") for end in ("", "_quantized")
    )  # convert has the one without the other
    if total and quantized is not None:
        share = quantized / total
        told[-1] += f" with {share:.0%} of the multiply-accumulates"
    back = [n["node"] for n in facts.get("float_nodes", ()) if n["reason"] == MEASURED]
    if back:
        told.append(f"in float by measurement: {', '.join(back[:3])}{', ...' * (len(back) > 3)}")
    if found := facts.get("search"):
        told += choice(facts["candidate"], found)
    elif "candidate" in facts:
        told += [facts["candidate"], "score and speed not measured"]
    warnings = list(facts.get("warnings", ()))
    if huge := facts.get("huge_ranges"):
        warnings.append(f"{len(huge)} tensors with huge ranges ({huge[0]!r}): few levels are left")
    return "\n".join([", ".join(told), *(f"  warning: {warning}" for warning in warnings)])


def choice(name: str, found: Json) -> list[str]:
    """What was chosen, how near to the float model it is, and how fast where it will run."""
    noise = found["chosen"]["sqnr_db"]
    near = "equal to the float model" if noise is None else f"{noise:.0f} dB to the float model"
    told = [name, f"{near} on {found['held_back_samples']} samples", *_kept(found)]
    timed = found.get("timed_on_target")  # None in a record of an older deploykit
    if not timed:
        return told if timed is None else [*told, "not timed where it will run"]
    ratio = found["chosen"]["time_ratio"]
    low, high = (1 / bound for bound in reversed(found["chosen"]["time_ratio_95"]))
    before, after = (_ms(found["chosen"][key]) for key in ("float_ms", "ms"))
    how = f"{after} ms, was {before} ms, batch {found['batch_size']}, one thread"
    speed = f"{1 / ratio:.2f}x [{low:.2f}, {high:.2f}] as fast as the float model"
    return [*told, f"{speed} on {found['runtime']} ({how})"]


def _ms(time: float) -> str:
    return f"{time:.3g}" if time < 100 else f"{time:.0f}"


def _kept(found: Json) -> list[str]:
    """The promise and what became of it, where there was one."""
    chosen, float_score = found["chosen"], found["float_score"]
    if chosen["drop"] is None:
        return []
    allowed = found["max_drop"]
    value, bounds = chosen["drop"], chosen.get("drop_95")  # not in an older record
    lost = f"{value:.2g}{_bracketed(bounds)} lost of {allowed:.2g} allowed"
    if value < 0:
        bounds = bounds and [-bound for bound in reversed(bounds)]
        lost = f"{-value:.2g}{_bracketed(bounds)} gained, {allowed:.2g} may be lost,"
    where = f"on {chosen['scored_samples']} samples"
    return [f"{found['metric']} {chosen['score']:.4g}, was {float_score:.4g}: {lost} {where}"]


def _bracketed(bounds: Sequence[float] | None) -> str:
    return f" [{bounds[0]:.2g}, {bounds[1]:.2g}]" if bounds else ""
