from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit import environment
from deploykit.bundle import BundleError, PackageOptions, golden, load, package
from deploykit.dataset import Dataset
from deploykit.errors import AnswerIsNo, InputError, MissingError
from deploykit.values import Artifact
from tests.bundle.small_models import save_engine
from tests.bundle.test_verification import relist

Change = Callable[[Callable[[dict[str, Any]], object]], None]
HERE = environment.read()


@pytest.mark.parametrize("backend", ["ort-cpu", "openvino"])
def test_many_threads_get_their_own_answers(
    linear: Artifact, data: Dataset, tmp_path: Path, backend: str
):
    package([(linear, backend)], PackageOptions(), out=tmp_path / "bundle", data=data)
    feeds = [{"x": np.full((1, 3), n, np.float32)} for n in range(64)]
    with load(tmp_path / "bundle") as model, ThreadPoolExecutor(8) as pool:
        alone = [model.run(feed)["y"] for feed in feeds]
        for one, other in zip(alone, pool.map(lambda f: model.run(f)["y"], feeds), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_model_that_does_not_fit_is_passed_over_and_told(
    linear: Artifact, data: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    models = [(save_engine(tmp_path / "m.engine"), "tensorrt"), (linear, "ort-cpu")]
    package(models, PackageOptions(), out=tmp_path / "bundle", data=data)
    with load(tmp_path / "bundle") as model:
        assert model.engine.path == "model-fp32-ort-cpu.onnx"
        (why,) = model.passed_over.values()
    assert "GPU sm90 required" in why
    assert "no signature was checked" in why
    assert "model.engine is passed over" in caplog.text
    with pytest.raises(MissingError, match="no model of"):
        load(tmp_path / "bundle", environment=HERE.model_copy(update={"libraries": {}}))


def test_what_is_damaged_is_not_loaded(bundle: Path):
    with load(bundle) as model, pytest.raises(InputError, match="dtype is float64"):
        model.run({"x": np.zeros((1, 3))})
    golden.write_arrays(bundle / "golden_outputs.npz", {"y": np.zeros((8, 4), np.float32)})
    with pytest.raises(BundleError):
        load(bundle)
    relist(bundle, "golden_outputs.npz")
    with pytest.raises(AnswerIsNo, match="differs"):
        load(bundle)


def test_a_file_swapped_while_it_is_loaded(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    from deploykit.bundle import loading

    real = loading.open_session

    def swap(artifact: Artifact, *rest: Any) -> Any:
        content = artifact.path.read_bytes()
        artifact.path.unlink()
        artifact.path.write_bytes(content)
        return real(artifact, *rest)

    monkeypatch.setattr(loading, "open_session", swap)
    with pytest.raises(Exception, match="was changed while it was verified") as caught:
        load(bundle)
    assert caught.value.exit_code == 5  # type: ignore[attr-defined]


def test_modes_and_places_that_others_can_write_to(bundle: Path):
    model = bundle / "net/3/model.onnx"
    for path, mode in ((model, 0o755), (model, 0o646), (bundle, 0o757), (bundle.parent, 0o777)):
        was = path.stat().st_mode
        path.chmod(mode)
        with pytest.raises(BundleError, match=r"executable|written to by everyone"):
            load(bundle)
        path.chmod(was)
    load(bundle).close()


def test_an_image_layout_with_a_path_that_escapes(linear: Artifact, data: Dataset, tmp_path: Path):
    from deploykit.errors import IntegrityError
    from deploykit.layouts import oci

    out = tmp_path / "oci"
    package([(linear, "ort-cpu")], PackageOptions(layout="oci"), out=out, data=data)
    load(out).close()
    blobs = out / "blobs" / "sha256"
    (blobs / "extra").write_text("?")
    with pytest.raises(IntegrityError, match="nothing names the blob"):
        load(out)
    (blobs / "extra").unlink()
    index = json.loads((out / "index.json").read_text())
    digest = index["manifests"][0]["digest"].removeprefix("sha256:")
    text = (blobs / digest).read_text().replace('"bom.cdx.json"', '"../evil"')
    index["manifests"][0] |= oci._text(out, json.loads(text), oci.IMAGE)
    (blobs / digest).unlink()
    (out / "index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match=r"path is .\.\./evil"):
        load(out)
    assert not (tmp_path / "evil").exists()


def test_a_feed_that_is_no_arrays_is_told_so(sound: Path) -> None:
    with load(sound) as model:
        with pytest.raises(InputError, match="input 'x' is list, no numpy array"):
            model.run({"x": [[1.0, 2.0, 3.0]]})  # type: ignore[dict-item]
        with pytest.raises(InputError, match="a feed maps input names to arrays"):
            model.run(np.zeros((1, 3), np.float32))  # type: ignore[arg-type]
