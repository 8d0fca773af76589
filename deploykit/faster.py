"""Prune until the whole network is as fast as was asked for, measured, or say how near it came.

The stages do their part (widths by a table of layer latencies, export, quantization); here the
network is timed beside the unpruned one in the same precision, and the widths are sought again
where the table was wrong.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from deploykit.dataset import Dataset
from deploykit.errors import AnswerIsNo, InputError, UsageError
from deploykit.measure import BenchOptions, Candidate, bench, statistics
from deploykit.stages.export import ExportOptions, export
from deploykit.stages.prune import PruneOptions, prune
from deploykit.stages.quantize import QuantizeOptions, quantize
from deploykit.values import Artifact, Interval, Value

ATTEMPTS = 4
MARGIN = 1.01
"""Ask the table for a little more than is missing: the bound of the interval counts."""

Progress = Callable[[int, int, str], None]
"""Called with attempts done, the most there are, and what is done now."""


class Attempt(Value):
    """One set of widths: what the table promised and what was measured."""

    asked: float
    speedup: Interval


def prune_until_faster(
    source: Artifact,
    options: PruneOptions,
    *,
    out: Path,
    data: Dataset | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> tuple[Artifact, Attempt]:
    """Prune to the speed-up of `options`, proven on the target in the precision to be deployed.

    Returns the pruned model and its measurement; the lower bound of the interval is at least what
    was asked for. Weights are not trained here, so nothing is said of the score. Raises AnswerIsNo:
    no attempt got there; the nearest is told and nothing is written. UsageError: int8 and no data
    to calibrate with. MissingError: the target does not run here.
    """
    wanted, tell = options.speedup, progress or _silent
    if wanted is None:
        raise UsageError("no speed-up is asked for", hint="give --speedup 2x, or use --ratio")
    if options.precision == "int8" and data is None:
        raise UsageError("int8 is calibrated on data, and there is none", hint="give --data")
    asked, attempts = wanted, list[Attempt]()
    with tempfile.TemporaryDirectory(prefix="deploykit-faster-") as name:
        folder = Path(name)
        baseline = _deployed(source, options, data, folder / "unpruned")
        for number in range(ATTEMPTS):
            tell(number, ATTEMPTS, f"widths for {asked:.2f}x by the table")
            trial = options.model_copy(update={"speedup": asked})
            try:
                pruned = prune(source, trial, out=folder / f"pruned-{number}", data=data)
            except AnswerIsNo:
                if attempts:
                    break
                raise
            tell(number, ATTEMPTS, "exported and timed")
            made = _deployed(pruned, options, data, folder / f"deployed-{number}")
            attempts.append(Attempt(asked=asked, speedup=_timed(baseline, made, options, data)))
            if attempts[-1].speedup.low >= wanted:
                return prune(source, trial, out=out, data=data, force=force), attempts[-1]
            asked *= wanted / attempts[-1].speedup.low * MARGIN
    raise _not_reached(wanted, attempts, options)


def _deployed(model: Artifact, options: PruneOptions, data: Dataset | None, path: Path) -> Artifact:
    """The model as it would be served: exported, and quantized where that was asked for."""
    plain = export(model, ExportOptions(), out=path.with_suffix(".fp32.onnx"), data=data)
    if options.precision == "fp32":
        return plain
    assert data is not None  # noqa: S101 - checked above
    how = QuantizeOptions(
        target=options.target,
        scope="residual",
        calibration_method="minmax",
        corrections=("none",),
    )
    return quantize(plain, how, data=data, out=path.with_suffix(".int8.onnx"))


def _timed(
    baseline: Artifact, candidate: Artifact, options: PruneOptions, data: Dataset | None
) -> Interval:
    """The measured speed-up of one over the other. Raises InputError: it could not be measured."""
    pair = (
        Candidate(name="unpruned", artifact=baseline, backend=options.target),
        Candidate(name="pruned", artifact=candidate, backend=options.target, family="pruned"),
    )
    how = BenchOptions(preset="quick", threads=options.threads)
    one, other = bench(pair, how, data=data).measurements[:2]
    for measured in (one, other):
        if measured.invalid:
            raise InputError(
                f"the {measured.name} model could not be timed: {measured.invalid}",
                hint="`deploykit bench` shows more",
            )
    return statistics.speedup(one, other)


def _not_reached(wanted: float, attempts: list[Attempt], options: PruneOptions) -> AnswerIsNo:
    best = max(attempts, key=lambda a: a.speedup.low)
    found = best.speedup
    return AnswerIsNo(
        f"{wanted:.2f}x on {options.target} in {options.precision} was not reached: the nearest is "
        f"{found.value:.2f}x [{found.low:.2f}, {found.high:.2f}] after {len(attempts)} attempts",
        hint=f"`--speedup {found.low:.2f}x` is within reach; or loosen --keep",
    )


def _silent(done: int, total: int, text: str) -> None:
    del done, total, text
