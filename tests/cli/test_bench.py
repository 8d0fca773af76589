from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploykit.measure import BenchResult, read_result, write_result
from deploykit.measure.result import Instances, Preset
from deploykit.values import Artifact
from tests.cli.conftest import Command
from tests.conftest import FASHION

CALIBRATION = FASHION / "calibration.npz"


SHORT = ("--preset", "quick", "--processes", "1", "--blocks", "15", "--block-ms", "10")


@pytest.fixture(scope="module")
def kept(
    tmp_path_factory: pytest.TempPathFactory, teacher_onnx: Artifact, teacher_int8: Artifact
) -> Path:
    """What a short run kept."""
    from deploykit.cli import _errors, group

    out = tmp_path_factory.mktemp("kept") / "bench.json"
    words = [
        "bench", teacher_onnx.path, teacher_int8.path, "--backend", "ort-cpu",
        "--data", CALIBRATION, *SHORT, "-o", out,
    ]  # fmt: skip
    assert _errors.call(group, [str(word) for word in words]) == 0
    return out


@pytest.fixture
def again(
    kept: Path,
    deploykit: Command,
    teacher_onnx: Artifact,
    teacher_int8: Artifact,
    monkeypatch: pytest.MonkeyPatch,
) -> Command:
    """The command once more; what it measures is what was kept, to the nanosecond."""

    def call(*words: object, **changes: Any) -> Any:
        result = read_result(kept).model_copy(update=changes)
        monkeypatch.setattr("deploykit.cli.bench.bench", lambda *a, **k: result)
        return deploykit(
            "bench", teacher_onnx.path, teacher_int8.path, "--backend", "ort-cpu",
            "--data", CALIBRATION, *SHORT, *words,
        )  # fmt: skip

    return call


def earlier(kept: Path, out: Path, *, factor: float = 1, preset: Preset = "standard") -> Path:
    """The kept run, in which the second engine took `factor` of its time."""
    run = read_result(kept)
    base, other, control = run.measurements
    blocks = tuple(tuple(int(t * factor) for t in block) for block in other.blocks_ns)
    changed = other.model_copy(update={"blocks_ns": blocks})
    options = run.options.model_copy(update={"preset": preset})
    run = run.model_copy(update={"measurements": (base, changed, control), "options": options})
    write_result(run, out)
    return out


def test_bench_keeps_every_sample(kept: Path) -> None:
    document = json.loads(kept.read_text())
    assert document["schema"] == "deploykit.bench/1"
    assert all(len(m["blocks_ns"]) == 15 for m in document["measurements"])
    assert all(m["process_blocks"] == [15] for m in document["measurements"])


def test_bench_without_data_is_refused_and_random_is_marked(
    deploykit: Command, teacher_onnx: Artifact
) -> None:
    assert deploykit("bench", teacher_onnx.path).code == 2
    told = deploykit(
        "bench", teacher_onnx.path, "--backend", "ort-cpu", "--data", "random", *SHORT, "--json",
    )  # fmt: skip
    assert json.loads(told.out)["inputs"] == "random"


def test_no_regression_is_told_and_exits_0(again: Command, kept: Path, tmp_path: Path) -> None:
    told = again("--baseline", earlier(kept, tmp_path / "then.json"), "--compare-anyway")
    assert told.code == 0, told.err
    assert told.out.count("no regression (allowed 1.030x)") == 2
    assert "though the preset was quick now." in told.out


def test_a_regression_exits_7_and_the_result_is_kept(
    again: Command, kept: Path, tmp_path: Path
) -> None:
    then, out = earlier(kept, tmp_path / "then.json", factor=0.2), tmp_path / "now.json"
    told = again(
        "--baseline", then, "--max-regression", "5%", "--compare-anyway", "-o", out,
    )  # fmt: skip
    assert told.code == 7
    assert "REGRESSION (allowed 1.050x)" in told.out
    assert "teacher.int8.onnx" in told.err or "int8" in told.err
    assert "the time of the earlier run (allowed 1.050x, noise floor" in told.err
    assert [s.regressed for s in read_result(out).slowdowns] == [False, True]


