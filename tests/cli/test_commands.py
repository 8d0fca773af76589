"""The way of a model through the commands, and what they print."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import click
import numpy as np
import pytest

from deploykit.cli import COMMANDS
from deploykit.values import Artifact
from tests.cli.conftest import Command
from tests.conftest import FASHION

CALIBRATION, EVALUATION = FASHION / "calibration.npz", FASHION / "evaluation.npz"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_of_one_line(deploykit: Command, name: str) -> None:
    told = deploykit(name, "--help")
    assert told.code == 0
    assert COMMANDS[name][1] in " ".join(told.out.split())


def test_the_help_names_every_command(deploykit: Command) -> None:
    out = deploykit("--help").out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_every_option_says_what_it_is() -> None:
    for name, (module, _) in COMMANDS.items():
        command = getattr(importlib.import_module(f"deploykit.cli.{module}"), f"{name}_command")
        silent = [p.opts for p in command.params if isinstance(p, click.Option) and not p.help]
        assert not silent, (name, silent)


def test_from_torch_to_a_verified_bundle(
    deploykit: Command, teacher: Artifact, tmp_path: Path
) -> None:
    pruned, onnx = tmp_path / "pruned", tmp_path / "m.onnx"
    int8, bundle = tmp_path / "m.int8.onnx", tmp_path / "bundle"
    steps = [
        ("prune", teacher.path, "--ratio", "0.25", "-o", pruned),
        ("export", pruned, "--data", EVALUATION, "-o", onnx),
        ("quantize", onnx, "--calibration-data", CALIBRATION, "-o", int8),
        ("package", int8, "--data", CALIBRATION, "--name", "net", "--layout", "triton",
         "-o", bundle),
        ("verify", bundle),
    ]  # fmt: skip
    for step in steps:
        told = deploykit(*step)
        assert told.code == 0, (step, told.err)
        assert str(step[-1]) in told.out
    assert (bundle / "net" / "1" / "model.onnx").is_file()
    config = (bundle / "net" / "config.pbtxt").read_text()
    assert 'name: "net"' in config
    history = json.loads(deploykit("inspect", int8, "--json").out)["history"]
    assert [r["stage"] for r in history] == ["take", "prune", "export", "quantize"]


@pytest.mark.parametrize("metric", ["top1", "agreement"])
def test_evaluate_prints_one_document(
    deploykit: Command, teacher_int8: Artifact, teacher_onnx: Artifact, metric: str
) -> None:
    told = deploykit(
        "evaluate", teacher_int8.path, "--data", CALIBRATION, "--metric", metric,
        "--reference", teacher_onnx.path, "--json",
    )  # fmt: skip
    document = json.loads(told.out)
    assert document["schema"] == "deploykit.score/1"
    assert document["score"]["low"] < document["score"]["value"] <= document["score"]["high"]
    assert document["score"]["value"] > 0.9
    assert document["samples"] == 512


def test_a_metric_of_the_user_s_own(
    deploykit: Command, teacher_onnx: Artifact, tmp_path: Path
) -> None:
    (tmp_path / "metric.py").write_text(
        "def score(outputs, target, reference):\n"
        "    return (outputs['logits'].argmax(1) == target).mean()\n"
    )
    told = deploykit(
        "evaluate", teacher_onnx.path, "--data", CALIBRATION,
        "--metric", f"{tmp_path / 'metric.py'}:score",
    )  # fmt: skip
    assert told.code == 0
    assert told.out.startswith("metric.py:score 0.9")


def test_compare_tells_how_int8_differs(
    deploykit: Command, teacher_onnx: Artifact, teacher_int8: Artifact
) -> None:
    told = deploykit("compare", teacher_onnx.path, teacher_int8.path, "--data", CALIBRATION)
    assert told.code == 0
    assert "logits: max |difference|" in told.out
    document = json.loads(
        deploykit(
            "compare", teacher_onnx.path, teacher_onnx.path, "--data", CALIBRATION, "--json"
        ).out
    )
    assert document["outputs"][0]["max_absolute"] == 0


def test_doctor_says_what_works_here(deploykit: Command) -> None:
    document = json.loads(deploykit("doctor", "--json").out)
    assert document["checks"]["ort-cpu"] == {"ok": True, "reason": None}
    assert document["environment"]["cores"] >= 1
    assert "int8 preset here" in deploykit("doctor").out


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 500 test images."""
    path = tmp_path_factory.mktemp("few") / "few.npz"
    with np.load(EVALUATION) as arrays:
        np.savez(path, **{name: arrays[name][:500] for name in arrays})
    shutil.copy(FASHION / "preprocessing.toml", path.parent)
    return path


