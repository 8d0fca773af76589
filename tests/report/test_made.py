from __future__ import annotations

from pathlib import Path
from typing import Any

from deploykit.report.made import describe
from deploykit.values import Artifact, StageRecord


def quantized(folder: Path, *, ratio: float = 0.5, **changes: Any) -> list[str]:
    """The lines told of a quantized model, in one of which a promise was kept."""
    path = folder / "m.onnx"
    path.write_bytes(b"x" * 2000)
    chosen = {
        "name": "all-mse", "sqnr_db": 31.4, "score": 0.75, "scored_samples": 100,
        "drop": 0.002, "drop_95": [-0.001, 0.005],
        "time_ratio": ratio, "time_ratio_95": [ratio - 0.1, ratio + 0.3],
        "float_ms": 200.0, "ms": 200.0 * ratio, "timed_as": "all-mse",
    }  # fmt: skip
    facts = {
        "candidate": "all-mse", "compute_nodes": 5, "compute_nodes_quantized": 4,
        "multiply_accumulates": 100, "multiply_accumulates_quantized": 97, "warnings": ["a", "b"],
    }  # fmt: skip
    search = {
        "runtime": "openvino", "held_back_samples": 8, "chosen": chosen, "float_score": 0.752,
        "metric": "top1", "max_drop": 0.005, "timed_on_target": True, "batch_size": 1,
    }  # fmt: skip
    for name in chosen.keys() & changes.keys():
        chosen[name] = changes.pop(name)
    record = StageRecord(
        stage="quantize", options={}, facts={**facts, "search": search | changes}, inputs={},
        versions={}, seconds=1, key="",
    )  # fmt: skip
    made = Artifact(
        path=path, format="onnx", precision="int8", inputs=(), outputs=(), sha256="",
        history=(record,),
    )  # fmt: skip
    return describe(made).splitlines()


def test_a_quantized_model_is_told_with_its_baseline_and_a_line_a_warning(tmp_path: Path) -> None:
    first, *warnings = quantized(tmp_path)
    assert first == (
        "int8, 2 kB, 4 of 5 compute nodes quantized with 97% of the multiply-accumulates, all-mse, "
        "31 dB to the float model on 8 samples, "
        "top1 0.75, was 0.752: 0.002 [-0.001, 0.005] lost of 0.005 allowed on 100 samples, "
        "2.00x [1.25, 2.50] as fast as the float model on openvino "
        "(100 ms, was 200 ms, batch 1, one thread)"
    )
    assert warnings == ["  warning: a", "  warning: b"]


def test_a_score_that_is_better_is_gained(tmp_path: Path) -> None:
    better = {"drop": -0.002, "drop_95": [-0.005, 0.001]}
    first = quantized(tmp_path, **better)[0]
    assert "0.002 [-0.001, 0.005] gained, 0.005 may be lost, on 100 samples" in first


def test_what_was_timed_elsewhere_has_no_speed_up(tmp_path: Path) -> None:
    first = quantized(tmp_path, timed_on_target=False)[0]
    assert first.endswith("not timed where it will run")
    assert "as fast" not in first


def test_a_record_of_an_older_deploykit_is_told_as_far_as_it_goes(tmp_path: Path) -> None:
    first = quantized(tmp_path, drop_95=None, timed_on_target=None)[0]
    assert first.endswith("0.002 lost of 0.005 allowed on 100 samples")
