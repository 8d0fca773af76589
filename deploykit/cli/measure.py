"""`evaluate`, `compare`."""

from __future__ import annotations

from typing import Any

import click

from deploykit import backends
from deploykit.cli import COMMANDS, _common
from deploykit.cli._observer import Terminal
from deploykit.environment import read as read_environment
from deploykit.evaluation import collect, compare, evaluate
from deploykit.report.differences import difference
from deploykit.report.summary import interval
from deploykit.values import SessionOptions


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
