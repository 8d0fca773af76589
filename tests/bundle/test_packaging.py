from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from pydantic import ValidationError

from deploykit import _files
from deploykit.bundle import PackagedModel, PackageOptions, golden, manifest, package, verify
from deploykit.bundle.publishing import publish
from deploykit.dataset import Dataset
from deploykit.errors import InputError, IntegrityError, MissingError, StageError, UsageError
from deploykit.formats import open_model
from deploykit.layouts import LAYOUTS
from deploykit.values import Artifact, Preprocessing, StageRecord
from tests.bundle.small_models import samples, save, save_engine, save_int8, save_linear

PLAIN = PackageOptions()


def test_a_plain_bundle_has_these_files_and_verifies(
    linear: Artifact, data: Dataset, tmp_path: Path
):
    out = tmp_path / "bundle"
    made = package(
        [PackagedModel(linear, "ort-cpu")], PLAIN, out=out, data=data, evidence={"top1": {"n": 1}}
    )
    assert _files.tree(out) == [
        "bom.cdx.json",
        "evidence.json",
        "golden_inputs.npz",
        "golden_outputs.npz",
        "manifest.json",
        "model.onnx",
        "model.onnx.record.json",
    ]
    assert {entry.path: entry.role for entry in made.files} == {
        "bom.cdx.json": "bom",
        "evidence.json": "evidence",
        "golden_inputs.npz": "golden",
        "golden_outputs.npz": "golden",
        "model.onnx": "model",
        "model.onnx.record.json": "record",
    }
    assert manifest.read(out) == made
    assert json.loads((out / "evidence.json").read_text()) == {"top1": {"n": 1}}
    assert verify(out).golden_max_error == 0.0
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_triton_bundle_has_no_folder_but_the_model(sound: Path):
    assert [path.name for path in sound.iterdir() if path.is_dir()] == ["net"]
    assert _files.tree(sound / "net") == ["3/model.onnx", "config.pbtxt", "warmup/input_0"]
    roles = {entry.path: entry.role for entry in manifest.read(sound).files}
    assert roles["net/config.pbtxt"] == "config"
    assert roles["net/3/model.onnx"] == "model"


def test_the_record_in_a_plain_bundle_is_the_models_history(
    linear: Artifact, data: Dataset, tmp_path: Path
):
    record = StageRecord(
        stage="export", options={}, facts={"opset": 17}, inputs={}, versions={}, seconds=1, key="k"
    )
    model = linear.model_copy(update={"history": (record,)})
    package([(model, "ort-cpu")], PLAIN, out=tmp_path / "bundle", data=data)
    assert open_model(tmp_path / "bundle" / "model.onnx").history == (record,)


def test_golden_outputs_are_the_packaged_engines_own(sound: Path, linear: Artifact, data: Dataset):
    inputs = golden.read_arrays(sound / "golden_inputs.npz")
    outputs = golden.read_arrays(sound / "golden_outputs.npz")
    first, _ = next(data.first(8).batches(8))
    np.testing.assert_array_equal(inputs["x"], first["x"])
    weights = onnx.numpy_helper.to_array(onnx.load(linear.path).graph.initializer[0])
    np.testing.assert_allclose(outputs["y"], first["x"] @ weights, rtol=1e-5)


def test_floats_have_a_tolerance_by_their_range_and_labels_none(data: Dataset, tmp_path: Path):
    graph = onnx.load(save_linear(tmp_path / "m.onnx").path).graph
    graph.node.append(onnx.helper.make_node("ArgMax", ["y"], ["label"], axis=1, keepdims=0))
    graph.output.append(onnx.helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]))
    model = save(graph, tmp_path / "labels.onnx")
    made = package([(model, "ort-cpu")], PLAIN, out=tmp_path / "bundle", data=data)
    expected = made.engines[0].golden
    assert expected is not None
    outputs = golden.read_arrays(tmp_path / "bundle" / "golden_outputs.npz")
    largest = float(np.abs(outputs["y"]).max())
    assert expected.atol == {"y": pytest.approx(1e-4 * largest), "label": 0.0}
    assert expected.rtol == {"y": 1e-4, "label": 0.0}
    other = {**outputs, "label": outputs["label"] + (np.arange(8) == 3)}
    assert "'label' differs in 1 of 8" in str(golden.compare(outputs, other, expected).problem)


