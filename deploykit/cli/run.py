"""`run`."""

from __future__ import annotations

from pathlib import Path

import click

from deploykit.cli import COMMANDS, _common
from deploykit.cli._observer import Terminal
from deploykit.cli.bench import console_for_stdout
from deploykit.errors import NotWorthIt
from deploykit.pipeline import run
from deploykit.plan import describe
from deploykit.recipe import read_recipe
from deploykit.report import timings
from deploykit.report.summary import RunSummary


@click.command("run", help=COMMANDS["run"][1])
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--dry-run", is_flag=True, help="Show the plan and do nothing.")
@_common.force_option
@_common.json_option
def run_command(
    recipe: Path, *, output: Path | None, dry_run: bool, force: bool, as_json: bool
) -> None:
    """Go the whole way."""
    read = read_recipe(recipe)
    if dry_run:
        steps = describe(read)
        text = "\n".join(f"{name:<22} {what}" for name, what in steps)
        document = {"steps": [{"name": name, "what": what} for name, what in steps]}
        _common.show(document, text, as_json=as_json, schema="deploykit.plan/1")
        return
    if output is None:
        raise click.UsageError("give -o FOLDER for the results (or --dry-run)")
    with Terminal() as terminal:
        summary = run(read, out=output, observer=terminal, force=force)
    _show(summary, output, as_json=as_json)
    if summary.verdict.ship is None:
        raise NotWorthIt(
            f"not worth it: {summary.verdict.reason}", hint=f"all numbers are in {output}"
        )


def _show(summary: RunSummary, output: Path, *, as_json: bool) -> None:
    if as_json:
        _common.show(summary, "", as_json=True)
        return
    timings.show_summary(summary, console_for_stdout())
    click.echo(f"report: {output / 'report.html'}")
    if summary.verdict.ship:
        click.echo(f"bundle: {output / 'bundle'}")
