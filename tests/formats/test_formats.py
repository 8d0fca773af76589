from __future__ import annotations

from pathlib import Path

import pytest

from deploykit import store
from deploykit.errors import InputError, IntegrityError
from deploykit.formats import ENGINES, open_model
from deploykit.store import Job, Made
from deploykit.values import Artifact, Interval
from tests.fixtures_core import refused


def produced(out: Path) -> Artifact:
    def work(path: Path) -> Made:
        path.write_text("native code")
        return Made(format="engine", precision="int8", inputs=(), outputs=(), facts={})

    options = Interval(value=0, low=0, high=0)
    return store.produce(Job(stage="build", source=None, options=options), work, out=out)


def test_a_torch_folder_is_opened_by_its_record(teacher: Artifact) -> None:
    assert open_model(teacher.path) == teacher
    assert open_model(str(teacher.path)) == teacher


def test_a_torch_folder_without_a_record_is_refused(teacher: Artifact, tmp_path: Path) -> None:
    for name in ("model.json", "factory.py", "weights.safetensors"):
        (tmp_path / name).write_bytes((teacher.path / name).read_bytes())
    with refused(InputError, tmp_path, "artifact.json is missing", hint="make the torch artifact"):
        open_model(tmp_path)


def test_a_torch_folder_that_was_changed_is_refused(teacher: Artifact, tmp_path: Path) -> None:
    for path in teacher.path.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert open_model(tmp_path).sha256 == teacher.sha256
    with (tmp_path / "factory.py").open("a") as file:
        file.write("print('changed')\n")
    with refused(IntegrityError, tmp_path, "sha256 differs", hint="make it again"):
        open_model(tmp_path)


@pytest.mark.parametrize("suffix", sorted(ENGINES))
def test_an_engine_is_opened_by_its_record_and_never_without(tmp_path: Path, suffix: str) -> None:
    artifact = produced(tmp_path / f"model{suffix}")
    assert open_model(artifact.path) == artifact
    store.record_path(artifact.path).unlink()
    with refused(InputError, artifact.path, "without a record", hint="build it with deploykit"):
        open_model(artifact.path)


def test_an_engine_that_was_changed_is_refused(tmp_path: Path) -> None:
    artifact = produced(tmp_path / "model.engine")
    artifact.path.write_text("other native code")
    with refused(IntegrityError, artifact.path, "sha256 differs", hint="make it again"):
        open_model(artifact.path)


@pytest.mark.parametrize("name", ["absent.onnx", "absent", "code.py:factory"])
def test_a_model_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with refused(InputError, tmp_path / name, "no such model", hint="file.py:factory"):
        open_model(tmp_path / name)


@pytest.mark.parametrize("name", ["model.pt", "model.ONNX", "model"])
def test_a_model_of_an_unknown_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with refused(InputError, tmp_path / name, repr(Path(name).suffix), hint="an .onnx file"):
        open_model(tmp_path / name)
