"""What must hold before native code is loaded; the bytes here are none that TensorRT would take."""

from __future__ import annotations

import hashlib
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deploykit import environment, gpu, store
from deploykit._tensorrt import DISTRIBUTIONS
from deploykit.errors import DeploykitError, IntegrityError, MissingError, ResourceError
from deploykit.formats import engine_file
from deploykit.gpu import Gpu
from deploykit.store import Job, Made
from deploykit.values import Artifact, Interval, Json

PLAN = bytes(range(256)) * 8
ADA = Gpu(name="fake Ada", compute_capability="sm89", memory_bytes=1 << 30)
FACTS: Json = {
    "flavour": "tensorrt-rtx",
    "flavour_version": "1.7.1.116",
    "compute_capabilities": ["sm89"],
    "flags": ["TF32"],
    "hardware_compatibility": "none",
}


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a GPU, both flavours, and no key yet; the folder of the key."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(gpu, "probe", lambda: ADA)
    installed = dict.fromkeys(DISTRIBUTIONS.values(), "1.7.1.116")
    monkeypatch.setattr(environment, "versions", lambda names: {n: installed[n] for n in names})
    return tmp_path / "state" / "deploykit"


def built(folder: Path, **facts: Any) -> Artifact:
    """An engine as the build stage publishes it, sealed with its facts."""
    said = {**FACTS, **facts}
    sealed = {**said, "sealed": engine_file.seal(PLAN, said)}

    def work(path: Path) -> Made:
        path.write_bytes(PLAN)
        return Made(format="engine", precision="int8", inputs=(), outputs=(), facts=sealed)

    job = Job(stage="build", source=None, options=Interval(value=0, low=0, high=0))
    return store.produce(job, work, out=folder / "m.engine", force=True)


def edited(made: Artifact, change: Json, sha256: str | None = None) -> Artifact:
    """The engine, opened again after somebody changed its record."""
    path = store.record_path(made.path)
    record = json.loads(path.read_text())
    record["history"][-1]["facts"] |= change
    record["sha256"] = sha256 or record["sha256"]
    path.write_text(json.dumps(record))
    return engine_file.open_file(made.path)


def refused(made: Artifact, kind: type[DeploykitError], told: str) -> None:
    with pytest.raises(kind, match=told) as caught:
        engine_file.read_plan(made)
    assert kind.exit_code == {MissingError: 4, IntegrityError: 5, ResourceError: 6}[kind]
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert "\n" not in caught.value.hint


def test_an_engine_that_was_built_here_opens(tmp_path: Path) -> None:
    assert engine_file.read_plan(built(tmp_path)) == PLAN
    assert engine_file.read_plan(engine_file.open_file(tmp_path / "m.engine")) == PLAN


@pytest.mark.parametrize(
    "torn", [PLAN[:-1] + b"\0", PLAN[:100], b"", PLAN + b"\0"],
    ids=["altered by a byte", "truncated", "empty", "longer"],
)  # fmt: skip
def test_an_engine_that_is_not_what_was_built_is_refused(tmp_path: Path, torn: bytes) -> None:
    made = built(tmp_path)
    made.path.write_bytes(torn)
    refused(made, IntegrityError, "not the file that its record describes")
    with pytest.raises(IntegrityError, match="sha256 differs"):
        engine_file.open_file(made.path)
    agreeing = edited(made, {}, sha256=hashlib.sha256(torn).hexdigest())
    refused(agreeing, IntegrityError, "not built on this machine")


@pytest.mark.parametrize("seal", ["", None, "0" * 64, "é" * 64, 7, ["x"]])
def test_an_engine_of_another_seal_is_refused(tmp_path: Path, seal: object) -> None:
    refused(edited(built(tmp_path), {"sealed": seal}), IntegrityError, "not built on this machine")


