"""Rows 18 to 22, 27 and 28 of SECURITY.md: bundles from anywhere, into a live repository."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest

from deploykit import environment
from deploykit.bundle import PackageOptions, package, sign, verify
from deploykit.dataset import Dataset
from deploykit.errors import IntegrityError
from deploykit.layouts import oci
from deploykit.values import Artifact
from tests.bundle.small_models import save_engine
from tests.bundle.test_verification import relist
from tests.cli.conftest import Command
from tests.security.conftest import Case, unchanged
from tests.security.small import Place, Words
from tests.security.test_models import bomb, custom, twice

ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
pytest.importorskip("model_signing", reason="model-signing is not installed: deploykit[sign]")
MODEL = "net/3/model.onnx"


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two private keys; the public ones beside them."""
    from tests.bundle.test_signature import write_key

    folder = tmp_path_factory.mktemp("keys")
    one, other = (
        write_key(folder / f"{name}.pem", ec.generate_private_key(ec.SECP256R1()))
        for name in ("key", "other")
    )
    return one, other


@pytest.fixture(scope="session")
def signed_bundle(
    sound: Path, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A signed bundle, not to be changed."""
    made = Path(shutil.copytree(sound, tmp_path_factory.mktemp("signed") / "bundle"))
    sign(made, keys[0])
    return made


def flip(bundle: Path) -> None:
    content = bytearray((bundle / MODEL).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / MODEL).write_bytes(content)


def edited(bundle: Path, **changes: Any) -> None:
    told = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**told, **changes}))


def renamed(bundle: Path) -> None:
    (bundle / MODEL).rename(bundle / "net/3/other.onnx")


def linked(bundle: Path) -> None:
    (bundle / MODEL).rename(bundle.parent / "elsewhere")
    (bundle / MODEL).symlink_to(bundle.parent / "elsewhere")


def torn(bundle: Path) -> None:
    path = bundle / "signature.json"
    path.write_text(path.read_text()[:-50])


def unsigned(bundle: Path) -> None:
    (bundle / "signature.json").unlink()


class Fault(NamedTuple):
    """What was done to a sound bundle, and what is told of it."""

    row: int
    name: str
    make: Callable[[Path], object]
    told: str
    code: str = ""

    def __str__(self) -> str:
        return f"{self.row}-{self.name.replace(' ', '-')}"


FAULTS = [
    Fault(18, "flipped byte", flip, "net/3/model.onnx", "SIGNATURE"),
    Fault(18, "missing", lambda b: (b / MODEL).unlink(), "is missing", "SIGNATURE"),
    Fault(18, "extra", lambda b: (b / "net/3/x.so").write_text(""), "net/3/x.so", "SIGNATURE"),
    Fault(18, "git folder", lambda b: (b / ".git").mkdir(), "folder '.git'", "FILES"),
    Fault(18, "renamed", renamed, "net/3/other.onnx", "SIGNATURE"),
    Fault(18, "empty folder", lambda b: (b / "e").mkdir(), "folder 'e'", "FILES"),
    Fault(18, "executable", lambda b: (b / MODEL).chmod(0o755), "is executable", "FILES"),
    Fault(18, "link", linked, "a symbolic link", "SIGNATURE"),
    Fault(18, "fifo", lambda b: os.mkfifo(b / "pipe"), "'pipe' is a FIFO", "FILES"),
    Fault(19, "torn signature", torn, "torn or was edited", "SIGNATURE"),
    Fault(19, "no signature", unsigned, "it is not signed", "UNSIGNED"),
    Fault(19, "edited manifest", lambda b: edited(b, version=9), "manifest.json", "SIGNATURE"),
    Fault(22, "writable by all", lambda b: b.chmod(0o777), "written to by everyone", "FILES"),
    Fault(22, "file writable by all", lambda b: (b / MODEL).chmod(0o666), "by everyone", "FILES"),
    Fault(22, "parent writable by all", lambda b: b.parent.chmod(0o777), "by everyone", "FILES"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_signed_bundle_that_was_changed(
    fault: Fault, signed_bundle: Path, keys: tuple[Path, Path], tmp_path: Path, deploykit: Command
) -> None:
    bundle = Path(shutil.copytree(signed_bundle, tmp_path / "in" / "bundle"))
    fault.make(bundle)
    key = ("--public-key", keys[0].with_suffix(".pub"))
    (tmp_path / "repository").mkdir()
    with unchanged(tmp_path):
        said = deploykit("verify", bundle, *key, "--json")
        assert said.code == 5
        document = json.loads(said.out)
        assert document["code"] == fault.code
        assert any(fault.told in problem for problem in document["problems"])
        if "parent" not in fault.name:  # a repository makes a private copy
            published = deploykit("publish", bundle, tmp_path / "repository", *key)
            assert published.code == 5, published.err


@pytest.mark.parametrize(
    ("model", "code", "told"),
    [
        (partial(bomb, 3), 6, "memory"),
        (partial(custom, "EPContext", "com.microsoft"), 5, "need native code of others"),
        (twice, 5, "net/3/model.onnx"),
    ],
    ids=["takes all memory", "native code", "unsound"],
)  # fmt: skip
def test_a_model_that_nobody_signed_for_is_first_read_by_a_process_with_limits(
    model: Callable[[], onnx.ModelProto], code: int, told: str, sound: Path, tmp_path: Path,
    deploykit: Command,
) -> None:  # fmt: skip
    bundle = Path(shutil.copytree(sound, tmp_path / "in" / "bundle"))
    onnx.save(model(), bundle / MODEL)
    relist(bundle, MODEL)
    (tmp_path / "repository").mkdir()
    with unchanged(tmp_path):
        said = deploykit("verify", bundle)
        assert said.code == code
        assert told in said.err
        assert deploykit("publish", bundle, tmp_path / "repository").code == code


def test_all_faults_are_told_at_once(
    signed_bundle: Path, keys: tuple[Path, Path], tmp_path: Path, deploykit: Command
) -> None:
    bundle = Path(shutil.copytree(signed_bundle, tmp_path / "bundle"))
    flip(bundle)
    (bundle / "extra").mkdir()
    edited(bundle, version=2)
    words = ("--public-key", keys[1].with_suffix(".pub"), "--min-version", 3, "--json")
    told = json.loads(deploykit("verify", bundle, *words).out)
    assert told["code"] == "WRONG_KEY"
    assert len(told["problems"]) == 4
    assert told["exit_code"] == 5


def test_an_old_bundle_is_not_taken_for_a_new_one(
    signed_bundle: Path, keys: tuple[Path, Path], deploykit: Command
) -> None:
    words = ("verify", signed_bundle, "--public-key", keys[0].with_suffix(".pub"))
    assert deploykit(*words, "--min-version", 3).code == 0
    told = deploykit(*words, "--min-version", 4)
    assert told.code == 5
    assert "version 3, at least 4 is wanted" in told.lines[0]


# --- image layouts: what an archive is elsewhere


@pytest.fixture(scope="session")
def image(linear: Artifact, data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as an OCI image layout, not to be changed."""
    out = tmp_path_factory.mktemp("image") / "layout"
    package([(linear, "ort-cpu")], PackageOptions(layout="oci"), out=out, data=data)
    return out


def relayered(layout: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the layers that the manifest names, all digests right."""
    index = json.loads((layout / "index.json").read_text())
    old = layout / "blobs/sha256" / index["manifests"][0]["digest"].removeprefix("sha256:")
    manifest = json.loads(old.read_text())
    change(manifest["layers"])
    old.unlink()
    index["manifests"][0] |= oci._text(layout, manifest, oci.IMAGE)
    (layout / "index.json").write_text(json.dumps(index))


def named(path: str) -> Callable[[Path], None]:
    def change(layers: list[dict[str, Any]]) -> None:
        layers[0]["annotations"][oci.FILEPATH] = path

    return lambda layout: relayered(layout, change)


def doubled(fold: Callable[[str], str]) -> Callable[[Path], None]:
    def change(layers: list[dict[str, Any]]) -> None:
        path = fold(layers[0]["annotations"][oci.FILEPATH])
        layers.append({**layers[0], "annotations": {oci.FILEPATH: path}})

    return lambda layout: relayered(layout, change)


def sized(layers: list[dict[str, Any]]) -> None:
    layers[0]["size"] = 10


def million(layers: list[dict[str, Any]]) -> None:
    layers.extend([layers[0]] * 20_000)


def blob(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Change the blob that the index names."""

    def fault(layout: Path) -> None:
        digest = json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
        change(layout / "blobs/sha256" / digest.removeprefix("sha256:"))

    return fault


def to_link(path: Path) -> None:
    path.rename(path.parents[3] / "elsewhere")
    path.symlink_to(path.parents[3] / "elsewhere")


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


IMAGES = [
    *(Fault(20, f"path {i}", named(path), "a layer's path is") for i, path in enumerate((
        "../evil", "/abs", "a/../../evil", "a//b", "./a", "a\\b", "nul\0byte", "x" * 300,
        "\udcff", "new\nline", ""))),
    Fault(20, "one path twice", doubled(str), "two layers are"),
    Fault(20, "case-fold clash", doubled(str.upper), "two layers are"),
    Fault(20, "file and folder", doubled("{}/below".format), "is a file and a folder"),
    Fault(20, "link as blob", blob(to_link), "cannot be read"),
    Fault(20, "fifo as blob", blob(to_fifo), "cannot be read"),
    Fault(20, "extra blob", lambda d: (d / "blobs/sha256/extra").write_text("?"), "nothing names"),
    Fault(21, "larger than its size", lambda d: relayered(d, sized), "not what its descriptor"),
    Fault(21, "too many", lambda d: relayered(d, million), "too many"),
]  # fmt: skip


@pytest.mark.parametrize("fault", IMAGES, ids=str)
def test_an_image_layout_that_was_changed(
    fault: Fault, image: Path, tmp_path: Path, deploykit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Path(shutil.copytree(image, tmp_path / "in" / "layout"))
    fault.make(layout)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    with unchanged(tmp_path):
        said = deploykit("verify", layout)
    assert said.code == 5, said.err
    assert fault.told in said.lines[0]


def test_golden_arrays_that_cannot_be_so_large(
    sound: Path, tmp_path: Path, deploykit: Command
) -> None:
    bundle = Path(shutil.copytree(sound, tmp_path / "bundle"))
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 3)}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
    with zipfile.ZipFile(bundle / "golden_inputs.npz", "w") as archive:
        archive.writestr("x.npy", file.getvalue() + bytes(96))
    relist(bundle, "golden_inputs.npz")
    with unchanged(tmp_path):
        told = deploykit("verify", bundle)
    assert told.code == 5
    assert "not an .npz of plain arrays" in told.lines[0]


def test_a_file_swapped_between_check_and_use(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploykit.bundle import verification

    bundle, real = Path(shutil.copytree(sound, tmp_path / "bundle")), verification.open_session

    def swapping(artifact: Artifact, *rest: Any) -> Any:
        content = artifact.path.read_bytes()
        artifact.path.unlink()
        artifact.path.write_bytes(content)
        return real(artifact, *rest)

    monkeypatch.setattr(verification, "open_session", swapping)
    with pytest.raises(IntegrityError, match="was changed while it was verified"):
        verify(bundle)


# --- the wrong machine, and a configuration that no server loads


def requiring(**wanted: Any) -> Callable[[Place], Words]:
    def words(place: Place) -> Words:
        bundle = Path(shutil.copytree(place.sound, place.folder / "bundle"))
        told = json.loads((bundle / "manifest.json").read_text())
        told["engines"][0]["requires"].update(wanted)
        (bundle / "manifest.json").write_text(json.dumps(told))
        return ("publish", bundle, place.folder / "results" / "repository")

    return words


def target(**machine: Any) -> Callable[[Place], Words]:
    """Publish for another machine."""

    def words(place: Place) -> Words:
        other = environment.read().model_copy(update=machine)
        path = place.written("target.json", other.model_dump_json())
        repository = place.folder / "results" / "repository"
        return ("publish", place.sound, repository, "--target", path)

    return words


def configured(good: str, bad: str) -> Callable[[Place], Words]:
    def words(place: Place) -> Words:
        bundle = Path(shutil.copytree(place.sound, place.folder / "bundle"))
        path = bundle / "net/config.pbtxt"
        assert good in path.read_text()
        path.write_text(path.read_text().replace(good, bad, 1))
        relist(bundle, "net/config.pbtxt")
        return ("publish", bundle, place.folder / "results" / "repository")

    return words


CASES = [
    Case(27, "architecture", requiring(machine="riscv64"), 4, "architecture riscv64 required"),
    Case(27, "system", requiring(system="Plan9"), 4, "system Plan9 required, Linux found"),
    Case(27, "runtime", requiring(version="99"), 4, "onnxruntime-gpu at least 99 required"),
    Case(27, "cpu feature", requiring(cpu_features_any=["vnni9"]), 4, "CPU feature vnni9 required"),
    Case(27, "no gpu", requiring(gpus=["sm90"]), 4, "GPU sm90 required, no GPU found"),
    Case(27, "driver", requiring(driver="999.1"), 4, "driver at least 999.1 required"),
    Case(27, "no runtime there", target(libraries={}), 4, "none found", "install what is required"),
    Case(28, "unknown field", configured("max_batch_size: 32", "max_batch: 32"), 3, "line "),
    Case(28, "negative", configured("max_batch_size: 32", "max_batch_size: -3"), 3, "below 0"),
    Case(28, "batch doubled", configured("dims: 3", "dims: -1\n  dims: 3"), 3, "dims are"),
    Case(28, "preferred", configured("dynamic_batching {",
                                     "dynamic_batching {\n preferred_batch_size: 99"), 3, "99"),
    Case(28, "name", configured('name: "net"', 'name: "ten"'), 3, "name is 'ten'"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_does_not_fit(case: Case, refuses: Callable[[Case], None]) -> None:
    refuses(case)


def test_an_engine_of_another_machine_is_not_touched(
    linear: Artifact, data: Dataset, tmp_path: Path, deploykit: Command
) -> None:
    """Only a runtime that fits reads an engine; these bytes would crash it."""
    models = [(save_engine(tmp_path / "m.engine"), "tensorrt"), (linear, "ort-cpu")]
    package(models, PackageOptions(), out=tmp_path / "bundle", data=data)
    with unchanged(tmp_path):
        told = deploykit("verify", tmp_path / "bundle")
    assert told.code == 4
    assert (
        "tensorrt exactly 11.4.0.106 required, none found; model.engine: GPU sm90 required"
        in told.lines[0]
    )
