"""The one place where an error becomes two lines and an exit code."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable, Sequence

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


def call(command: click.Command, args: Sequence[str] | None = None) -> int:
    """Run a command; report what goes wrong on stderr; return the exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    _interrupt.listen()
    try:
        result = command.main(arguments, prog_name="deploykit", standalone_mode=False)
    except Exception as error:
        if "--traceback" in arguments and not isinstance(error, click.ClickException):
            raise
        return _report(error)
    except SystemExit as error:
        return _report(RuntimeError(f"something called sys.exit({error.code!r})"))
    except KeyboardInterrupt:
        _say("interrupted", "what is there is whole: as it was before, or done")
        return INTERRUPTED
    return result if isinstance(result, int) else 0


def _report(error: Exception) -> int:
    """Two lines for any error, and its exit code."""
    if _interrupt.asked():  # whatever broke, it broke because the user stopped it
        _say("interrupted", "what is there is whole: as it was before, or done")
        return INTERRUPTED
    fact, hint, code = _explained(error)
    if code == ANSWER_IS_NO:
        _say(fact, hint, labels=("no", "see"))
    elif fact:
        _say(fact, hint)
    return code


def _explained(error: Exception) -> tuple[str, str, int]:
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


def _say(fact: str, hint: str, labels: tuple[str, str] = ("error", "fix")) -> None:
    for label, text in zip(labels, (fact, hint), strict=True):
        click.echo(f"{label:>5}: {' '.join(text.split())}", err=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