def test_packaging_twice_differs_in_the_time_only(linear: Artifact, data: Dataset, tmp_path: Path):
    one, two = (
        package([(linear, "ort-cpu")], PLAIN, out=tmp_path / name, data=data) for name in "ab"
    )
    files = [[f for f in made.files if f.role != "bom"] for made in (one, two)]
    assert files[0] == files[1]


def test_several_models_are_told_apart(linear: Artifact, data: Dataset, tmp_path: Path):
    models = [(linear, "openvino"), (linear, "ort-cpu")]
    made = package(models, PLAIN, out=tmp_path / "bundle", data=data)
    assert [engine.path for engine in made.engines] == [
        "model.onnx",
        "model-fp32-ort-cpu.onnx",
    ]
    assert [check.backend for check in verify(tmp_path / "bundle").engines] == [
        "openvino",
        "ort-cpu",
    ]


def test_two_models_alike_are_refused(linear: Artifact, data: Dataset, tmp_path: Path):
    with pytest.raises(UsageError, match="two models are fp32-ort-cpu"):
        package([(linear, "ort-cpu")] * 2, PLAIN, out=tmp_path / "bundle", data=data)


def test_a_fixed_batch_is_filled_with_the_last_sample(data: Dataset, tmp_path: Path):
    model = save_linear(tmp_path / "four.onnx", batch=4)
    options = PackageOptions(golden_samples=6)
    made = package([(model, "ort-cpu")], options, out=tmp_path / "bundle", data=data)
    inputs = golden.read_arrays(tmp_path / "bundle" / "golden_inputs.npz")["x"]
    assert made.golden.samples == len(inputs) == 8
    assert made.engines[0].golden is not None
    assert made.engines[0].golden.batch_size == 4
    np.testing.assert_array_equal(inputs[5], inputs[7])
    assert verify(tmp_path / "bundle").golden_max_error == 0.0


def test_an_engine_is_packed_with_what_it_requires_and_no_golden_outputs(
    linear: Artifact, data: Dataset, tmp_path: Path
):
    engine = save_engine(tmp_path / "m.engine")
    models = [(engine, "tensorrt"), (linear, "ort-cpu")]
    made, portable = package(models, PLAIN, out=tmp_path / "bundle", data=data).engines
    assert (portable.path, portable.native_code) == ("model-fp32-ort-cpu.onnx", False)
    assert (made.path, made.native_code, made.golden) == ("model.engine", True, None)
    assert made.no_golden == golden.no_runner("engine")
    assert (made.requires.version, made.requires.match) == ("11.4.0.106", "exactly")
    assert made.requires.machine is not None
    assert made.requires.gpus == ("sm90",)


def test_native_code_alone_is_refused(data: Dataset, tmp_path: Path):
    engine = save_engine(tmp_path / "m.engine")
    with pytest.raises(UsageError, match="needs a portable ONNX model beside it"):
        package([(engine, "tensorrt")], PLAIN, out=tmp_path / "bundle", data=data)


def test_a_model_of_other_tensors_cannot_stand_in(data: Dataset, linear: Artifact, tmp_path: Path):
    other = save_int8(tmp_path / "other.onnx", largest_weight=9)
    renamed = other.model_copy(update={"outputs": linear.outputs, "inputs": ()})
    with pytest.raises(UsageError, match="cannot stand in"):
        package(
            [(linear, "ort-cpu"), (renamed, "openvino")], PLAIN, out=tmp_path / "bundle", data=data
        )


