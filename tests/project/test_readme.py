"""What the README tells people to type exists."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest

from deploykit.cli import COMMANDS, group
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
LINES = [
    line.strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
CALLS = [
    part.strip().removeprefix(".venv/bin/")
    for line in LINES
    for part in line.split("&&")
    if part.strip().removeprefix(".venv/bin/").startswith("deploykit ")
]


def test_two_commands_do_all_the_set_up() -> None:
    assert README.count("python3 -m venv .venv") == 2
    assert "pytest" in next(line for line in LINES if "test]" in line)


@pytest.mark.parametrize("call", CALLS)
def test_every_call_parses(call: str) -> None:
    """The command exists and takes these options; nothing is run."""
    words = shlex.split(call.split(" # ", maxsplit=1)[0])[1:]
    if words[0].startswith("-"):
        return
    assert words[0] in COMMANDS
    command = group.get_command(None, words[0])  # type: ignore[arg-type]
    assert command is not None
    command.make_context(words[0], words[1:], resilient_parsing=False)


def test_named_files_and_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"'\.\[([\w,-]+)\]'", README):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    for path in re.findall(r"(?:benchmarks|calibration_data|deploykit|\.ci)/[\w./-]+\.\w+", README):
        assert (ROOT / path).exists(), path
