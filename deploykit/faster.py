"""Prune until the whole network is as fast as was asked for, measured, or say how near it came.

The stages do their part (widths by a table of layer latencies, export, quantization); here the
network is timed beside the unpruned one in the same precision, and other widths are sought where
the table was wrong.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from deploykit import _files, environment, store
from deploykit.dataset import Dataset
from deploykit.errors import AnswerIsNo, InputError, UsageError
from deploykit.measure import BenchOptions, Candidate, bench, statistics
from deploykit.stages.export import ExportOptions, export
from deploykit.stages.prune import LIBRARIES, PruneOptions, prune
from deploykit.stages.quantize import QuantizeOptions, quantize
from deploykit.store import Job, Made
from deploykit.values import Artifact, Interval, Value

ATTEMPTS = 5
NEAR = 1.08
"""Faster than asked for by this much is more channels gone than need be: try others."""
MARGIN = 1.02
"""Ask the table for a little more than is missing: the bound of the interval counts."""

Progress = Callable[[int, int, str], None]
"""Called with attempts done, the most there are, and what is done now."""


class Attempt(Value):
    """One set of widths: what was asked of the table and what was measured."""

    model: Artifact
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
) -> Artifact:
    """Prune to the speed-up of `options`, proven on the target in the precision to be deployed.

    The lower bound of the measured interval is at least what was asked for. Weights are not trained
    here, so nothing is said of the score. Raises AnswerIsNo: no attempt got there; the nearest is
    told and nothing is written. UsageError: int8 and no data to calibrate with. MissingError: the
    target does not run here.
    """
    if options.speedup is None:
        raise UsageError("no speed-up is asked for", hint="give --speedup 2x, or use --ratio")
    if options.precision == "int8" and data is None:
        raise UsageError("int8 is calibrated on data, and there is none", hint="give --data")

    def work(folder: Path) -> Made:
        with _files.scratch() as scratch:
            trial = _Trial(source, options, data, scratch)
            found = trial.settle(options.speedup or 1.0, progress or _silent)
            model = found.model
            shutil.copytree(model.path, folder, ignore=shutil.ignore_patterns(store.FOLDER_RECORD))
            speed = found.speedup.model_dump(mode="json")
            return Made(
                format=model.format,
                precision=model.precision,
                inputs=model.inputs,
                outputs=model.outputs,
                facts={
                    **model.history[-1].facts,
                    "speedup_measured": speed,
                    "attempts": len(trial.attempts),
                },
            )

    machine = environment.read().lasting()
    others = {"data": data.digest} if data else {}
    others["machine"] = store.digest_of(machine)  # times are not those of another one
    libraries = (*LIBRARIES, "onnxruntime", "openvino")
    job = Job(stage="prune", source=source, options=options, others=others, libraries=libraries)
    return store.produce(job, work, out=out, force=force)


class _Trial:
    """Widths tried in a folder, each timed beside the unpruned model."""

    def __init__(
        self, source: Artifact, options: PruneOptions, data: Dataset | None, folder: Path
    ) -> None:
        self._source, self._options, self._data, self._folder = source, options, data, folder
        self.attempts: list[Attempt] = []

    def settle(self, wanted: float, tell: Progress) -> Attempt:
        """The slowest of the attempts that are fast enough. Raises AnswerIsNo: none is."""
        tell(0, ATTEMPTS, "the unpruned model")
        baseline = self._deployed(self._source, "unpruned")
        asked = wanted
        for number in range(ATTEMPTS):
            tell(number, ATTEMPTS, f"widths for {asked:.2f}x by the table")
            model = self._pruned(asked, number)
            known = next((a for a in self.attempts if a.model.sha256 == model.sha256), None)
            if known is None:
                tell(number, ATTEMPTS, "exported and timed")
                speed = self._timed(baseline, self._deployed(model, f"pruned-{number}"))
                self.attempts.append(Attempt(model=model, asked=asked, speedup=speed))
            elif known.speedup.low >= wanted:
                break  # kernels come in steps: there is nothing between
            speed = self.attempts[-1].speedup if known is None else known.speedup
            if wanted <= speed.low <= wanted * NEAR:
                break
            asked = _more(wanted * MARGIN, speed.low, model.history[-1].facts["speedup_by_table"])
        enough = [a for a in self.attempts if a.speedup.low >= wanted]
        if not enough:
            raise self._not_reached(wanted)
        return min(enough, key=lambda a: a.speedup.low)

    def _pruned(self, asked: float, number: int) -> Artifact:
        options = self._options.model_copy(update={"speedup": asked})
        return prune(self._source, options, out=self._folder / f"pruned-{number}", data=self._data)

    def _deployed(self, model: Artifact, name: str) -> Artifact:
        """The model as it would be served: exported, and quantized where that was asked for."""
        path = self._folder / name
        plain = export(model, ExportOptions(), out=path.with_suffix(".fp32.onnx"), data=self._data)
        if self._options.precision == "fp32":
            return plain
        assert self._data is not None  # noqa: S101 - checked above
        how = QuantizeOptions(
            target=self._options.target,
            scope="residual",
            calibration_method="minmax",
            corrections=("none",),
        )
        return quantize(plain, how, data=self._data, out=path.with_suffix(".int8.onnx"))

    def _timed(self, baseline: Artifact, candidate: Artifact) -> Interval:
        """The measured speed-up. Raises InputError: it could not be measured."""
        target = self._options.target
        pair = (
            Candidate(name="unpruned", artifact=baseline, backend=target),
            Candidate(name="pruned", artifact=candidate, backend=target, family="pruned"),
        )
        how = BenchOptions(preset="quick", threads=self._options.threads)
        measured = bench(pair, how, data=self._data)
        one, other = (measured.of(c.name, 1) for c in pair)
        for each in (one, other):
            if each.invalid:
                raise InputError(
                    f"the {each.name} model could not be timed: {each.invalid}",
                    hint="`deploykit bench` shows more",
                )
        return statistics.speedup(one, other)

    def _not_reached(self, wanted: float) -> AnswerIsNo:
        found = max(self.attempts, key=lambda a: a.speedup.low).speedup
        way = f"`--speedup {found.low:.2f}x` is within reach; or " if found.low > 1.01 else ""
        return AnswerIsNo(
            f"{wanted:.2f}x on {self._options.target} in {self._options.precision} was not "
            f"reached: the nearest is {found.value:.2f}x [{found.low:.2f}, {found.high:.2f}], "
            f"measured, after {len(self.attempts)} attempts",
            hint=f"{way}loosen --keep",
        )


def _more(wanted: float, measured: float, by_table: float) -> float:
    """What to ask of the table, if it knows all but a share of the time that no width changes.

    Amdahl 1967: 1 / speed-up = share + (1 - share) / speed-up by the table; one attempt tells the
    share.
    """
    by_table = max(by_table, 1.001)
    share = (1 / measured - 1 / by_table) / (1 - 1 / by_table)
    left = 1 / wanted - share
    asked = (1 - share) / left if left > 0 else by_table * 2
    return min(max(asked, 1.01), by_table * 2)


def _silent(done: int, total: int, text: str) -> None:
    del done, total, text