def test_an_engine_without_history_is_refused(data: Dataset, tmp_path: Path):
    engine = save_engine(tmp_path / "m.engine").model_copy(update={"history": ()})
    with pytest.raises(UsageError, match="without a history"):
        package([(engine, "tensorrt")], PLAIN, out=tmp_path / "bundle", data=data)


def test_a_torch_artifact_is_refused(linear: Artifact, data: Dataset, tmp_path: Path):
    model = linear.model_copy(update={"format": "torch"})
    with pytest.raises(UsageError, match="torch artifact") as caught:
        package([(model, "pytorch")], PLAIN, out=tmp_path / "bundle", data=data)
    assert "export it first" in caught.value.hint


def test_fp8_in_onnx_is_refused(linear: Artifact, data: Dataset, tmp_path: Path):
    model = linear.model_copy(update={"precision": "fp8"})
    with pytest.raises(UsageError, match="FP8 in ONNX") as caught:
        package([(model, "ort-cpu")], PLAIN, out=tmp_path / "bundle", data=data)
    assert "build an engine" in caught.value.hint


def test_no_model_is_refused(data: Dataset, tmp_path: Path):
    with pytest.raises(UsageError, match="no model"):
        package([], PLAIN, out=tmp_path / "bundle", data=data)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-rf",
        "a/b",
        "../a",
        "a\\b",
        "a b",
        "a\n",
        "ü",
        "x" * 101,
        "m.json",
    ],
)
def test_a_name_that_is_no_plain_folder_name_is_refused(name: str):
    with pytest.raises(ValidationError, match="name"):
        PackageOptions(name=name)


def test_every_layout_can_be_asked_for():
    annotation = PackageOptions.model_fields["layout"].annotation
    assert set(get_args(annotation)) == set(LAYOUTS)


def test_every_option_says_what_it_is():
    assert all(field.description for field in PackageOptions.model_fields.values())


class TestOutputInTheWay:
    def test_it_is_refused(self, linear: Artifact, data: Dataset, bundle: Path):
        before = (bundle / "manifest.json").read_bytes()
        with pytest.raises(UsageError, match="exists already"):
            package([(linear, "ort-cpu")], PLAIN, out=bundle, data=data)
        assert (bundle / "manifest.json").read_bytes() == before

    def test_a_bundle_is_replaced_when_forced(self, linear: Artifact, data: Dataset, bundle: Path):
        package([(linear, "ort-cpu")], PLAIN, out=bundle, data=data, force=True)
        assert verify(bundle).layout == "plain"

    def test_what_is_no_bundle_is_not_even_when_forced(
        self, linear: Artifact, data: Dataset, tmp_path: Path
    ):
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "one.jpg").write_text("dear")
        with pytest.raises(UsageError, match="no bundle"):
            package([(linear, "ort-cpu")], PLAIN, out=tmp_path / "photos", data=data, force=True)
        assert (tmp_path / "photos" / "one.jpg").read_text() == "dear"


