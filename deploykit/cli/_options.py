"""Options of a command from the fields of an options value: said once, for recipe and command."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import AliasChoices, ValidationError
from pydantic.fields import FieldInfo

from deploykit.errors import UsageError
from deploykit.values import Value

F = TypeVar("F", bound=Callable[..., Any])
V = TypeVar("V", bound=Value)


class Items(click.ParamType[Any]):
    """`a,b`: a list; the option may be repeated too."""

    def __init__(self, item: type) -> None:
        self.item = item
        self.name = f"{item.__name__},..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Split and convert each item."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.item(part) for part in str(value).split(",") if part)
        except ValueError:
            self.fail(f"{value!r} is not a list of {self.item.__name__}", param, ctx)


def fields(kind: type[Value], *, without: tuple[str, ...] = ()) -> Callable[[F], F]:
    """Decorate a command with one option for each field that the command line can say."""

    def decorate(command: F) -> F:
        for name, field in reversed(kind.model_fields.items()):
            if name not in without and (settings := _settings(field)) is not None:
                flag = "--" + name.replace("_", "-")
                if settings.pop("pair", False):
                    flag = f"{flag}/--no-{name.replace('_', '-')}"
                names = [flag, *_other_names(name, field), name]
                command = click.option(*names, help=_help(field), **settings)(command)
        return command

    return decorate


def _other_names(name: str, field: FieldInfo) -> list[str]:
    """Options that say the same: a field may have further names."""
    alias = field.validation_alias
    known = alias.choices if isinstance(alias, AliasChoices) else ()
    return ["--" + str(other).replace("_", "-") for other in known if other != name]


def make(kind: type[V], values: dict[str, Any]) -> V:
    """The options value from what the command line gave; the defaults are the value's own.

    Raises UsageError: a value out of range.
    """
    given = {k: v for k, v in values.items() if k in kind.model_fields and v not in (None, ())}
    flat = {k: _flat(v) for k, v in given.items()}
    try:
        return kind(**flat)
    except ValidationError as error:
        first = error.errors()[0]
        name = "--" + str(first["loc"][0]).replace("_", "-") if first["loc"] else kind.__name__
        raise UsageError(f"{name}: {first['msg']}", hint=_got(first)) from error


def _got(error: Mapping[str, Any]) -> str:
    return "give it" if error["type"] == "missing" else f"got {error['input']!r}"


def _flat(value: Any) -> Any:
    """A repeated list option gives a tuple of tuples."""
    if isinstance(value, tuple) and all(isinstance(v, tuple) for v in value):
        return tuple(item for part in value for item in part)
    return value


def _settings(field: FieldInfo) -> dict[str, Any] | None:
    """How click takes a field; None for one that only a recipe can say."""
    kind = _without_none(field.annotation)
    origin, arguments = get_origin(kind), get_args(kind)
    if choices := _choices(kind):
        return {"type": click.Choice(choices)}
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        item = get_args(arguments[0])[0] if get_origin(arguments[0]) is Annotated else arguments[0]
        item = str if _choices(item) else item  # the value itself tells what it takes
        return {"type": Items(item), "multiple": True} if item in (int, float, str) else None
    if kind is bool:
        return {"default": None, "pair": True}
    if origin is Annotated and arguments[0] is float:
        return {"type": str}  # the value itself reads its unit, as in 2x
    return {"type": kind} if kind in (int, float, str) else None


def _choices(kind: Any) -> list[str]:
    """What a Literal, or a union of such, can be."""
    if get_origin(kind) in (Union, types.UnionType):
        parts = [_choices(part) for part in get_args(kind)]
        return [choice for part in parts for choice in part] if all(parts) else []
    return [str(a) for a in get_args(kind)] if get_origin(kind) is Literal else []


def _without_none(kind: Any) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        rest = [a for a in get_args(kind) if a is not type(None)]
        return rest[0] if len(rest) == 1 else kind
    return kind


def _help(field: FieldInfo) -> str:
    default = field.default
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    if default in (None, "") or field.is_required():
        return field.description or ""
    return f"{field.description or ''}  [default: {default}]"
