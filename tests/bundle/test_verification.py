from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit import _files, environment
from deploykit.bundle import BundleError, PackageOptions, golden, package, verify
from deploykit.dataset import Dataset
from deploykit.errors import AnswerIsNo, InputError, IntegrityError, MissingError
from deploykit.gpu import Gpu
from deploykit.values import Artifact
from tests.bundle.small_models import save_engine, save_linear

Change = Callable[[Callable[[dict[str, Any]], object]], None]
HERE = environment.read()
MODEL = "net/3/model.onnx"


def problems(bundle: Path) -> tuple[str, ...]:
    with pytest.raises(BundleError) as caught:
        verify(bundle)
    return caught.value.problems


def relist(bundle: Path, path: str) -> None:
    """Make the manifest describe the file as it is now, as one who forges a bundle would."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["path"] == path:
            entry |= {
                "size": (bundle / path).stat().st_size,
                "sha256": _files.sha256(bundle / path),
            }
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_a_sound_bundle(sound: Path):
    found = verify(sound)
    assert (found.name, found.version, found.layout, found.files) == ("net", 3, "triton", 9)
    assert found.size_bytes == sum(
        (sound / name).stat().st_size for name in _files.tree(sound) if name != "manifest.json"
    )
    assert found.golden_max_error == 0.0
    assert [check.golden_not_run for check in found.engines] == [None]
    assert len(found.checks) == 5


def test_an_onnx_engine_cannot_be_excused_from_its_golden_outputs(edit: Change, bundle: Path):
    edit(lambda m: m["engines"][0].update(golden=None, no_golden="trust me"))
    assert problems(bundle) == (f"{MODEL}: an ONNX model has golden outputs, this one has none",)


@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_a_manifest_that_names_other_tensors_is_a_matter_of_integrity(
    edit: Change, bundle: Path, kind: str
):
    edit(lambda m: m["engines"][0][kind][0].update(name="another"))
    with pytest.raises(IntegrityError, match=f"names other {kind} than the model has"):
        verify(bundle)


def test_a_link_to_a_bundle_is_followed(sound: Path, tmp_path: Path):
    (tmp_path / "current").symlink_to(sound)
    assert verify(tmp_path / "current").version == 3


def test_no_such_folder(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        verify(tmp_path / "nothing")


class TestFiles:
    def test_every_flipped_byte_is_found(self, bundle: Path):
        for name in _files.tree(bundle):
            content = (bundle / name).read_bytes()
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            (bundle / name).write_bytes(flipped)
            with pytest.raises(IntegrityError):
                verify(bundle)
            (bundle / name).write_bytes(content)
        assert verify(bundle)

    def test_every_missing_file_is_found(self, bundle: Path):
        for name in _files.tree(bundle):
            content = (bundle / name).read_bytes()
            (bundle / name).unlink()
            assert f"{name} is missing" in problems(bundle)[0].replace("'", "")
            (bundle / name).write_bytes(content)

    def test_truncated(self, bundle: Path):
        content = (bundle / MODEL).read_bytes()
        (bundle / MODEL).write_bytes(content[:-1])
        assert problems(bundle) == (f"'{MODEL}' has {len(content) - 1} bytes, not {len(content)}",)

    @pytest.mark.parametrize("where", ["extra", "net/3/extra", "net/.git", "golden/extra"])
    def test_extra_file(self, bundle: Path, where: str):
        (bundle / where).parent.mkdir(exist_ok=True)
        (bundle / where).write_text("?")
        assert f"'{where}' is not in the manifest" in problems(bundle)

    @pytest.mark.parametrize("where", ["empty", "net/4", "net/3/.git"])
    def test_empty_folder(self, bundle: Path, where: str):
        (bundle / where).mkdir()
        assert problems(bundle) == (f"folder '{where}' is not in the manifest",)

    def test_link_even_to_the_same_content(self, bundle: Path, tmp_path: Path):
        (bundle / MODEL).rename(tmp_path / "elsewhere")
        (bundle / MODEL).symlink_to(tmp_path / "elsewhere")
        assert problems(bundle) == (f"'{MODEL}' is a symbolic link",)

    def test_linked_folder(self, bundle: Path, tmp_path: Path):
        (bundle / "net" / "3").rename(tmp_path / "elsewhere")
        (bundle / "net" / "3").symlink_to(tmp_path / "elsewhere")
        assert problems(bundle) == (f"'{MODEL}' is missing", "'net/3' is a symbolic link")[::-1]

    def test_linked_manifest(self, bundle: Path, tmp_path: Path):
        (bundle / "manifest.json").rename(tmp_path / "elsewhere")
        (bundle / "manifest.json").symlink_to(tmp_path / "elsewhere")
        assert "cannot be read" in problems(bundle)[0]

    @pytest.mark.parametrize("name", [MODEL, "manifest.json"])
    def test_fifo_does_not_hang(self, bundle: Path, name: str):
        (bundle / name).unlink()
        os.mkfifo(bundle / name)
        assert "FIFO" in problems(bundle)[0] or "no regular file" in problems(bundle)[0]

    def test_socket(self, bundle: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(bundle)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("extra")
            assert problems(bundle) == ("'extra' is a socket",)

    def test_folder_in_place_of_a_file(self, bundle: Path):
        (bundle / MODEL).unlink()
        (bundle / MODEL).mkdir()
        assert f"'{MODEL}' is a folder" in problems(bundle)

    def test_hard_links_are_as_good_as_copies(self, bundle: Path, tmp_path: Path):
        os.link(bundle / MODEL, tmp_path / "other")
        assert verify(bundle)

    def test_a_name_that_is_no_text(self, bundle: Path):
        os.close(os.open(os.fsencode(bundle) + b"/\xff\n", os.O_CREAT, 0o600))
        assert problems(bundle) == (r"'\udcff\n' is not in the manifest",)

    def test_all_problems_are_told_at_once(self, bundle: Path):
        (bundle / MODEL).unlink()
        (bundle / "extra").write_text("?")
        (bundle / "evidence.json").write_text("{}")
        with pytest.raises(BundleError, match="3 problems") as caught:
            verify(bundle)
        assert len(caught.value.problems) == 3
        assert all(text in f"{caught.value} {caught.value.hint}" for text in caught.value.problems)
        assert caught.value.exit_code == 5


class TestMachine:
    def test_another_runtime_version(self, edit: Change, bundle: Path):
        edit(lambda m: m["engines"][0]["requires"].update(version="99.1"))
        with pytest.raises(
            MissingError, match=r"onnxruntime-gpu at least 99\.1 required"
        ) as caught:
            verify(bundle)
        assert caught.value.exit_code == 4

    def test_no_runtime(self, bundle: Path):
        bare = HERE.model_copy(update={"libraries": {}})
        with pytest.raises(MissingError, match=r"onnxruntime .* required, none found"):
            verify(bundle, environment=bare)

    def test_nothing_is_loaded_on_the_wrong_machine(
        self, edit: Change, bundle: Path, monkeypatch: pytest.MonkeyPatch
    ):
        def load(*_: object) -> None:
            raise AssertionError("loaded")

        monkeypatch.setattr("deploykit.bundle.verification.open_session", load)
        edit(lambda m: m["engines"][0]["requires"].update(machine="riscv64"))
        with pytest.raises(MissingError, match="architecture riscv64 required"):
            verify(bundle)

    def test_every_mismatch_is_told(self, edit: Change, bundle: Path):
        edit(
            lambda m: m["engines"][0]["requires"].update(
                machine="riscv64", system="Plan9", version="99", cpu_features_any=["vnni9"]
            )
        )
        with pytest.raises(MissingError) as caught:
            verify(bundle)
        for word in ("riscv64", "Plan9", "99", "vnni9"):
            assert f"{word} required" in str(caught.value)

    def test_a_backend_of_another_version_of_deploykit(self, edit: Change, bundle: Path):
        edit(lambda m: m["engines"][0].update(backend="ort-npu"))
        with pytest.raises(MissingError, match="backend ort-npu required"):
            verify(bundle)

    def test_files_come_before_the_machine(self, edit: Change, bundle: Path):
        edit(lambda m: m["engines"][0]["requires"].update(version="99.1"))
        (bundle / "extra").write_text("?")
        extra, machine = problems(bundle)
        assert extra == "'extra' is not in the manifest"
        assert "onnxruntime-gpu at least 99.1 required" in machine


class TestGolden:
    def test_changed_outputs(self, bundle: Path):
        path = "golden_outputs.npz"
        outputs = golden.read_arrays(bundle / path)
        outputs["y"][0, 0] += 0.01
        golden.write_arrays(bundle / path, outputs)
        relist(bundle, path)
        with pytest.raises(
            AnswerIsNo, match=r"'y' differs in 1 of 32 values, by up to 0\.01"
        ) as no:
            verify(bundle)
        assert no.value.exit_code == 7

    def test_another_model(self, bundle: Path, other_weights: Path):
        content = other_weights.read_bytes()
        (bundle / MODEL).write_bytes(content)
        relist(bundle, MODEL)
        with pytest.raises(AnswerIsNo, match="differs in 32 of 32"):
            verify(bundle)

    @pytest.fixture
    def other_weights(self, tmp_path: Path) -> Path:
        return save_linear(tmp_path / "other.onnx", seed=8).path

    def test_the_hint_tells_what_changed_since(self, bundle: Path):
        path = "golden_outputs.npz"
        golden.write_arrays(bundle / path, {"y": np.zeros((8, 4), np.float32)})
        relist(bundle, path)
        libraries = {**HERE.libraries, "onnxruntime": "1.99.0"}
        here = HERE.model_copy(update={"cpu_features": ("avx_vnni",), "libraries": libraries})
        with pytest.raises(AnswerIsNo) as caught:
            verify(bundle, environment=here)
        assert "now ('avx_vnni',)" in caught.value.hint
        assert "now 1.99.0" in caught.value.hint

    @pytest.mark.parametrize(
        "content", [b"", b"PK\x03\x04", b"\x80\x04N."], ids=["empty", "torn", "pickle"]
    )
    def test_no_npz(self, bundle: Path, content: bytes):
        for path in ("golden_inputs.npz", "golden_outputs.npz"):
            kept = (bundle / path).read_bytes()
            (bundle / path).write_bytes(content)
            relist(bundle, path)
            with pytest.raises(IntegrityError, match=r"not an \.npz of plain arrays"):
                verify(bundle)
            (bundle / path).write_bytes(kept)
            relist(bundle, path)

    def test_fewer_samples_than_listed(self, bundle: Path):
        golden.write_arrays(bundle / "golden_inputs.npz", {"x": np.zeros((7, 3), np.float32)})
        relist(bundle, "golden_inputs.npz")
        with pytest.raises(IntegrityError, match="does not hold 8 samples"):
            verify(bundle)

    @pytest.mark.parametrize("kind", ["atol", "rtol"])
    def test_a_tolerance_is_missing(self, edit: Change, bundle: Path, kind: str):
        edit(lambda m: m["engines"][0]["golden"].update({kind: {}}))
        with pytest.raises(IntegrityError, match="does not hold the outputs"):
            verify(bundle)

    def test_outputs_of_another_name(self, bundle: Path):
        golden.write_arrays(bundle / "golden_outputs.npz", {"z": np.zeros((8, 4), np.float32)})
        relist(bundle, "golden_outputs.npz")
        with pytest.raises(IntegrityError, match="does not hold the outputs"):
            verify(bundle)


def test_an_engine_that_nothing_here_runs_is_told(linear: Artifact, data: Dataset, tmp_path: Path):
    engine = save_engine(tmp_path / "m.engine")
    out = tmp_path / "bundle"
    models = [(engine, "tensorrt"), (linear, "ort-cpu")]
    package(models, PackageOptions(), out=out, data=data)
    with pytest.raises(MissingError, match=r"tensorrt exactly 11\.4\.0\.106 required, none found"):
        verify(out, environment=HERE.model_copy(update={"libraries": {}}))
    hopper = Gpu(name="H100", compute_capability="sm90", memory_bytes=1)
    libraries = {**HERE.libraries, "tensorrt": "11.4.0.106"}
    gpu_host = HERE.model_copy(update={"libraries": libraries, "gpus": (hopper,)})
    no_gpu = gpu_host.model_copy(update={"gpus": ()})
    with pytest.raises(MissingError, match="GPU sm90 required, no GPU found"):
        verify(out, environment=no_gpu)
    found = verify(out, environment=gpu_host)
    assert found.engines[0].golden_not_run == golden.no_runner("engine")
    assert "golden inputs not run" in found.checks[-2]
    assert "within tolerance" in found.checks[-1]
