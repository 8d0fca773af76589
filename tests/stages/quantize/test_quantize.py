from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deploykit.backends import open_session
from deploykit.dataset import Dataset, open_dataset
from deploykit.environment import is_arm
from deploykit.errors import AnswerIsNo, InputError, UsageError
from deploykit.evaluation import collect, evaluate
from deploykit.formats import open_model
from deploykit.stages.quantize import QuantizeOptions, preset, quantize, workshop
from deploykit.stages.quantize.calibration import observe
from deploykit.values import Artifact
from tests.fixtures_core import refused


def test_int8_keeps_the_score_and_is_smaller(
    teacher_onnx: Artifact, teacher_int8: Artifact, evaluation: Dataset
) -> None:
    assert teacher_onnx.path.stat().st_size > 3 * teacher_int8.path.stat().st_size
    with open_session(teacher_onnx) as one, open_session(teacher_int8) as other:
        before, after = (evaluate(s, evaluation, "top1").score.value for s in (one, other))
    assert before > 0.9
    assert after >= before - 0.01


def test_the_facts_account_for_every_compute_node(
    teacher_onnx: Artifact, teacher_int8: Artifact
) -> None:
    facts = teacher_int8.facts
    assert facts["compute_nodes"] == facts["compute_nodes_quantized"] == 14
    assert facts["multiply_accumulates_quantized"] == facts["multiply_accumulates"] > 1e6
    assert {n["operator"] for n in facts["float_nodes"]} <= {"Relu", "ReduceMean", "Reshape", "Add"}
    held = facts["search"]["held_back_samples"] if "search" in facts else 0
    assert facts["calibration_samples"] + held == 512
    counted = onnx.load(teacher_int8.path)
    pairs = sum(node.op_type == "QuantizeLinear" for node in counted.graph.node)
    assert pairs >= 14
    assert len(facts["ranges"]) <= pairs  # what a move passes on shares a range
    assert teacher_onnx.facts["operators"]["Conv"] == 13


def test_ranges_equal_numpy_s(teacher_onnx: Artifact, calibration: Dataset) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(teacher_onnx.path))
    some = calibration.first(50)
    names = ["images", model.graph.node[0].output[0], "logits"]
    seen = observe(model, names, some)
    ranges = {name: (histogram.low, histogram.high) for name, histogram in seen.items()}
    with open_session(teacher_onnx) as session:
        logits = collect(session, some)[0]["logits"]
    images = np.concatenate([feed["images"] for feed, _ in some.batches(50)])
    assert ranges["images"] == (images.min(), images.max())
    np.testing.assert_allclose(ranges["logits"], (logits.min(), logits.max()), rtol=1e-5)
    assert all(histogram.samples == 50 for histogram in seen.values())


