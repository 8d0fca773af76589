"""`bench`, and its gate."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import click

from deploykit import _files, backends
from deploykit.cli import COMMANDS, _common, _options
from deploykit.cli._limits import (
    Limits,
    check_kept,
    check_undisturbed,
    check_valid,
    differing,
    judged,
    limit_options,
    limits_of,
    ungated,
)
from deploykit.cli._observer import Terminal, console
from deploykit.dataset import Dataset
from deploykit.environment import read as read_environment
from deploykit.errors import AnswerIsNo, UsageError
from deploykit.evaluation import collect, score
from deploykit.measure import BenchOptions, Candidate, bench
from deploykit.measure.selftest import self_test
from deploykit.report import bench_page, timings
from deploykit.values import Artifact, Score, SessionOptions


@click.command("bench", help=COMMANDS["bench"][1])
@click.argument("models", nargs=-1)
@click.option(
    "--self-test",
    is_flag=True,
    help="Bench fakes of known behaviour, no model, and show whether the truth is recovered.",
)
@click.option(
    "--backend",
    "names",
    multiple=True,
    help="As `deploykit doctor` names them; by default all but pytorch-compile.",
)
@_common.data_option(
    required=False, text="Inputs to run; the word 'random' makes some up and marks the result."
)
@_options.fields(BenchOptions)
@limit_options
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Keep all samples as JSON.")
@click.option(
    "--html", "page", type=click.Path(path_type=Path), help="Write one page that loads nothing."
)
@click.option("--layers", type=click.IntRange(0), default=0, help="Show so many longest kernels.")
@_common.force_option
@_common.factory_options
@_common.json_option
def bench_command(
    models: tuple[str, ...],
    *,
    names: tuple[str, ...],
    data: str | None,
    output: Path | None,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Time models."""
    if given["self_test"]:
        _self_test(as_json=as_json)
        return
    if not models or data is None:
        raise UsageError(
            "bench needs a model and --data", hint="as in: bench net.onnx --data evaluation.npz"
        )
    options, limits = _options.make(BenchOptions, given), limits_of(given)
    opened = None if data == "random" else _common.required_data(data)
    _check_output(output, ".json", force=force)
    _check_output(given["page"], ".html", force=force)
    unlike = differing(limits, options, opened)
    candidates = _candidates(models, names, given, opened)
    unlike += ungated(limits, [each.name for each in candidates], options)
    with Terminal() as terminal:
        scores = _scores(candidates, limits, opened, terminal)
        terminal.step("bench", f"{len(candidates)} engines")
        result = bench(
            candidates,
            options,
            data=opened,
            progress=lambda text, done, total: terminal.progress(done, total, text),
        )
    result = judged(result.model_copy(update={"scores": scores}), limits, unlike)
    if output:
        _files.write_text(output, result.model_dump_json(by_alias=True) + "\n")
    if given["page"]:
        _files.write_text(given["page"], bench_page.render(result))
    if as_json:
        _common.show(result, "", as_json=True)
    else:
        timings.show(result, console_for_stdout(), layers=given["layers"])
    check_valid(result)
    check_undisturbed(result.disturbances, limits)
    check_kept(result)


def _self_test(*, as_json: bool) -> None:
    """Raises AnswerIsNo: a truth was not recovered."""
    with Terminal() as terminal:
        terminal.step("bench", "fakes of known behaviour")
        found = self_test(lambda text, done, total: terminal.progress(done, total, text))
    if as_json:
        _common.show(found, "", as_json=True)
    else:
        timings.show_self_test(found, console_for_stdout())
    wrong = [check for check in found.checks if not check.passed]
    if wrong:
        noise = f" ({'; '.join(found.disturbances)})" if found.disturbances else ""
        raise AnswerIsNo(
            f"{wrong[0].behaviour}: the truth is {wrong[0].truth}, the bench says {wrong[0].found}",
            hint=f"repeat it on a quiet machine{noise}; what fails there too is a bug to report",
        )


def _check_output(output: Path | None, suffix: str, *, force: bool) -> None:
    """Raises UsageError: another suffix, or a file is in the way."""
    if not output:
        return
    if output.suffix != suffix:
        raise UsageError(f"{output} is no {suffix} file", hint=f"name it *{suffix}")
    _files.check_free(output, force=force)


def _scores(
    candidates: Sequence[Candidate], limits: Limits, data: Dataset | None, terminal: Terminal
) -> dict[str, Score]:
    """The score of each engine; the first is the reference of metrics that compare.

    Raises UsageError: no data, or a score from which no drop can be allowed.
    """
    metric = limits.metric
    if metric is None:
        return {}
    if data is None:
        raise UsageError("--metric needs real data", hint="give --data with labels")
    options = SessionOptions(threads=read_environment().cores)
    found, reference = {}, None
    for candidate in candidates:
        terminal.step(candidate.name, "evaluate")
        with backends.open_session(candidate.artifact, candidate.backend, options) as session:
            outputs, targets = collect(session, data, progress=terminal.progress)
        reference = outputs if reference is None else reference
        made = score(outputs, targets, metric, reference=reference)
        if limits.max_drop is not None and not isfinite(made.score.value):
            raise UsageError(
                f"{metric} of {candidate.name} is {made.score.value}: no drop from it can be "
                "allowed",
                hint="take another metric, such as cosine or agreement",
            )
        found[candidate.name] = made
    return found


def console_for_stdout() -> Any:
    """A console for results; the shared one is for talk."""
    from rich.console import Console

    return Console(highlight=False, width=None if console.is_terminal else 200)


def _candidates(
    models: tuple[str, ...], names: tuple[str, ...], given: dict[str, Any], data: Dataset | None
) -> list[Candidate]:
    """Each model on each backend that was asked for and takes it; by default on all that can."""
    for name in names:
        backends.check_available(name)
    made = []
    for reference in models:
        artifact = _common.model(reference, given, data)
        short = Path(reference).name
        made += [
            Candidate(name=f"{short} @ {name}", artifact=artifact, backend=name)
            for name in _fitting(artifact, names)
        ]
    return made


def _fitting(artifact: Artifact, names: tuple[str, ...]) -> list[str]:
    if not names:
        return backends.fitting(artifact)
    fitting = [name for name in names if artifact.format in backends.backend(name).formats]
    if not fitting:
        raise UsageError(
            f"none of {', '.join(names)} runs {artifact.format} models ({artifact.path})",
            hint="leave --backend out to take what fits",
        )
    return fitting
