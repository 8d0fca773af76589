"""Quantization-aware training: a student in Q/DQ ONNX learns as the engine computes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from deploykit import evaluation
from deploykit.backends import open_session
from deploykit.dataset import Dataset
from deploykit.environment import has_int8_dot_product
from deploykit.errors import AnswerIsNo, InputError
from deploykit.formats import onnx_file, onnx_module, open_model
from deploykit.report.history import lines
from deploykit.stages.build import BuildOptions, build, unavailable
from deploykit.stages.distill import DistillOptions, distill, models
from deploykit.stages.quantize import QuantizeOptions, quantize
from deploykit.values import Array, Artifact, SessionOptions
from tests.formats.test_onnx_graph import normal, parsed, stored

SCHEMES = {
    "full": {"scope": "all"},
    "partial": {"op_types_to_quantize": ("Conv",)},
    "mixed": {"scope": "all", "keep_float": ("layers.1*",)},
    "seven bits": {"scope": "compute", "processor": "any"},
    "tensorrt": {"target": "tensorrt"},
    "openvino": {"target": "openvino", "scope": "compute"},
}
TRAINED = DistillOptions(
    loss="mse", alpha=1, epochs=2, learning_rate=0.001, batch_size=64, weight_decay=0, threads=1
)


def outputs(artifact: Artifact, data: Dataset) -> Array:
    options = SessionOptions(simulate=not has_int8_dot_product())  # where 8-bit sums overflow
    with open_session(artifact, "ort-cpu", options) as session:
        return evaluation.collect(session, data)[0]["logits"]


def decibels(want: Array, have: Array) -> float:
    return float(10 * np.log10(np.square(want).sum() / np.square(want - have).sum()))


def clipped(source: Artifact, data: Dataset, out: Path, **options: object) -> Artifact:
    """Quantized with ranges that are far too narrow."""
    asked = {"calibration_method": "percentile", "percentile": 97.0, "corrections": ("none",)}
    return quantize(
        source, QuantizeOptions.model_validate({**asked, **options}), data=data.first(64), out=out
    )


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_engine_computes_what_was_trained(
    scheme: dict[str, object], teacher_onnx: Artifact, calibration: Dataset, evaluation: Dataset,
    tmp_path: Path,
) -> None:  # fmt: skip
    student = clipped(teacher_onnx, calibration, tmp_path / "q.onnx", **scheme)
    out = tmp_path / "trained.onnx"
    made = distill(student, TRAINED, teacher=teacher_onnx, data=calibration, out=out)
    assert (made.format, made.precision) == ("onnx", "int8")
    assert made.facts["engine_agreement_db"] > 30
    told = "\n".join(lines(made.history))
    assert "ONNX Runtime gives what was trained: " in told
    module = onnx_module.load(out)
    (feed, _), *_ = evaluation.first(256).batches(256)
    with torch.no_grad():
        have = module(torch.from_numpy(feed["images"]))[0].numpy()
    engine = outputs(made, evaluation.first(256))
    assert decibels(engine, have) > 30
    assert (engine.argmax(1) == have.argmax(1)).mean() > 0.99


def test_what_calibration_lost_is_learned_back(
    teacher_onnx: Artifact, calibration: Dataset, evaluation: Dataset, tmp_path: Path
) -> None:
    student = clipped(teacher_onnx, calibration, tmp_path / "q.onnx", scope="all")
    options = TRAINED.model_copy(update={"epochs": 8, "learning_rate": 0.002})
    made = distill(
        student, options, teacher=teacher_onnx, data=calibration, out=tmp_path / "o.onnx"
    )
    want = outputs(teacher_onnx, evaluation)
    before, after = (decibels(want, outputs(m, evaluation)) for m in (student, made))
    assert after > before + 4


def test_only_numbers_change_and_integers_stay_in_their_levels(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    student = clipped(
        teacher_onnx, calibration, tmp_path / "q.onnx", scope="compute", processor="any"
    )
    made = distill(
        student, TRAINED, teacher=teacher_onnx, data=calibration, out=tmp_path / "o.onnx"
    )
    old, new = onnx_file.read(student.path), onnx_file.read(made.path)
    assert list(old.graph.node) == list(new.graph.node)
    pairs = [
        [numpy_helper.to_array(t) for t in two]
        for two in zip(old.graph.initializer, new.graph.initializer, strict=True)
    ]
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    integers = [(a, b) for a, b in pairs if a.dtype == np.int8 and a.size > 1 and a.any()]
    assert any((a != b).any() for a, b in integers)
    assert max(np.abs(b.astype(int)).max() for _, b in integers) <= 64
    scales = [(a, b) for a, b in pairs if a.dtype == np.float32 and a.ndim == 0]
    assert any(a != b for a, b in scales)
    assert all(b > 0 for _, b in scales)


def test_the_scale_of_a_bias_follows_those_of_its_input_and_weights(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    student = clipped(teacher_onnx, calibration, tmp_path / "q.onnx", scope="compute")
    made = distill(
        student, TRAINED, teacher=teacher_onnx, data=calibration, out=tmp_path / "o.onnx"
    )
    model = onnx_file.read(made.path)
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    scales = {
        n.output[0]: arrays[n.input[1]] for n in model.graph.node if n.op_type == "DequantizeLinear"
    }
    convolutions = [n for n in model.graph.node if n.op_type == "Conv" and n.input[2] in scales]
    assert convolutions
    for node in convolutions:
        x, w, b = (scales[name] for name in node.input)
        np.testing.assert_allclose(b, x * w, rtol=1e-6)


def test_a_float_student_in_onnx_is_trained_too(tmp_path: Path) -> None:
    text = "(float[N,6] x) => (float[N,3] y) { h = MatMul(x, w) y = Add(h, b) }"
    models_ = []
    for seed, name in enumerate(("student", "teacher")):
        (tmp_path / name).mkdir()
        graph = parsed(text, w=normal(6, 3, seed=seed), b=normal(3, seed=seed))
        models_.append(stored(graph, tmp_path / name, x=normal(64, 6)))
    (student, data), (teacher, _) = models_
    options = DistillOptions(loss="mse", alpha=1, epochs=60, learning_rate=0.1, batch_size=32,
                             weight_decay=0, threads=1)  # fmt: skip
    made = distill(student, options, teacher=teacher, data=data, out=tmp_path / "o.onnx")
    learned, wanted = (onnx_file.read(m.path).graph.initializer for m in (made, teacher))
    for a, b in zip(learned, wanted, strict=True):
        np.testing.assert_allclose(numpy_helper.to_array(a), numpy_helper.to_array(b), atol=1e-2)


def test_a_training_is_taken_up_again_with_the_same_result(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = clipped(teacher_onnx, calibration, tmp_path / "q.onnx", scope="all")

    def run(name: str) -> Artifact:
        return distill(
            student, TRAINED, teacher=teacher_onnx, data=calibration.first(128),
            out=tmp_path / f"{name}.onnx",
        )  # fmt: skip

    whole, write = run("whole"), models.write

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        run("again")
    monkeypatch.setattr(models, "write", write)
    made = run("again")
    assert made.facts["resumed_after_epoch"] == 1
    assert made.path.read_bytes() == whole.path.read_bytes()


def test_an_engine_that_computes_something_else_is_refused(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = clipped(teacher_onnx, calibration, tmp_path / "q.onnx", scope="all")
    original = onnx_module.write

    def off(module: torch.nn.Module, source: Path) -> onnx.ModelProto:
        model = original(module, source)
        for tensor in model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype == np.int8 and array.size > 1:
                tensor.CopyFrom(numpy_helper.from_array(-array, tensor.name))
        return model

    monkeypatch.setattr(onnx_module, "write", off)
    with pytest.raises(AnswerIsNo, match="PyTorch and ONNX Runtime differ"):
        distill(student, TRAINED, teacher=teacher_onnx, data=calibration, out=tmp_path / "o.onnx")
    assert not (tmp_path / "o.onnx").exists()


def test_a_fixed_batch_is_refused(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    model = onnx_file.read(teacher_onnx.path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "fixed.onnx")
    fixed = open_model(tmp_path / "fixed.onnx")
    with pytest.raises(InputError, match="is fixed, a student is run on batches"):
        distill(fixed, TRAINED, teacher=teacher_onnx, data=calibration, out=tmp_path / "o.onnx")


def test_weights_in_blocks_are_refused(tmp_path: Path) -> None:
    source, data = stored(
        parsed("(float[N,64] x) => (float[N,2048] y) { y = MatMul(x, w) }", opset=21,
               w=normal(64, 2048)),
        tmp_path, x=normal(16, 64),
    )  # fmt: skip
    student = quantize(
        source, QuantizeOptions(precision="int4"), data=data, out=tmp_path / "q.onnx"
    )
    with pytest.raises(InputError, match="cannot be trained"):
        distill(student, TRAINED, teacher=source, data=data, out=tmp_path / "o.onnx")


def test_tensorrt_builds_what_was_trained(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    if reason := unavailable():
        pytest.skip(reason)
    student = clipped(teacher_onnx, calibration, tmp_path / "q.onnx", target="tensorrt")
    made = distill(
        student, TRAINED, teacher=teacher_onnx, data=calibration, out=tmp_path / "o.onnx"
    )
    shapes = {
        f"{k}_shapes": (f"images:{n}x1x28x28",) for k, n in (("min", 1), ("opt", 4), ("max", 8))
    }
    before, after = (
        build(m, BuildOptions.model_validate(shapes), out=tmp_path / f"{m.path.stem}.engine").facts
        for m in (student, made)
    )
    assert before["compute_layers_quantized"] > 0
    for fact in ("compute_layers_quantized", "compute_layers", "pairs_unfused"):
        assert before[fact] == after[fact]


def test_a_teacher_that_pytorch_reads_otherwise_is_refused_before_the_training(
    tmp_path: Path,
) -> None:
    """Softmax of old operator sets flattens what is behind its axis."""
    text = "(float[N,4,3] x) => (float[N,4,3] y) { h = Mul(x, w) y = Softmax(h) }"
    made = []
    for opset in (11, 17):
        (tmp_path / str(opset)).mkdir()
        graph = parsed(text, opset=opset, w=normal(4, 3))
        made.append(stored(graph, tmp_path / str(opset), x=normal(64, 4, 3)))
    (old, data), (new, _) = made
    with pytest.raises(AnswerIsNo, match=r"11/model.onnx: PyTorch and ONNX Runtime differ"):
        distill(new, TRAINED, teacher=old, data=data, out=tmp_path / "o.onnx")
