from __future__ import annotations

import os
import py_compile
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploykit._code import load_function, neighbours, split_reference
from deploykit.errors import InputError
from tests.fixtures_core import refused


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Python writes bytecode unless told not to; what a test imports is forgotten."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    before, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    assert sys.path == path


def written(folder: Path, text: str, name: str = "code.py") -> str:
    (folder / name).write_text(text)
    return f"{folder / name}:function"


def test_a_reference_is_split_at_its_last_colon() -> None:
    assert split_reference("a:b/c.py:make") == (Path("a:b/c.py"), "make")
    assert split_reference("package.module:make") == (Path("package.module"), "make")


def test_a_function_of_a_file_is_called(tmp_path: Path) -> None:
    assert load_function(written(tmp_path, "def function(x): return x + 1"))(2) == 3


def test_a_function_of_a_package_is_called() -> None:
    assert load_function("os.path:basename") is os.path.basename


def test_a_file_is_imported_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    text = "calls = []\ndef function(): calls.append(1); return len(calls)"
    reference = written(tmp_path, text)
    assert [load_function(reference)() for _ in range(3)] == [1, 2, 3]
    assert load_function(written(tmp_path, text + " + 10"))() == 11


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path: Path) -> None:
    functions = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        functions.append(load_function(written(tmp_path / name, "def function(): return __file__")))
    assert [f() for f in functions] == [str(tmp_path / n / "code.py") for n in ("one", "two")]


def test_a_file_may_define_dataclasses_and_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("VALUE = 7")
    text = """
from __future__ import annotations
from dataclasses import dataclass
import beside_it
@dataclass
class Box:
    size: int
def function(): return Box(beside_it.VALUE).size
"""
    assert load_function(written(tmp_path, text))() == 7


def test_importing_a_file_leaves_nothing_beside_it(tmp_path: Path) -> None:
    load_function(written(tmp_path, "def function(): pass"))
    assert [path.name for path in tmp_path.iterdir()] == ["code.py"]


def test_bytecode_that_lies_beside_a_file_is_not_run(tmp_path: Path) -> None:
    reference = written(tmp_path, "def function(): return 'evil'")
    path = tmp_path / "code.py"
    times = path.stat()
    py_compile.compile(str(path))
    path.write_text("def function(): return 'good'")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # for Python, the same source
    assert load_function(reference)() == "good"


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with refused(InputError, tmp_path / "no.py", "no such file", hint="path/to/file.py:function"):
        load_function(f"{tmp_path / 'no.py'}:function")


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def function(:", "SyntaxError"),
        ("import no_such_module_at_all", "ModuleNotFoundError"),
        ("raise SystemExit(0)", "SystemExit: 0"),
    ],
)
def test_a_file_that_fails_to_import_says_why_and_is_tried_again(
    tmp_path: Path, text: str, fact: str
) -> None:
    reference = written(tmp_path, text)
    for _ in range(2):
        with refused(InputError, tmp_path / "code.py", fact, hint="python "):
            load_function(reference)


@pytest.mark.parametrize(
    "reference", ["no_such_package.module:make", "os.no_such_module:make", ":f"]
)
def test_an_absent_package_is_named(reference: str) -> None:
    with refused(InputError, reference, "cannot import", hint="package.module:function"):
        load_function(reference)


def test_an_absent_function_is_named_with_its_near_miss(tmp_path: Path) -> None:
    place = tmp_path / "code.py"
    written(tmp_path, "VALUE = 1\ndef resnet18(): pass\ndef _private(): pass")
    with refused(InputError, place, "'resnet81'", hint="did you mean 'resnet18'?"):
        load_function(f"{place}:resnet81")
    with refused(InputError, "'VALUE'", hint="known: resnet18"):
        load_function(f"{place}:VALUE")
    with refused(InputError, "no function ''", hint="known: resnet18"):
        load_function(f"{place}:")


def test_neighbours_are_the_imports_that_lie_beside_the_file(tmp_path: Path) -> None:
    for name in ("layers.py", "blocks.py", "unused.py", "relative.py"):
        (tmp_path / name).touch()
    for package in ("package", "no_package"):
        (tmp_path / package).mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    written(
        tmp_path,
        """
import os, layers.deep as deep
import no_package
from . import relative
from .relative import thing
def function():
    from package.inner import thing
    from blocks import Block
""",
    )
    assert neighbours(tmp_path / "code.py") == ["blocks", "layers", "package"]
