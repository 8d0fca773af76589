"""The one place where an error becomes two lines and an exit code."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import click

from deploykit import _interrupt
from deploykit.errors import (
    ANSWER_IS_NO,
    INTERRUPTED,
    RESOURCE,
    UNEXPECTED,
    USAGE,
    DeploykitError,
    UsageError,
    did_you_mean,
)


@dataclass
class Shown:
    """Whether a command has printed its document."""

    document: bool = False


def call(command: click.Command, args: Sequence[str] | None = None) -> int:
    """Run a command; report what goes wrong on stderr; return the exit code.

    With --json, one document goes to stdout whatever happens: the result, or else the error.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    _interrupt.listen()
    shown = Shown()
    try:
        result = command.main(arguments, prog_name="deploykit", standalone_mode=False, obj=shown)
    except Exception as error:
        if "--traceback" in arguments and not isinstance(error, click.ClickException):
            raise
        failed: BaseException = error
    except SystemExit as error:
        failed = RuntimeError(f"something called sys.exit({error.code!r})")
    except KeyboardInterrupt:
        failed = click.exceptions.Abort()
    else:
        return result if isinstance(result, int) else 0
    return _report(failed, document="--json" in arguments and not shown.document)


def _report(error: BaseException, *, document: bool) -> int:
    """Two lines for any error, the notes on it, and its exit code."""
    if _interrupt.asked():  # whatever broke, it broke because the user stopped it
        error = click.exceptions.Abort()
    fact, hint, code = _explained(error)
    notes, facts = (error.notes, error.facts) if isinstance(error, DeploykitError) else ([], {})
    for note in notes:
        click.echo(f" note: {_line(note)}", err=True)
    if fact:
        first, second = ("no", "see") if code == ANSWER_IS_NO else ("error", "fix")
        click.echo(f"{first:>5}: {_line(fact)}\n{second:>5}: {_line(hint)}", err=True)
    if fact and document:
        from deploykit import _json  # not for --help

        told = {"exit_code": code, "error": fact, "fix": hint, "notes": notes, "facts": facts}
        click.echo(_json.text({"schema": "deploykit.error/1", **told}), nl=False)
    return code


def _explained(error: BaseException) -> tuple[str, str, int]:
    match error:
        case click.exceptions.Abort():
            told = "interrupted", "what is there is whole: as it was before, or done", INTERRUPTED
        case click.exceptions.NoArgsIsHelpError():
            click.echo(error.format_message(), err=True)
            told = "", "", USAGE
        case click.ClickException():
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "deploykit"
            told = error.format_message(), f"see `{path} --help`", USAGE
        case DeploykitError():
            told = str(error), error.hint, error.exit_code
        case MemoryError():
            told = "out of memory", "use a smaller batch, or a machine with more memory", RESOURCE
        case BrokenPipeError():
            told = "", "", 0
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG):
            told = f"no space left: {error}", "free some disk space", RESOURCE
        case _:
            told = (
                f"unexpected failure: {type(error).__name__}: {_first_line(error)}",
                "this is a bug of deploykit; `deploykit --traceback ...` shows where",
                UNEXPECTED,
            )
    return told


def unknown_command(name: str, known: Iterable[str]) -> UsageError:
    """The error for a command that does not exist."""
    return UsageError(f"unknown command {name!r}", hint=did_you_mean(name, known))


def _line(text: str) -> str:
    return " ".join(text.split())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
