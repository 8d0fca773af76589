"""The table and the plot of what each node costs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deploykit.errors import UsageError
from deploykit.report import damage
from deploykit.values import Json
from tests.fixtures_core import refused


def row(number: int, **changes: Any) -> Json:
    plain = {
        "node": f"n{number}", "operator": "Conv", "sqnr_db": 20.0 + number, "cosine": 0.99,
        "multiply_accumulates": 100, "sqnr_db_if_float": 21.0, "float_us": 2.0, "quantized_us": 1.0,
    }  # fmt: skip
    return {**plain, **changes}


def facts(*rows: Json, in_float: tuple[str, ...] = ()) -> Json:
    probe = {"sqnr_db": 19.0, "quantized_us_in_all": 50.0}
    return {
        "search": {"runtime": "ort-cpu", "damage": list(rows), "probe": probe},
        "float_nodes": [{"node": name} for name in in_float],
    }


def words(svg: str) -> list[str]:
    return re.findall(r"<!-- (.*?) -->", svg)


def test_the_table_has_a_dash_for_what_was_not_measured() -> None:
    old = row(1)
    for key in ("cosine", "sqnr_db_if_float", "float_us", "quantized_us"):
        del old[key]
    lines = damage.table([row(0), old], {"sqnr_db": 19.0})
    assert "(19.0 with all)" in lines[1]
    assert lines[-2].split() == ["20.0", "0.99000", "21.0", "2.0", "1.0", "Conv", "n0"]
    assert lines[-1].split() == ["21.0", "-", "-", "-", "-", "Conv", "n1"]
    assert damage.table([], {}) == []
    assert len(damage.table([row(n) for n in range(30)], {})) == 4 + damage.LISTED


@pytest.mark.parametrize("count", [1, 12, 60])
def test_the_plot_names_each_node_that_it_draws(count: int, tmp_path: Path) -> None:
    damage.plot(facts(*(row(n) for n in range(count))), "q.onnx", tmp_path / "p.svg")
    told = words((tmp_path / "p.svg").read_text())
    drawn = [word.split()[-1] for word in told if re.fullmatch(r"Conv +n\d+", word)]
    assert sorted(drawn) == sorted(f"n{n}" for n in range(min(count, damage.DRAWN)))
    assert any("q.onnx: what each quantized node costs" in word for word in told)
    assert any("the quantized model: 19.0 dB" in word for word in told)
    assert (f"the {damage.DRAWN} worst of {count} nodes" in told) == (count > damage.DRAWN)


def test_the_plot_marks_nodes_in_float_and_counts_the_others(tmp_path: Path) -> None:
    back = row(1, sqnr_db_if_float=None, float_us=None, quantized_us=None)
    damage.plot(facts(row(0), back, in_float=("n1", "x", "y")), "q", tmp_path / "p.svg")
    told = words((tmp_path / "p.svg").read_text())
    assert "the same, for a node that was left in float" in told
    assert "2 nodes in float are not drawn" in told


def test_where_no_time_is_known_none_is_drawn(tmp_path: Path) -> None:
    damage.plot(facts(row(0, float_us=None, quantized_us=None)), "q", tmp_path / "p.svg")
    assert not any("time of the node" in word for word in words((tmp_path / "p.svg").read_text()))


def test_a_png_is_one_and_long_names_keep_their_ends(tmp_path: Path) -> None:
    name = "/text_model/encoder/layer.0/attention/self/query/MatMul/MatMulAddFusion"
    damage.plot(facts(row(0, node=name)), "q", tmp_path / "p.PNG")
    with Image.open(tmp_path / "p.PNG") as image:
        assert image.format == "PNG"
        assert min(image.size) > 200
    damage.plot(facts(row(0, node=name)), "q", tmp_path / "p.svg")
    told = words((tmp_path / "p.svg").read_text())
    assert f"Conv  {name[:29]}...{name[-32:]}" in told


@pytest.mark.parametrize("name", ["p.gif", "p", "p.png.txt"])
def test_another_suffix_is_refused(name: str) -> None:
    with refused(UsageError, name, hint=".png or .svg"):
        damage.check_suffix(Path(name))


def test_the_gain_in_one_sentence() -> None:
    kept = {
        "patterns": ["a*"], "nodes": ["a"], "in_float_already": [], "sqnr_db": 19.0,
        "sqnr_db_if_float": 21.25, "measured": True, "multiply_accumulates": 50,
        "multiply_accumulates_quantized": 1000, "extra_us": 1.5, "quantized_us": 50.0,
    }  # fmt: skip
    assert damage.gain(kept) == (
        "a*: 1 node in float, 19.0 -> 21.2 dB (measured), "
        "50 multiply-accumulates back in float (5.0% of the quantized ones), "
        "about 2 us slower of 50"
    )
    several = {**kept, "nodes": ["a", "b"], "measured": False, "extra_us": None}
    assert "2 nodes in float, 19.0 -> 21.2 dB (with the best of them alone;" in damage.gain(several)
    assert " us" not in damage.gain(several)
    assert damage.gain({**kept, "nodes": []}) == "a*: in float already"
