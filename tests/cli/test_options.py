"""Options of a command from the fields of an options value."""

from __future__ import annotations

from typing import Literal

import click
import pytest

from deploykit.cli._options import _choices, fields, make
from deploykit.errors import UsageError
from deploykit.stages.quantize import QuantizeOptions
from deploykit.stages.quantize.presets import Scope
from tests.cli.conftest import Command


def parsed(*words: str) -> QuantizeOptions:
    """What the command line of quantize makes of these words."""
    found: list[QuantizeOptions] = []

    @click.command()
    @fields(QuantizeOptions)
    def command(**values: object) -> None:
        found.append(make(QuantizeOptions, values))

    command.main(list(words), standalone_mode=False)
    return found[0]


def test_what_the_quantize_command_can_say() -> None:
    assert parsed() == QuantizeOptions()
    assert parsed("--scope", "residual").scope == "residual"
    assert parsed("--scope", "auto").scope == "auto"
    assert parsed("--calibration-method", "entropy").calibration_method == "entropy"
    assert parsed("--processor", "vnni").processor == "vnni"
    one = parsed("--corrections", "smooth_quant,bias_correction")
    two = parsed("--corrections", "smooth_quant", "--corrections", "bias_correction")
    assert one.corrections == two.corrections == ("smooth_quant", "bias_correction")
    assert parsed("--corrections", "none").corrections == ("none",)


@pytest.mark.parametrize("flag", ["--scope", "--calibration-method"])
def test_an_unknown_choice_is_told_with_those_that_are(flag: str) -> None:
    with pytest.raises(click.BadParameter, match=r"'none' is not one of .*'auto'"):
        parsed(flag, "none")


def test_an_unknown_correction_is_told_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"--corrections: .*'smooth_quant'") as caught:
        parsed("--corrections", "smooth")
    assert "got 'smooth'" in caught.value.hint


def test_the_help_names_the_choices(deploykit: Command) -> None:
    out = " ".join(deploykit("quantize", "--help").out.split())
    for name in ("compute|residual|all|auto", "--calibration-method", "--corrections", "minmax|"):
        assert name in out
    assert "smooth_quant" in out


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        (Literal["a", "b"], ["a", "b"]),
        (Scope | Literal["auto"], ["compute", "residual", "all", "auto"]),
        (Scope | str, []),
        (str, []),
        (int | None, []),
    ],
)
def test_choices_of_a_union_are_those_of_its_parts(kind: object, choices: list[str]) -> None:
    assert _choices(kind) == choices
