"""Patterns of module names."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from deploykit.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from torch import nn


def matches(name: str, pattern: str) -> bool:
    """Whether the pattern matches the module or one that it lies in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))


def check(module: nn.Module, patterns: Iterable[str]) -> None:
    """Raises UsageError: a pattern matches no module."""
    names = [name for name, _ in module.named_modules() if name]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"the pattern {pattern!r} matches no module", hint=did_you_mean(pattern, names)
            )
