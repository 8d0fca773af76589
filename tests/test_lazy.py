from __future__ import annotations

import sys
from types import ModuleType

import pytest

from deploykit._lazy import INSTALL, installed, needs
from deploykit.errors import MissingError
from tests.fixtures_core import refused


@pytest.mark.parametrize("library", INSTALL)
def test_a_missing_library_says_what_to_install(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    two_lines = refused(MissingError, library, "cannot be imported", hint="install 'deploykit[")
    with two_lines, needs(library):
        __import__(library)


def test_an_unlisted_library_is_installed_by_its_name() -> None:
    two_lines = refused(MissingError, "No module named 'no_such'", hint="pip install no_such")
    with two_lines, needs("no_such"):
        __import__("no_such")


def test_a_library_that_breaks_at_import_is_missing_too() -> None:
    with refused(MissingError, "openvino", "libtbb.so", hint="deploykit[cpu]"), needs("openvino"):
        raise ImportError("libtbb.so: cannot open shared object file")


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), MissingError("x", hint="y")]
)
def test_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, needs("torch"):
        raise error
    assert caught.value is error


def test_what_is_there_can_be_used() -> None:
    with needs("json"):
        import json
    assert json.dumps(1) == "1"


def test_installed_looks_and_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert installed("colorsys")
    assert "colorsys" not in sys.modules
    assert not installed("no_such_library")
    assert not installed("no_such_library.module")


@pytest.mark.parametrize("stub", [None, ModuleType("openvino")])
def test_a_forbidden_library_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, stub: ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", stub)  # type: ignore[arg-type]
    assert not installed("openvino")
