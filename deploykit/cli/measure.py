"""`evaluate`, `compare`, `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploykit import backends
from deploykit.cli import COMMANDS, _common, _options
from deploykit.cli._observer import Terminal, console
from deploykit.dataset import Dataset
from deploykit.environment import read as read_environment
from deploykit.errors import AnswerIsNo, UsageError
from deploykit.evaluation import collect, compare, evaluate
from deploykit.measure import BenchOptions, BenchResult, Candidate, bench
from deploykit.report import timings
from deploykit.report.differences import difference
from deploykit.report.summary import interval
from deploykit.values import Artifact, SessionOptions


def _session_options(threads: int | None) -> SessionOptions:
    return SessionOptions(threads=threads or read_environment().cores)


@click.command("evaluate", help=COMMANDS["evaluate"][1])
@click.argument("model")
@_common.data_option()
@click.option("--metric", required=True, help="top1, top5, agreement, cosine, sqnr, file.py:name.")
@click.option("--reference", help="Model to compare with, for metrics that compare.")
@_common.backend_option
@_common.threads_option
@_common.factory_options
@_common.json_option
def evaluate_command(  # noqa: PLR0913 - one parameter an option
    model: str,
    *,
    data: str,
    metric: str,
    reference: str | None,
    backend: str | None,
    threads: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Score a model."""
    opened, options = _common.required_data(data), _session_options(threads)
    artifact = _common.model(model, given, opened)
    outputs = None
    with Terminal() as terminal:
        if reference:
            terminal.step(reference, "run the reference")
            with backends.open_session(_common.on_disk(reference), None, options) as session:
                outputs, _ = collect(session, opened, progress=terminal.progress)
        terminal.step(model, "evaluate")
        with backends.open_session(artifact, backend, options) as session:
            score = evaluate(session, opened, metric, reference=outputs, progress=terminal.progress)
    text = f"{score.metric} {interval(score.score, 4)} on {score.samples} samples"
    plain = score.model_dump(mode="json", exclude={"per_sample"})
    _common.show(plain, text, as_json=as_json, schema="deploykit.score/1")


@click.command("compare", help=COMMANDS["compare"][1])
@click.argument("reference")
@click.argument("candidate")
@_common.data_option()
@_common.backend_option
@_common.threads_option
@_common.json_option
def compare_command(reference: str, candidate: str, *, as_json: bool, **given: Any) -> None:
    """Compare outputs."""
    opened, options = _common.required_data(given["data"]), _session_options(given["threads"])
    with (
        backends.open_session(_common.on_disk(reference), None, options) as one,
        backends.open_session(_common.on_disk(candidate), given["backend"], options) as other,
    ):
        found = compare(one, other, opened)
    lines = [difference(d) for d in found]
    document = {"outputs": [d.model_dump(mode="json") for d in found]}
    _common.show(document, "\n".join(lines), as_json=as_json, schema="deploykit.comparison/1")


@click.command("bench", help=COMMANDS["bench"][1])
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--backend",
    "names",
    multiple=True,
    help="As `deploykit doctor` names them; by default all but pytorch-compile.",
)
@_common.data_option(text="Inputs to run; the word 'random' makes some up and marks the result.")
@_options.fields(BenchOptions)
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Keep all samples as JSON.")
@_common.force_option
@_common.factory_options
@_common.json_option
def bench_command(
    models: tuple[str, ...],
    *,
    names: tuple[str, ...],
    data: str,
    output: Path | None,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Time models."""
    from deploykit import _files

    options = _options.make(BenchOptions, given)
    opened = None if data == "random" else _common.required_data(data)
    if output:
        if output.suffix != ".json":
            raise UsageError(f"-o {output}: the samples are JSON", hint="name it *.json")
        _files.check_free(output, force=force)
    candidates = _candidates(models, names, given, opened)
    with Terminal() as terminal:
        terminal.step("bench", f"{len(candidates)} engines")
        result = bench(
            candidates,
            options,
            data=opened,
            progress=lambda text, done, total: terminal.progress(done, total, text),
        )
    if output:
        _files.write_text(output, result.model_dump_json(by_alias=True) + "\n")
    if as_json:
        _common.show(result, "", as_json=True)
    else:
        timings.show(result, console_for_stdout())
    _check_valid(result)


def _check_valid(result: BenchResult) -> None:
    """Raises AnswerIsNo: a measurement must not be used."""
    broken = [m for m in result.measurements if m.invalid]
    if not broken:
        return
    hint = f"{len(broken)} of {len(result.measurements)} measurements must not be used"
    if result.inputs == "random" and "cosine" in str(broken[0].invalid):
        hint += "; random inputs lie where a quantized model was not calibrated: give real --data"
    raise AnswerIsNo(
        f"{broken[0].name} at batch {broken[0].batch_size} is invalid: {broken[0].invalid}",
        hint=hint,
    )


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
