"""`inspect`: what a model is, and what each node of it costs where its record says so."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from deploykit.values import Artifact
from tests.cli.conftest import Command
from tests.conftest import FASHION
from tests.formats.test_onnx_check import custom


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory, teacher_onnx: Artifact) -> Path:
    from deploykit.cli import _errors, group

    out = tmp_path_factory.mktemp("tell") / "q.onnx"
    words = [
        "quantize", teacher_onnx.path, "--calibration-data", FASHION / "calibration.npz",
        "--calibration-samples", 64, "--node-damage", "--keep-float", "node_Conv_189",
        "--nodes-to-exclude", "node_Conv_191", "-o", out,
    ]  # fmt: skip
    assert _errors.call(group, [str(word) for word in words]) == 0
    return out


def test_the_table_the_gain_and_the_plot(deploykit: Command, int8: Path, tmp_path: Path) -> None:
    told = deploykit("inspect", int8, "--keep-float", "node_linear,node_Conv_19*", "--plot",
                     tmp_path / "p.png")  # fmt: skip
    assert told.code == 0, told.err
    assert "what each node costs, worst first" in told.out
    lines = told.out.splitlines()
    gains = [line for line in lines if line.startswith("  keep float ")]
    assert [line.split(":")[0].split("float ")[1] for line in gains] == [
        "node_linear", "node_Conv_19*", "node_linear, node_Conv_19*",
    ]  # fmt: skip
    assert "dB (measured), 640 multiply-accumulates" in gains[0]
    assert lines[-1] == f"  plot: {tmp_path / 'p.png'}"
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_json_has_it_all(deploykit: Command, int8: Path, tmp_path: Path) -> None:
    told = deploykit("inspect", int8, "--keep-float", "node_linear", "--plot", tmp_path / "p.svg",
                     "--json")  # fmt: skip
    document = json.loads(told.out)
    facts = document["history"][-1]["facts"]
    reasons = {n["node"]: n["reason"] for n in facts["float_nodes"]}
    assert reasons["node_Conv_189"] == reasons["node_Conv_191"] == "left out by request"
    row = next(r for r in facts["search"]["damage"] if r["node"] == "node_linear")
    assert document["keep_float"][0]["sqnr_db_if_float"] == row["sqnr_db_if_float"]
    assert set(row) == {
        "node", "operator", "sqnr_db", "cosine", "multiply_accumulates", "sqnr_db_if_float",
        "float_us", "quantized_us", "modules",
    }  # fmt: skip
    assert document["plot"] == str(tmp_path / "p.svg")
    assert "keep_float" not in json.loads(deploykit("inspect", int8, "--json").out)


def test_what_is_there_is_kept_unless_forced(
    deploykit: Command, int8: Path, tmp_path: Path
) -> None:
    plot = tmp_path / "p.svg"
    plot.write_text("mine")
    told = deploykit("inspect", int8, "--plot", plot)
    assert (told.code, plot.read_text()) == (2, "mine")
    assert "exists already" in told.lines[0]
    assert deploykit("inspect", int8, "--plot", plot, "--force").code == 0
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize(
    ("words", "code", "fact"),
    [
        (("--plot", "p.gif"), 2, "a plot is no .gif"),
        (("--keep-float", "node_liner"), 2, "no quantized node or module matches 'node_liner'"),
        (("--plot", "/proc/p.png"), 2, "/proc/p.png cannot be written"),
    ],
)
def test_bad_requests(
    deploykit: Command, int8: Path, words: tuple[str, ...], code: int, fact: str
) -> None:
    told = deploykit("inspect", int8, *words)
    assert told.code == code
    assert fact in told.lines[0]


@pytest.mark.parametrize("words", [("--plot", "p.png"), ("--keep-float", "*")])
def test_a_model_without_the_data_is_told_the_way_out(
    deploykit: Command, teacher: Artifact, teacher_int8: Artifact, words: tuple[str, ...]
) -> None:
    for path in (teacher.path, teacher_int8.path):
        told = deploykit("inspect", path, *words)
        assert told.code == 3
        assert "does not say what each node costs" in told.lines[0]
        assert "--node-damage" in told.lines[1]


def test_what_a_model_is(deploykit: Command, int8: Path) -> None:
    told = deploykit("inspect", int8)
    assert told.code == 0, told.err
    lines = {line.split()[0]: line for line in told.out.splitlines()[1:]}
    assert "20, IR 10" in lines["opset"]
    assert "batch (images:0)" in lines["dynamic"]
    assert "int8 2" in lines["parameters"]
    assert "29.7 M multiply-accumulates" in lines["work"]
    assert "at images [1, 1, 28, 28]" in lines["work"]
    assert "12 of 14 computing nodes" in lines["quantized"]
    assert "Conv 13" in told.out
    assert "in float: " in told.out
    assert "2 left out by request" in told.out
    assert "{" not in told.out.split("preprocessing")[0]  # nothing is dumped


def test_json_says_what_a_model_is_made_of(deploykit: Command, int8: Path) -> None:
    graph = json.loads(deploykit("inspect", int8, "--json").out)["graph"]
    assert graph["multiply_accumulates"] == 29_673_472
    assert sum(part["multiply_accumulates"] for part in graph["parts"]) == 29_673_472
    assert {part["precision"] for part in graph["parts"]} == {"int8", "fp32"}
    assert graph["dynamic"] == {"batch": ["images:0"]}


def test_the_work_at_a_size_that_is_given(deploykit: Command, int8: Path) -> None:
    told = deploykit("inspect", int8, "--input-shape", "images:4x1x28x28")
    assert "119 M multiply-accumulates (118,693,888) at images [4, 1, 28, 28]" in told.out
    told = deploykit("inspect", int8, "--input-shape", "images:4x3x28x28")
    assert told.code == 3
    assert "does not fit images" in told.lines[0]
    shapes = ("--input-shape", "images:4x1x28x28", "--input-shape", "images:2x1x28x28")
    assert deploykit("inspect", int8, *shapes).code == 2


def test_a_model_of_native_code_is_told_and_nothing_of_it_runs(
    deploykit: Command, tmp_path: Path
) -> None:
    proto = custom("Bell\x1b[31m", "com.acme")
    onnx.save(proto, tmp_path / "m.onnx")
    told = deploykit("inspect", tmp_path / "m.onnx")
    assert told.code == 0, told.err
    assert "native code com.acme::Bell" in told.out
    assert "\x1b" not in told.out
    assert deploykit("evaluate", tmp_path / "m.onnx", "--data", FASHION / "evaluation.npz").code