def test_a_node_left_out_stays_in_float(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    node = next(n.name for n in onnx.load(teacher_onnx.path).graph.node if n.op_type == "Gemm")
    options = QuantizeOptions(nodes_to_exclude=(node,), calibration_samples=16)
    made = quantize(teacher_onnx, options, data=calibration, out=tmp_path / "m.onnx")
    assert made.facts["compute_nodes_quantized"] == 13
    kept = {n["node"]: n["reason"] for n in made.facts["float_nodes"]}
    assert kept[node] == "left out by request"


def test_only_the_operators_that_were_asked_for(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    options = QuantizeOptions(op_types_to_quantize=("Gemm",), calibration_samples=16)
    made = quantize(teacher_onnx, options, data=calibration, out=tmp_path / "m.onnx")
    assert made.facts["compute_nodes_quantized"] == 1


def test_tensorrt_gets_symmetric_int8_and_a_float_bias(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    options = QuantizeOptions(target="tensorrt", calibration_samples=64)
    made = quantize(teacher_onnx, options, data=calibration, out=tmp_path / "m.onnx")
    graph = onnx.load(made.path).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    points = [n.input[2] for n in graph.node if n.op_type == "QuantizeLinear"]
    assert points
    assert all(constants[p].dtype == np.int8 and not constants[p].any() for p in points)
    biases = [n.input[2] for n in graph.node if n.op_type == "Conv" and len(n.input) > 2]
    assert biases
    assert all(constants[b].dtype == np.float32 for b in biases)
    # No Q/DQ between a convolution and the activation function behind it.
    makers = {out: n.op_type for n in graph.node for out in n.output}
    behind = [n for n in graph.node if n.op_type == "Relu"]
    assert {makers[n.input[0]] for n in behind} <= {"Conv", "Add"}


def test_presets_depend_on_target_and_machine() -> None:
    assert preset("ort-cpu", int8_dot_product=True).weight_bits == 8
    assert preset("ort-cpu", int8_dot_product=False).weight_bits == 7
    assert preset("ort-cpu", int8_dot_product=True).quantize_bias
    assert not preset("tensorrt").quantize_bias
    assert preset("tensorrt").levels.symmetric


def _float_data(path: Path, **arrays: np.ndarray) -> Dataset:
    np.savez(path, **arrays)
    return open_dataset(path)


def _quantize_on(data: Path, model: Artifact, out: Path) -> None:
    quantize(model, QuantizeOptions(), data=open_dataset(data), out=out)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"images": np.zeros((4, 1, 28, 27), np.float32)}, "28, 27)"),
        ({"images": np.zeros((4, 1, 28, 28), np.float64)}, "float64"),
        ({"images": np.full((4, 1, 28, 28), np.nan, np.float32)}, "NaN"),
        ({"pixels": np.zeros((4, 1, 28, 28), np.float32)}, "'images'"),
        ({"images": np.zeros((0, 1, 28, 28), np.float32)}, "empty"),
    ],
)
def test_bad_calibration_data_is_refused_and_nothing_is_written(
    teacher_onnx: Artifact, tmp_path: Path, arrays: dict[str, np.ndarray], told: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError) as caught:
        _quantize_on(tmp_path / "data.npz", teacher_onnx, out / "m.onnx")
    assert told in str(caught.value)
    assert not list(out.iterdir())


