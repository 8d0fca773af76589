"""The user's own code, named as `file.py:function` or `package.module:function`."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from deploykit.errors import InputError, did_you_mean


def split_reference(reference: str) -> tuple[Path, str]:
    """`file.py:name` or `package.module:name` to its two parts."""
    place, _, name = reference.rpartition(":")
    return Path(place), name


def load_function(reference: str) -> Callable[..., Any]:
    """Import the function that a reference names.

    Raises InputError: no such file, module or function, or the file fails to import.
    """
    place, name = split_reference(reference)
    module = _from_file(place) if place.suffix == ".py" else _from_package(str(place), reference)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(f"{place} has no function {name!r}", hint=did_you_mean(name, known))
    return function  # type: ignore[no-any-return]


def beside(reference: str, name: str) -> Callable[..., Any] | None:
    """The function `name` of the file or module that a reference names; None if it has none."""
    place, _ = split_reference(reference)
    module = _from_file(place) if place.suffix == ".py" else _from_package(str(place), reference)
    function = getattr(module, name, None)
    return function if callable(function) else None


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"{path}: no such file", hint="name it as path/to/file.py:function")
    path = path.resolve()
    identity = hashlib.sha256(path.read_bytes() + bytes(path)).hexdigest()[:12]
    name = f"_deploykit_user_{path.stem}_{identity}"
    if name in sys.modules:
        return sys.modules[name]
    loader = _SourceOnly(name, str(path))
    module = importlib.util.module_from_spec(ModuleSpec(name, loader, origin=str(path)))
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickling of annotations look the module up
    sys.path.insert(0, str(path.parent))
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(
            f"{path} fails to import: {type(error).__name__}: {error}",
            hint=f"run `python {path}` to see where",
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


class _SourceOnly(SourceFileLoader):
    """Neither reads nor leaves a `__pycache__`: the folder of an artifact must stay as it is."""

    def get_code(self, fullname: str) -> CodeType:
        """Compile the source as it is now."""
        del fullname
        return self.source_to_code(self.get_data(self.path), self.path)


def neighbours(path: Path) -> list[str]:
    """Modules of its own folder that a Python file imports, sorted."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    places = path.parent
    return sorted(
        n for n in found if (places / f"{n}.py").is_file() or (places / n / "__init__.py").is_file()
    )


def _from_package(name: str, reference: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise InputError(
            f"{reference}: cannot import {name!r}: {type(error).__name__}: {error}",
            hint="name it as path/to/file.py:function or package.module:function",
        ) from error