class TestNothingIsLeftBehind:
    def left(self, folder: Path) -> list[str]:
        return sorted(path.name for path in folder.iterdir())

    @pytest.mark.parametrize("step", ["record", "write_arrays"])
    def test_when_it_is_interrupted(
        self,
        linear: Artifact,
        data: Dataset,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        step: str,
    ):
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(golden, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            package([(linear, "ort-cpu")], PLAIN, out=tmp_path / "bundle", data=data)
        assert self.left(tmp_path) == []

    def test_when_the_old_bundle_stays(
        self, linear: Artifact, data: Dataset, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ):
        def fail(*_: object) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(manifest, "to_json", fail)
        with pytest.raises(OSError, match="Input/output"):
            package([(linear, "ort-cpu")], PLAIN, out=bundle, data=data, force=True)
        assert self.left(bundle.parent) == ["bundle"]
        assert verify(bundle).version == 3

    def test_when_the_model_changed_since_it_was_opened(self, data: Dataset, tmp_path: Path):
        model = save_linear(tmp_path / "m.onnx")
        save_linear(tmp_path / "m.onnx", opset=18)
        with pytest.raises(IntegrityError, match="changed since"):
            package([(model, "ort-cpu")], PLAIN, out=tmp_path / "out" / "bundle", data=data)
        assert self.left(tmp_path / "out") == []

    def test_when_the_backend_is_not_installed(
        self, linear: Artifact, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("deploykit.backends.OpenVino.unavailable", lambda _: "no openvino here")
        with pytest.raises(MissingError, match="no openvino here"):
            package([(linear, "openvino")], PLAIN, out=tmp_path / "bundle", data=data)
        assert self.left(tmp_path) == []


class TestModelsNotFitForABundle:
    def test_random_answers(self, data: Dataset, tmp_path: Path):
        model = save_linear(tmp_path / "noisy.onnx", noise=True)
        with pytest.raises(StageError, match="differently in two runs"):
            package([(model, "ort-cpu")], PLAIN, out=tmp_path / "bundle", data=data)

    def test_answers_that_are_not_finite(self, tmp_path: Path):
        model = save_linear(tmp_path / "m.onnx")
        huge = samples(tmp_path / "huge.npz", x=np.full((4, 3), 3e38, np.float32))
        with pytest.raises(InputError, match="not finite"):
            package([(model, "ort-cpu")], PLAIN, out=tmp_path / "bundle", data=huge)

    @pytest.mark.parametrize("name", ["manifest.json", "golden_inputs.npz", "model.onnx"])
    def test_weights_with_the_name_of_a_file_of_the_bundle(
        self, data: Dataset, tmp_path: Path, name: str
    ):
        model = split_linear(tmp_path / "split.onnx", name)
        with pytest.raises(InputError, match="a name that the bundle's own files may have"):
            package([(model, "ort-cpu")], PLAIN, out=tmp_path / "bundle", data=data)
        assert not (tmp_path / "bundle").exists()

    def test_other_weights_of_one_name(self, data: Dataset, tmp_path: Path):
        for number in (1, 2):
            (tmp_path / str(number)).mkdir()
        one = split_linear(tmp_path / "1" / "m.onnx", "w.bin")
        two = split_linear(tmp_path / "2" / "m.onnx", "w.bin", scale=2)
        models = [(one, "ort-cpu"), (two.model_copy(update={"precision": "fp16"}), "ort-cpu")]
        with pytest.raises(InputError, match=r"other weights in files of one name, 'w\.bin'"):
            package(models, PLAIN, out=tmp_path / "bundle", data=data)

    def test_data_of_another_model(self, linear: Artifact, tmp_path: Path):
        other = samples(tmp_path / "other.npz", z=np.zeros((4, 3), np.float32))
        with pytest.raises(InputError, match="no array for the model input 'x'"):
            package([(linear, "ort-cpu")], PLAIN, out=tmp_path / "bundle", data=other)

    def test_a_backend_that_is_none(self, linear: Artifact, data: Dataset, tmp_path: Path):
        with pytest.raises(UsageError, match="no bundle is made for ort-cqu") as caught:
            package([(linear, "ort-cqu")], PLAIN, out=tmp_path / "bundle", data=data)
        assert caught.value.hint == "did you mean 'ort-cpu'?"


def split_linear(path: Path, weights: str, scale: float = 1.0) -> Artifact:
    """The small linear model with its weights in a file beside it."""
    proto = onnx.load(save_linear(path.with_name("whole.onnx")).path)
    for tensor in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor) * np.float32(scale)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, path, save_as_external_data=True, location=weights, size_threshold=0)
    return open_model(path)