def test_a_model_that_cannot_be_quantized_is_an_honest_no(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Cos", ["x"], ["y"], name="cos")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "cos.onnx")
    data = _float_data(tmp_path / "data.npz", x=np.arange(12, dtype=np.float32).reshape(4, 3))
    with pytest.raises(AnswerIsNo, match="0 of 0"):
        quantize(
            open_model(tmp_path / "cos.onnx"), QuantizeOptions(), data=data, out=tmp_path / "q.onnx"
        )
    assert not (tmp_path / "q.onnx").exists()


def test_quantizing_twice_is_refused(
    teacher_int8: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="quantized already"):
        quantize(teacher_int8, QuantizeOptions(), data=calibration, out=tmp_path / "m.onnx")


def test_an_unknown_pattern_or_operator_is_told_what_was_meant(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "m.onnx"
    with pytest.raises(UsageError, match="no node or module matches"):
        quantize(
            teacher_onnx, QuantizeOptions(nodes_to_exclude=("conv9",)), data=calibration, out=out
        )
    with pytest.raises(UsageError) as caught:
        quantize(
            teacher_onnx,
            QuantizeOptions(op_types_to_quantize=("Convv",)),
            data=calibration,
            out=out,
        )
    assert caught.value.hint == "did you mean 'Conv'?"


def test_the_same_work_is_not_done_twice(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    options, out = QuantizeOptions(calibration_samples=8), tmp_path / "m.onnx"
    first = quantize(teacher_onnx, options, data=calibration, out=out)
    touched = out.stat().st_mtime_ns
    assert quantize(teacher_onnx, options, data=calibration, out=out) == first
    assert out.stat().st_mtime_ns == touched
    other = QuantizeOptions(calibration_samples=9)
    with pytest.raises(UsageError, match="exists already"):
        quantize(teacher_onnx, other, data=calibration, out=out)
    assert out.stat().st_mtime_ns == touched
    forced = quantize(teacher_onnx, other, data=calibration, out=out, force=True)
    assert forced.facts["calibration_samples"] == 7  # and two to choose on
    assert forced.facts["search"]["held_back_samples"] == 2


def test_a_fixed_batch_is_calibrated_on_all_samples(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    model = onnx.load(teacher_onnx.path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / "four.onnx")
    made = quantize(
        open_model(tmp_path / "four.onnx"),
        QuantizeOptions(calibration_samples=6),
        data=calibration,
        out=tmp_path / "q.onnx",
    )
    free = quantize(
        teacher_onnx,
        QuantizeOptions(calibration_samples=6),
        data=calibration,
        out=tmp_path / "free.onnx",
    )
    for name, bounds in made.facts["ranges"].items():
        np.testing.assert_allclose(bounds, free.facts["ranges"][name], rtol=1e-4)


def test_the_calibration_cache_is_bound_to_model_and_data(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    real = workshop.observe

    def counted(*arguments: Any, **options: Any) -> Any:
        runs.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(workshop, "observe", counted)
    cache = tmp_path / "cache.json"

    def made(name: str, data: Dataset, **changes: Any) -> Artifact:
        options = QuantizeOptions(scope="compute", calibration_cache=str(cache), **changes)
        return quantize(teacher_onnx, options, data=data, out=tmp_path / name)

    first = made("a.onnx", calibration.first(16), calibration_method="percentile")
    again = made("b.onnx", calibration.first(16), calibration_method="percentile", percentile=99.99)
    assert (len(runs), first.facts["ranges"]) == (1, again.facts["ranges"])
    made("c.onnx", calibration.first(16), calibration_method="minmax")  # another method, same data
    assert len(runs) == 1
    made("d.onnx", calibration.first(17), calibration_method="minmax")
    assert len(runs) == 2
    cache.write_text(cache.read_text()[:1000])  # torn
    made("e.onnx", calibration.first(17), calibration_method="mse")
    assert len(runs) == 3


@pytest.mark.parametrize("there", ["folder", "notes", "model"])
def test_what_is_no_calibration_cache_is_never_replaced(
    there: str, teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    if there == "folder":
        cache.mkdir()
        (cache / "thesis.txt").write_text("all of it")
    else:
        cache.write_bytes(b"notes" if there == "notes" else teacher_onnx.path.read_bytes())
    before = sorted(tmp_path.rglob("*")), cache.is_file() and cache.read_bytes()
    options = QuantizeOptions(calibration_cache=str(cache), calibration_samples=16)
    with refused(UsageError, "is no calibration cache", hint="a file of its own"):
        quantize(teacher_onnx, options, data=calibration, out=tmp_path / "m.onnx")
    assert (sorted(tmp_path.rglob("*")), cache.is_file() and cache.read_bytes()) == before


def test_the_processor_that_will_serve_decides_the_bits_of_the_weights() -> None:
    def bits(processor: str) -> int:
        return QuantizeOptions(processor=processor).preset.weight_bits  # type: ignore[arg-type]

    assert (bits("vnni"), bits("any")) == (8, 7)
    assert bits("this") == preset("ort-cpu").weight_bits


@pytest.mark.parametrize("change", [{"target": "tensorrt"}, {"precision": "int4"}])
def test_a_processor_where_none_is_asked_about_is_refused(change: dict[str, str]) -> None:
    options = QuantizeOptions.model_validate({"processor": "arm", **change})
    with pytest.raises(UsageError, match=r"--processor arm is for int8 on a CPU"):
        _ = options.preset


def test_what_is_judged_on_another_runtime_says_so(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    options = QuantizeOptions(target="tensorrt", calibration_samples=16)
    made = quantize(teacher_onnx, options, data=calibration, out=tmp_path / "m.onnx")
    assert made.facts["search"]["runtime"] == "ort-cpu"
    assert made.facts["search"]["simulated"]
    assert any("engines are built here, not run" in warning for warning in made.facts["warnings"])


def test_what_is_for_an_arm_cpu_says_whose_times_it_has(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    options = QuantizeOptions(processor="arm", calibration_samples=16, corrections=("none",))
    assert options.preset.weight_bits == 8
    made = quantize(teacher_onnx, options, data=calibration, out=tmp_path / "m.onnx")
    told = any("by their times on this CPU" in warning for warning in made.facts["warnings"])
    assert told is not is_arm()


def test_a_candidate_names_the_one_whose_time_it_has(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    options = QuantizeOptions(scope="compute", calibration_samples=16, corrections=("none",))
    made = quantize(teacher_onnx, options, data=calibration, out=tmp_path / "m.onnx")
    candidates = made.facts["search"]["candidates"]
    assert len(candidates) == 5
    assert (
        len({c["timed_as"] for c in candidates}) == len({c["time_ratio"] for c in candidates}) == 1
    )