def test_another_machine_is_refused_before_the_run(
    again: Command, kept: Path, tmp_path: Path
) -> None:
    then = earlier(kept, tmp_path / "then.json")
    plain = json.loads(then.read_text())
    plain["environment"]["cpu"] = "Z80"
    then.write_text(json.dumps(plain))
    told = again("--baseline", then)
    assert told.code == 2
    assert "the earlier run is no comparison: cpu: Z80 then, " in told.err
    assert "--compare-anyway" in told.err


def test_an_earlier_run_that_can_judge_nothing_is_refused_and_a_part_is_told(
    again: Command, kept: Path, tmp_path: Path
) -> None:
    then = earlier(kept, tmp_path / "then.json")
    run = read_result(then)
    base, other, control = run.measurements
    write_result(run.model_copy(update={"measurements": (base, control)}), then)
    told = again("--baseline", then, "--compare-anyway")
    assert told.code == 0, told.err
    assert f"though {other.name} (batch 1) is not in it." in told.out
    gone = [m.model_copy(update={"name": f"old {m.name}"}) for m in run.measurements]
    write_result(run.model_copy(update={"measurements": tuple(gone)}), then)
    told = again("--baseline", then, "--compare-anyway", measurements=None)  # it is not measured
    assert told.code == 2
    assert "no engine was measured in both runs" in told.err


def test_instances_that_failed_exit_7(again: Command, kept: Path) -> None:
    failed = Instances(
        name="net", batch_size=1, blocks_ns=((), ()), affinity=((0,), (1,)), shared=False,
        invalid="it crashed",
    )  # fmt: skip
    told = again(instances=(failed,))
    assert told.code == 7
    assert "2 instances of net at once are invalid: it crashed" in told.err


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (("--max-regression", "3%"), "--max-regression needs --baseline"),
        (("--max-drop", "1%"), "--max-drop needs --metric"),
        (("--compare-anyway",), "--compare-anyway needs --baseline"),
        (("--max-regression", "much"), "'much' is no share: write 3% or 0.03"),
        (("--max-regression", "-1%"), "'-1%' is no share"),
    ],
)
def test_half_a_gate_is_refused(again: Command, words: tuple[str, ...], needed: str) -> None:
    told = again(*words)
    assert told.code == 2
    assert needed in told.err


def test_a_lower_score_than_allowed_exits_7(again: Command) -> None:
    told = again("--metric", "cosine", "--max-drop", "0.0001%")
    assert told.code == 7
    assert "LOST TOO MUCH (allowed 1e-06)" in told.out
    assert "of cosine against" in told.err
    assert again("--metric", "cosine", "--max-drop", "100%").code == 0


def test_no_drop_can_be_allowed_from_an_infinite_score(again: Command) -> None:
    told = again("--metric", "sqnr", "--max-drop", "0.1")
    assert told.code == 2
    assert "is inf: no drop from it can be allowed" in told.err


def test_strict_fails_on_what_disturbs(again: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = ("the hypervisor took 9.0% of the CPU time during the run",)
    monkeypatch.setattr("deploykit.cli._limits.host.notes", lambda *a: [])
    assert again(disturbances=noise).code == 0
    told = again("--strict", disturbances=noise)
    assert told.code == 7
    assert "the machine is disturbed: the hypervisor took 9.0%" in told.err
    monkeypatch.setattr("deploykit.cli._limits.host.notes", lambda *a: ["it is busy"])
    assert "the machine is disturbed: it is busy" in again("--strict").err


def test_an_invalid_measurement_exits_7(again: Command, kept: Path) -> None:
    run: BenchResult = read_result(kept)
    bad = run.measurements[1].model_copy(update={"invalid": "it crashed"})
    told = again(measurements=(run.measurements[0], bad, run.measurements[2]))
    assert told.code == 7
    assert "is invalid: it crashed" in told.err
