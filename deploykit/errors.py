"""The errors that a user can act on.

Each has one line of fact and one line with the way out (`hint`), and the exit code of its kind.
What a user should know besides is a note each (`add_note`); what was measured is in `facts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

UNEXPECTED, USAGE, INPUT, MISSING, INTEGRITY, RESOURCE, ANSWER_IS_NO, INTERRUPTED = (
    1, 2, 3, 4, 5, 6, 7, 130,
)  # fmt: skip


class DeploykitError(Exception):
    """Base of every error that ends a command on purpose."""

    exit_code: ClassVar[int] = UNEXPECTED

    def __init__(self, fact: str, *, hint: str, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(fact)
        self.hint = hint
        self.facts = dict(facts or {})

    @property
    def notes(self) -> list[str]:
        """What was added by `add_note`."""
        return list(getattr(self, "__notes__", ()))


class UsageError(DeploykitError):
    """The request does not make sense: unknown name, contradicting options, output in the way."""

    exit_code = USAGE


class InputError(DeploykitError):
    """The model, data, checkpoint or recipe is bad."""

    exit_code = INPUT


class StageError(InputError):
    """A stage cannot do its work on this model, or broke its own promise about the result."""


class MissingError(DeploykitError):
    """A library or device is missing, or the engine does not fit this machine."""

    exit_code = MISSING


class IntegrityError(DeploykitError):
    """A file is not the one that its record or manifest describes."""

    exit_code = INTEGRITY


class ResourceError(DeploykitError):
    """Disk, memory or time ran out."""

    exit_code = RESOURCE


class AnswerIsNo(DeploykitError):  # noqa: N818 - not a failure: the work is done
    """Everything ran, and a gate failed: the honest answer is no."""

    exit_code = ANSWER_IS_NO


class NotWorthIt(AnswerIsNo):
    """A whole run ended with its summary written, and no engine passes the gates."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for a near miss, else the list of what is known."""
    names = sorted(known)
    near = get_close_matches(word, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