@pytest.mark.parametrize("drop", ["0.01", "1%"])
def test_a_promise_is_kept_and_told(
    deploykit: Command, teacher_onnx: Artifact, few: Path, tmp_path: Path, drop: str
) -> None:
    out = tmp_path / "q.onnx"
    told = deploykit(
        "quantize", teacher_onnx.path, "--calibration-data", CALIBRATION, "-o", out, "--json",
        "--max-drop", drop, "--evaluation-data", few, "--scope", "residual",
        "--calibration-method", "minmax",
    )  # fmt: skip
    assert told.code == 0, told.err
    search = json.loads(told.out)["history"][-1]["facts"]["search"]
    limit = 0.01 * (search["float_score"] if drop == "1%" else 1)
    assert search["float_score"] == pytest.approx(0.93, abs=0.02)  # top1, which is the default
    assert search["chosen"]["drop"] <= limit
    again = deploykit(
        "quantize", teacher_onnx.path, "--calibration-data", CALIBRATION, "-o", out,
        "--max-drop", drop, "--evaluation-data", few, "--scope", "residual",
        "--calibration-method", "minmax",
    )  # fmt: skip
    line = again.out.splitlines()[0]
    assert line.endswith("kept: made before of the same inputs, options and versions")
    lost = r"top1 0\.9\d+, was 0\.9\d+: .* \[.*\] .* 0\.0\d+ (allowed|may be lost,) on 500 samples"
    assert re.search(lost, line)
    ran = r"\(.* ms, was .* ms, batch 1, one thread\)"
    assert re.search(rf"x \[.*\] as fast as the float model on ort-cpu {ran}", line)


def test_a_promise_that_cannot_be_kept_is_a_no_and_writes_nothing(
    deploykit: Command, teacher_onnx: Artifact, few: Path, tmp_path: Path
) -> None:
    told = deploykit(
        "quantize", teacher_onnx.path, "--calibration-data", CALIBRATION,
        "-o", tmp_path / "q.onnx", "--max-drop", "0", "--evaluation-data", few,
        "--metric", "cosine", "--scope", "residual", "--calibration-method", "minmax",
        "--corrections", "none", "--json",
    )  # fmt: skip
    assert told.code == 7
    assert "no INT8 model keeps cosine within 0 of 1; the nearest is" in told.err
    assert "the best of what was tried: residual-minmax: loses " in told.err
    document = json.loads(told.out)
    assert (document["schema"], document["exit_code"]) == ("deploykit.error/1", 7)
    assert document["error"] in told.err
    facts = document["facts"]
    assert facts["nearest"]["name"] in {point["name"] for point in facts["candidates"]}
    assert facts["nearest"]["drop"] > facts["max_drop"] == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--metric", "cosine"), "go together"),
        (("--max-drop", "1%"), "go together"),
        (("--evaluation-data", EVALUATION), "go together"),
        (("--max-drop", "1 %%", "--evaluation-data", EVALUATION), "'1 %%' is no number from 0 up"),
        (("--max-drop", "-1%", "--evaluation-data", EVALUATION), "'-1%' is no number from 0 up"),
        (("--max-drop", "1", "--evaluation-data", EVALUATION), "a drop of 1 allows any top1"),
        (("--max-drop", "nan", "--evaluation-data", EVALUATION), "'nan' is no number from 0 up"),
    ],
)
def test_half_a_promise_is_refused(
    deploykit: Command,
    teacher_onnx: Artifact,
    tmp_path: Path,
    words: tuple[object, ...],
    named: str,
) -> None:
    told = deploykit(
        "quantize", teacher_onnx.path, "--calibration-data", CALIBRATION,
        "-o", tmp_path / "q.onnx", *words,
    )  # fmt: skip
    assert told.code == 2
    assert named in told.lines[0]
    assert not list(tmp_path.iterdir())


def test_convert_tells_what_it_made(
    deploykit: Command, tmp_path: Path, teacher_onnx: Artifact
) -> None:
    words = ("convert", teacher_onnx.path, "--data", CALIBRATION, "--precision", "fp16")
    told = deploykit(*words, "-o", tmp_path / "m.onnx")
    assert told.code == 0, told.err
    assert "fp16" in told.out
    assert "of the largest output" in told.out