def test_an_engine_of_another_user_or_machine_is_refused(tmp_path: Path, machine: Path) -> None:
    made = built(tmp_path)
    (machine / "engine.key").unlink()
    refused(made, IntegrityError, "not built on this machine")
    assert not (machine / "engine.key").exists()  # to ask makes no key
    engine_file.seal(PLAN, FACTS)
    refused(made, IntegrityError, "not built on this machine")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"flavour": None}, "names no flavour"),
        ({"flavour": "pickle"}, r"names no flavour of TensorRT \(pickle\)"),
        ({"flavour_version": "1.7.1.115"}, "1.7.1.115, 1.7.1.116 is installed"),
        ({"flavour_version": "nonsense"}, "nonsense, 1.7.1.116 is installed"),
        ({"compute_capabilities": ["sm120"]}, "built for sm120, fake Ada is sm89"),
        ({"compute_capabilities": ["portable, sm90 and newer"]}, "sm90 and newer, fake Ada"),
        ({"compute_capabilities": ["portable, smx and newer"]}, "smx and newer, fake Ada"),
        ({"compute_capabilities": "sm89"}, "a GPU that its record does not name"),
        ({"compute_capabilities": 89}, "a GPU that its record does not name"),
        ({"compute_capabilities": None}, "a GPU that its record does not name"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_before_it_is_read(
    tmp_path: Path, change: Json, told: str
) -> None:
    made = edited(built(tmp_path), change)
    made.path.unlink()
    refused(made, MissingError, told)


@pytest.mark.parametrize(
    "change",
    [
        {"flavour": "tensorrt"},
        {"flavour_version": "1.7.1.116", "flags": ["VERSION_COMPATIBLE"]},
        {"compute_capabilities": ["sm89", "sm120"]},
        {"compute_capabilities": ["portable, sm80 and newer"]},
        {"hardware_compatibility": "ampere-plus"},
    ],
)
def test_a_record_that_was_edited_to_fit_is_refused(tmp_path: Path, change: Json) -> None:
    refused(edited(built(tmp_path), change), IntegrityError, "record was edited")


@pytest.mark.parametrize(
    ("facts", "fits"),
    [
        ({"compute_capabilities": ["sm120", "sm89"]}, True),
        ({"compute_capabilities": ["portable, sm80 and newer"]}, True),
        ({"compute_capabilities": ["sm80"]}, False),
        ({"compute_capabilities": ["sm80"], "hardware_compatibility": "ampere-plus"}, True),
        ({"compute_capabilities": ["sm80"], "hardware_compatibility": "none"}, False),
        ({"flavour_version": "1.6.9.1", "flags": ["VERSION_COMPATIBLE"]}, True),
        ({"flavour_version": "1.8.0.1", "flags": ["VERSION_COMPATIBLE"]}, False),
        ({"flavour_version": "0.9.0.1", "flags": ["VERSION_COMPATIBLE"]}, False),
        ({"flavour_version": "1.6.9.1"}, False),
    ],
)
def test_what_an_engine_was_built_for_fits(tmp_path: Path, facts: Json, fits: bool) -> None:
    made = built(tmp_path, **facts)
    if fits:
        assert engine_file.read_plan(made) == PLAN
    else:
        refused(made, MissingError, "does not fit this machine")


def test_no_driver_and_no_library_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = built(tmp_path)
    monkeypatch.setattr(gpu, "probe", lambda: "no NVIDIA driver on this machine")
    refused(made, MissingError, "does not fit this machine: no NVIDIA driver")
    monkeypatch.setattr(environment, "versions", lambda names: {})
    refused(made, MissingError, "tensorrt-rtx 1.7.1.116, which is not installed")


def test_the_key_is_this_user_s_alone(tmp_path: Path, machine: Path) -> None:
    built(tmp_path)
    assert stat.S_IMODE((machine / "engine.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(machine.stat().st_mode) == 0o700
    assert [path.name for path in machine.iterdir()] == ["engine.key"]
    assert (machine / "engine.key").stat().st_size == 32


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 33])
def test_a_torn_key_vouches_for_nothing(tmp_path: Path, machine: Path, content: bytes) -> None:
    made = built(tmp_path)
    (machine / "engine.key").write_bytes(content)
    refused(made, IntegrityError, "cannot vouch for an engine: it has not 32 bytes")
    with pytest.raises(IntegrityError, match="32 bytes"):
        engine_file.seal(PLAN, FACTS)
    assert (machine / "engine.key").read_bytes() == content


@pytest.mark.parametrize("mode", [0o644, 0o620, 0o604])
def test_a_key_that_others_know_vouches_for_nothing(
    tmp_path: Path, machine: Path, mode: int
) -> None:
    made = built(tmp_path)
    (machine / "engine.key").chmod(mode)
    refused(made, IntegrityError, "not this user's alone")


def test_a_key_is_no_link(tmp_path: Path, machine: Path) -> None:
    made = built(tmp_path)
    (machine / "engine.key").rename(tmp_path / "elsewhere")
    (machine / "engine.key").symlink_to(tmp_path / "elsewhere")
    refused(made, ResourceError, "cannot be kept")


def test_a_key_that_cannot_be_kept_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file in the way")
    with pytest.raises(ResourceError, match=r"engine\.key cannot be kept") as caught:
        engine_file.seal(PLAN, FACTS)
    assert "XDG_STATE_HOME" in caught.value.hint


def test_builds_at_the_same_time_agree_on_the_key() -> None:
    with ThreadPoolExecutor(16) as pool:
        seals = list(pool.map(lambda _: engine_file.seal(PLAN, FACTS), range(64)))
    assert len(set(seals)) == 1


def test_a_relative_state_folder_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    engine_file.seal(PLAN, FACTS)
    assert (tmp_path / "home" / ".local" / "state" / "deploykit" / "engine.key").is_file()