class TestWeightsInAnotherFile:
    @pytest.mark.parametrize("layout", ["plain", "triton", "oci"])
    def test_they_go_with_the_model(self, data: Dataset, tmp_path: Path, layout: str):
        (tmp_path / "in").mkdir()
        model = split_linear(tmp_path / "in" / "split.onnx", "weights.bin")
        out, options = tmp_path / "bundle", PackageOptions(layout=layout, name="net")
        bundle = package([(model, "ort-cpu")], options, out=out, data=data)
        place = str(Path(bundle.engines[0].path).with_name("weights.bin"))
        assert {f.path: f.role for f in bundle.files}[place] == "model"
        shutil.rmtree(tmp_path / "in")
        moved = out.rename(tmp_path / "elsewhere")
        assert verify(moved).golden_max_error == 0
        if layout == "oci":
            return
        file = moved / place
        file.write_bytes(bytes(file.stat().st_size))
        with pytest.raises(IntegrityError, match=r"weights\.bin"):
            verify(moved)

    def test_they_are_published_and_the_bundle_stays_sound(self, data: Dataset, tmp_path: Path):
        model = split_linear(tmp_path / "split.onnx", "weights.bin")
        options = PackageOptions(layout="triton", name="net")
        package([(model, "ort-cpu")], options, out=tmp_path / "bundle", data=data)
        publish(tmp_path / "bundle", tmp_path / "repository")
        served = tmp_path / "repository" / "net" / "1"
        assert sorted(p.name for p in served.iterdir()) == ["model.onnx", "weights.bin"]
        assert open_model(served / "model.onnx").weights == ("weights.bin",)
        assert len(list((tmp_path / "repository").rglob("weights.bin"))) == 2


class TestPreprocessing:
    spec = Preprocessing(input="x", mean=(0.5,))

    def test_it_is_the_models(self, linear: Artifact, data: Dataset, tmp_path: Path):
        model = linear.model_copy(update={"preprocessing": self.spec})
        made = package([(model, "ort-cpu")], PLAIN, out=tmp_path / "bundle", data=data)
        assert made.preprocessing == self.spec

    def test_else_the_datas(self, linear: Artifact, data: Dataset, tmp_path: Path):
        data = replace(data, preprocessing=self.spec)
        made = package([(linear, "ort-cpu")], PLAIN, out=tmp_path / "bundle", data=data)
        assert made.preprocessing == self.spec

    def test_they_must_agree(self, linear: Artifact, data: Dataset, tmp_path: Path):
        model = linear.model_copy(update={"preprocessing": self.spec})
        data = replace(data, preprocessing=Preprocessing(input="x"))
        with pytest.raises(InputError, match="preprocessed differently"):
            package([(model, "ort-cpu")], PLAIN, out=tmp_path / "bundle", data=data)


def test_an_int8_model_is_verified_within_its_tolerance(tmp_path: Path):
    model = save_int8(tmp_path / "m.onnx", largest_weight=60)
    rng = np.random.default_rng(1)
    data = samples(tmp_path / "d.npz", x=rng.standard_normal((16, 64)).astype(np.float32))
    made = package([(model, "ort-cpu")], PLAIN, out=tmp_path / "bundle", data=data)
    assert made.engines[0].precision == "int8"
    expected = made.engines[0].golden
    assert expected is not None
    # Another honest arithmetic of the same file agrees; an error of 5 % of the range does not.
    other = model.model_copy(update={"path": tmp_path / "bundle" / "model.onnx"})
    want = golden.read_arrays(tmp_path / "bundle" / "golden_outputs.npz")
    with golden.open_session(other, "openvino") as session:
        inputs = golden.read_arrays(tmp_path / "bundle" / "golden_inputs.npz")
        answer = golden.run(session, inputs, expected.batch_size)
    assert golden.compare(want, answer, expected).problem is None
    shifted = {"y": want["y"] + np.float32(0.05) * np.abs(want["y"]).max()}
    assert golden.compare(want, shifted, expected).problem is not None
