"""The top level, the words in it, and size budgets: to notice drift, not to game."""

from __future__ import annotations

import ast
import statistics
import subprocess
from pathlib import Path

from tests.conftest import ROOT

SIX = {"pyproject.toml", "README.md", "deploykit", "tests", "calibration_data", "benchmarks"}
CODE = sorted((ROOT / "deploykit").rglob("*.py"))


def test_six_entries_are_the_whole_visible_top_level() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {Path(p).parts[0] for p in listed if not p.startswith(".")} == SIX


def _functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (f"{path.relative_to(ROOT)}:{node.name}", node)
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]


def _length(node: ast.FunctionDef) -> int:
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_are_short() -> None:
    lengths = {name: _length(node) for name, node in _functions()}
    ordered = sorted(lengths.values())
    assert statistics.median(ordered) <= 10
    assert ordered[int(len(ordered) * 0.9)] <= 30
    assert not {name: n for name, n in lengths.items() if n > 60}


def test_files_are_short() -> None:
    lengths = {str(p.relative_to(ROOT)): p.read_text().count("\n") for p in CODE}
    assert not {name: n for name, n in lengths.items() if n > 350}


def test_everything_is_annotated() -> None:
    bare = [
        f"{name}({a.arg})"
        for name, node in _functions()
        for a in (*node.args.args, *node.args.kwonlyargs)
        if a.annotation is None and a.arg not in ("self", "cls")
    ]
    assert not bare
