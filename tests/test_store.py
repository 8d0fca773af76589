from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deploykit import _interrupt, _json, environment, store
from deploykit.errors import InputError, IntegrityError, UsageError
from deploykit.store import Job, Made
from deploykit.values import Artifact, Interval, Preprocessing, Score, TensorSpec, Value
from tests.fixtures_core import content, python, refused, told

SPEC = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
NAMES = st.text("abc.", min_size=1, max_size=5).filter(lambda n: n.strip("."))
JSON = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)

STAGE = """
import os, signal, sys, time
from pathlib import Path
from deploykit import store
from deploykit.store import Job, Made
from deploykit.values import Interval, TensorSpec
class Options(Interval): pass
out, kind, end = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def work(path):
    if kind == "folder":
        path.mkdir()
        for i in range(20): (path / f"{i}").write_bytes(bytes([i]) * 100_000)
    else:
        path.write_bytes(b"m" * 2_000_000)
    if end == "killed": os.kill(os.getpid(), signal.SIGKILL)
    return Made(format="torch", precision="fp32", inputs=(), outputs=(), facts={})
job = Job(stage="make", source=None, options=Interval(value=1, low=2, high=3))
print("ready", flush=True); input()
print(store.produce(job, work, out=out, force=True).sha256)
"""

REMEMBER = """
import sys
from pathlib import Path
from deploykit import store
from deploykit.values import Score, Interval
mine = float(sys.argv[2])
score = Score(metric="m", score=Interval(value=mine, low=mine, high=mine), samples=1,
              per_sample=(mine,) * 50_000)
print("ready", flush=True); input()
value, kept = store.remember(Path(sys.argv[1]), "key", Score, lambda: score)
print(value.score.value, len(set(value.per_sample)), value.per_sample[0])
"""


class Options(Value):
    size: int = 1
    names: tuple[str, ...] = ()
    where: Path | None = None


def job(source: Artifact | None = None, **options: Any) -> Job:
    return Job(stage="make", source=source, options=Options(**options))


def made(**changes: Any) -> Made:
    plain = Made(format="onnx", precision="fp32", inputs=(SPEC,), outputs=(SPEC,), facts={"n": 1})
    return plain.model_copy(update=changes)


def to_file(path: Path) -> Made:
    path.write_text("model")
    return made()


def to_folder(path: Path) -> Made:
    path.mkdir()
    (path / "model.json").write_text("{}")
    (path / "deep").mkdir()
    (path / "deep" / "weights").write_text("w")
    return made(format="torch")


def never(path: Path) -> Made:
    pytest.fail("the work was done again")


BOTH = pytest.mark.parametrize("work", [to_file, to_folder])


# --- made, kept, found again


@BOTH
def test_what_is_made_is_published_with_its_record(tmp_path: Path, work: Any) -> None:
    out = tmp_path / "model"
    artifact = store.produce(job(size=3), work, out=out)
    assert artifact.path == out
    assert artifact.sha256 == store.digest(out)
    assert (artifact.inputs, artifact.outputs, artifact.facts) == ((SPEC,), (SPEC,), {"n": 1})
    record = artifact.history[-1]
    assert (record.stage, record.options["size"], record.inputs) == ("make", 3, {})
    assert record.versions == environment.versions(("deploykit",))
    assert record.key == job(size=3).key
    assert 0 <= record.seconds < 60
    assert store.read(out) == artifact
    assert store.find(out, record.key) == artifact


def test_a_file_has_its_record_beside_it_and_a_folder_inside(tmp_path: Path) -> None:
    store.produce(job(), to_file, out=tmp_path / "a.onnx")
    store.produce(job(), to_folder, out=tmp_path / "b")
    assert sorted(content(tmp_path)) == ["a.onnx", "a.onnx.record.json", "b"]
    assert sorted(content(tmp_path / "b")) == ["artifact.json", "deep", "model.json"]


@BOTH
def test_the_same_job_is_not_done_twice(tmp_path: Path, work: Any) -> None:
    first = store.produce(job(), work, out=tmp_path / "model")
    before = content(tmp_path)
    for force in (False, True):
        assert store.produce(job(), never, out=tmp_path / "model", force=force) == first
    assert content(tmp_path) == before


@BOTH
def test_another_job_does_not_write_over_it_unless_forced(tmp_path: Path, work: Any) -> None:
    out = tmp_path / "model"
    first, before = store.produce(job(), work, out=out), content(tmp_path)
    with refused(UsageError, out, "exists already", hint="--force"):
        store.produce(job(size=2), never, out=out)
    assert content(tmp_path) == before
    second = store.produce(job(size=2), work, out=out, force=True)
    assert second.history[-1].key != first.history[-1].key
    assert store.read(out) == second


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path, force: bool) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "holiday.png").write_text("precious")
    with refused(UsageError, out, hint="give another output path"):
        store.produce(job(), never, out=out, force=force)
    assert sorted(content(out)) == ["holiday.png"]
    (out / "holiday.png").unlink()
    assert store.produce(job(), to_folder, out=out, force=True).path == out  # empty by now


@BOTH
def test_a_model_that_was_changed_is_not_taken_for_the_one_made(tmp_path: Path, work: Any) -> None:
    out = tmp_path / "model"
    artifact = store.produce(job(), work, out=out)
    (out / "model.json" if out.is_dir() else out).write_text("changed")
    with refused(IntegrityError, out, "sha256 differs", hint="make it again"):
        store.read(out)
    assert store.find(out, artifact.history[-1].key) is None
    assert store.produce(job(), work, out=out, force=True).sha256 == artifact.sha256
    assert store.read(out) is not None


@pytest.mark.parametrize("record", ["", "{", "[]", "{}", '{"path": 5}', "\0"])
def test_a_torn_record_is_refused_and_never_found(tmp_path: Path, record: str) -> None:
    out = tmp_path / "model.onnx"
    artifact = store.produce(job(), to_file, out=out)
    store.record_path(out).write_text(record)
    with refused(InputError, store.record_path(out), hint=""):
        store.read(out)
    assert store.find(out, artifact.history[-1].key) is None


def test_a_model_without_a_record_is_no_artifact(tmp_path: Path) -> None:
    assert store.read(tmp_path / "absent") is None
    (tmp_path / "model").write_text("x")
    assert store.read(tmp_path / "model") is None
    shutil.copy(tmp_path / "model", tmp_path / "model.record.json")
    (tmp_path / "model").unlink()
    assert store.read(tmp_path / "model") is None  # a record without a model


@BOTH
def test_an_artifact_may_be_moved(tmp_path: Path, work: Any) -> None:
    artifact = store.produce(job(), work, out=tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    for path in (tmp_path / "model", tmp_path / "model.record.json"):
        if path.exists():
            path.rename(tmp_path / "elsewhere" / path.name)
    moved = tmp_path / "elsewhere" / "model"
    assert store.read(moved) == artifact.model_copy(update={"path": moved})
    assert str(tmp_path) not in store.record_path(moved).read_text()


def test_a_record_says_not_where_it_lies(tmp_path: Path) -> None:
    texts = {
        store.record_text(store.produce(job(), to_file, out=tmp_path / name / "m.onnx").model_copy(
            update={"history": ()}
        ))
        for name in ("a", "b")
    }  # fmt: skip
    assert len(texts) == 1
    assert json.loads(texts.pop())["path"] == "."


# --- lineage


def test_the_history_and_the_preprocessing_go_on(tmp_path: Path) -> None:
    spec = Preprocessing(mean=(0.5,))
    first = store.produce(
        job(), lambda path: to_file(path) and made(preprocessing=spec), out=tmp_path / "a"
    )
    second = store.produce(job(first, size=2), to_file, out=tmp_path / "b")
    assert second.history[:-1] == first.history
    assert second.history[-1].inputs == {"source": first.sha256}
    assert second.preprocessing == spec
    own = Preprocessing(mean=(0.1,))
    third = store.produce(
        job(second), lambda path: to_file(path) and made(preprocessing=own), out=tmp_path / "c"
    )
    assert third.preprocessing == own
    assert len(third.history) == 3


# --- the key


def test_the_key_is_of_everything_that_decides_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = store.produce(job(), to_file, out=tmp_path / "m")
    plain = Job(stage="s", source=source, options=Options(), others={"data": "1"})
    others = [
        plain.model_copy(update=change)
        for change in (
            {"stage": "t"},
            {"source": None},
            {"source": source.model_copy(update={"sha256": "0"})},
            {"options": Options(size=2)},
            {"options": Options(names=("1",))},
            {"others": {"data": "2"}},
            {"others": {"teacher": "1"}},
            {"libraries": ("numpy",)},
        )
    ]
    keys = [j.key for j in (plain, *others)]
    assert len(set(keys)) == len(keys)
    assert plain.model_copy().key == plain.key
    moved = source.model_copy(update={"path": tmp_path / "elsewhere"})
    assert plain.model_copy(update={"source": moved}).key == plain.key
    monkeypatch.setattr(store, "code_digest", lambda: "other code")
    assert plain.key not in keys


def test_the_key_is_of_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    used = Job(stage="s", source=None, options=Options(), libraries=("numpy",))
    before = used.key
    monkeypatch.setattr(store, "versions", lambda names: dict.fromkeys(names, "9"))
    assert used.key != before


OPTIONS = st.builds(
    Options, size=st.integers(), names=st.lists(st.text(max_size=3), max_size=3).map(tuple),
    where=st.none() | st.just(Path("a")),
)  # fmt: skip


@settings(max_examples=30)
@given(OPTIONS, OPTIONS)
def test_keys_are_equal_if_and_only_if_the_options_are(one: Options, other: Options) -> None:
    keys = [Job(stage="s", source=None, options=o).key for o in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)
    assert Job(stage="s", source=None, options=one.model_copy()).key == keys[0]


@settings(max_examples=30)
@given(JSON, st.randoms(use_true_random=False))
def test_a_digest_does_not_know_the_order_of_keys(data: dict[str, Any], random: Any) -> None:
    items = list(data.items())
    random.shuffle(items)
    again = json.loads(json.dumps(dict(items)))
    assert store.digest_of(dict(items)) == store.digest_of(data) == store.digest_of(again)


@settings(max_examples=30)
@given(JSON, JSON)
def test_other_data_has_another_digest(one: dict[str, Any], other: dict[str, Any]) -> None:
    assume(json.dumps(one, sort_keys=True) != json.dumps(other, sort_keys=True))
    assert store.digest_of(one) != store.digest_of(other)


def test_the_code_digest_is_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    digests = set()
    monkeypatch.setattr(store, "__file__", str(package / "store.py"))
    for name, text in [("a.py", "1"), ("a.py", "2"), ("b.py", "2"), ("b.md", "no code")]:
        (package / name).write_text(text)
        digests.add(store.code_digest.__wrapped__())
    assert len(digests) == 3


# --- digests of folders


@st.composite
def folders(draw: st.DrawFn) -> dict[str, bytes]:
    return draw(st.dictionaries(NAMES, st.binary(max_size=3), max_size=3))


def laid_out(folder: Path, files: dict[str, bytes]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "deep").mkdir(parents=True)
    for name, data in files.items():
        (folder / "deep" / name).write_bytes(data)
    return folder


@settings(max_examples=30)
@given(folders(), folders())
def test_folders_have_equal_digests_if_and_only_if_equal_files(
    tmp_path_factory: pytest.TempPathFactory, one: dict[str, bytes], other: dict[str, bytes]
) -> None:
    base = tmp_path_factory.getbasetemp() / "folders"
    digests = [store.digest(laid_out(base / n, f)) for n, f in (("a", one), ("b", other))]
    assert (digests[0] == digests[1]) == (one == other)
    backwards = laid_out(base / "c", dict(reversed(one.items())))
    assert store.digest(backwards) == digests[0]


def test_the_digest_of_a_folder_is_of_names_too_but_not_of_its_record(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "f", {"a": b"1", "b": b"2"})
    before = store.digest(folder)
    (folder / store.FOLDER_RECORD).write_text("{}")
    assert store.digest(folder) == before
    (folder / "deep" / store.FOLDER_RECORD).write_text("{}")  # only the one at the top is a record
    assert store.digest(folder) != before
    (folder / "deep" / store.FOLDER_RECORD).unlink()
    for other in ("deep/c", "b"):
        (folder / "deep" / "b").rename(folder / other)
        assert store.digest(folder) != before
        (folder / other).rename(folder / "deep" / "b")
    assert store.digest(folder) == before


# --- failures in the middle


@BOTH
def test_a_failing_stage_leaves_what_was_there(tmp_path: Path, work: Any) -> None:
    out = tmp_path / "model"
    first, before = store.produce(job(), work, out=out), content(tmp_path)

    def fails(path: Path) -> Made:
        work(path)
        raise InputError("bad", hint="better")

    with refused(InputError, "bad", hint="better"):
        store.produce(job(size=2), fails, out=out, force=True)
    assert content(tmp_path) == before
    assert store.read(out) == first


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_stage_leaves_what_was_there(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "model"
    work = to_file if kind == "file" else to_folder
    first = store.produce(job(), work, out=out)
    process = python(STAGE, out, kind, "killed", wait=False)
    process.communicate("\n", timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.glob(".*"))[0] == ".model.lock"
    assert store.read(out) == first
    store.produce(job(size=2), work, out=out, force=True)
    assert not list(tmp_path.glob(".*"))


STEPS = """
import os, shutil, signal, sys
from pathlib import Path
from deploykit import store
from deploykit.store import Job, Made
from deploykit.values import Interval
def work(path):
    path.write_text("new")
    return Made(format="torch", precision="fp32", inputs=(), outputs=(), facts={})
steps = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
def make(out, step):
    left = [step]
    def count(event, arguments):
        if event in steps and str(out.parent) in str(arguments[0]):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    job = Job(stage="again", source=None, options=Interval(value=1, low=2, high=3))
    store.produce(job, work, out=out, force=True)
store.code_digest()
base, code = Path(sys.argv[1]), 1
for step in range(1, 100):
    shutil.copytree(base / "pristine", base / str(step))
    if not os.fork():
        make(base / str(step) / "model.onnx", step)
        os._exit(0)
    if not os.wait()[1]:
        print(step)
        break
"""


def test_a_kill_before_any_step_leaves_old_or_new_with_its_record(tmp_path: Path) -> None:
    """Processes kill themselves before their 1st, 2nd, ... step on the file system."""
    old = store.produce(job(), to_file, out=tmp_path / "pristine" / "model.onnx")
    count, seen = int(told(python(STEPS, tmp_path))[0]), []
    for step in range(1, count + 1):
        out = tmp_path / str(step) / "model.onnx"
        found = store.read(out)
        assert found is not None
        seen.append(found.history[-1].stage)
        assert (seen[-1] == "again") == (out.read_text() == "new")
        assert (seen[-1] == "make") == (found.sha256 == old.sha256)
        store.produce(job(size=9), to_file, out=out, force=True)
        assert sorted(content(out.parent)) == ["model.onnx", "model.onnx.record.json"]
    assert seen == sorted(seen, reverse=True)
    assert 10 < seen.index("again") < count - 1


def test_an_error_between_model_and_record_parts_them_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.onnx"
    store.produce(job(), to_file, out=out)
    real = os.fsync

    def dies(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir() and out.read_text() == "new":
            monkeypatch.setattr(os, "fsync", real)
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr(os, "fsync", dies)
    with pytest.raises(KeyboardInterrupt):
        store.produce(job(size=2), lambda p: (p.write_text("new"), made())[1], out=out, force=True)
    assert out.read_text() == "new"
    assert store.find(out, job(size=2).key)
    assert sorted(content(tmp_path)) == ["model.onnx", "model.onnx.record.json"]


def test_a_waiting_record_of_another_model_is_not_taken(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    old = store.produce(job(), to_file, out=out)
    (tmp_path / ".model.onnx.record.json.next").write_text(
        store.record_text(old.model_copy(update={"sha256": "0" * 64}))
    )
    assert store.read(out) == old
    (tmp_path / ".model.onnx.record.json.next").write_text("torn {")
    assert store.read(out) == old


def raced(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each says after all were ready and started together."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [told(process) for process in processes]
    assert not any(process.returncode for process in processes), answers
    return [text for text, _ in answers]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_two_processes_that_make_the_same_give_a_whole_result(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "model"
    answers = raced([python(STAGE, out, kind, "whole", wait=False) for _ in range(2)])
    artifact = store.read(out)
    assert artifact is not None
    assert set(answers) == {f"{artifact.sha256}\n"}
    assert not list(tmp_path.glob(".*"))


# --- remember


def score(value: float) -> Score:
    interval = Interval(value=value, low=-math.inf, high=math.nan)
    return Score(metric="m", score=interval, samples=3, per_sample=(value, math.inf))


def test_what_is_kept_is_strict_json_whatever_the_numbers(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    store.remember(tmp_path / "score.json", "a", Score, lambda: score(math.nan))
    text = (tmp_path / "score.json").read_text()
    assert "NaN" in text
    assert "-Infinity" in text
    json.loads(text, parse_constant=refuse)


def test_a_value_is_made_once_a_key(tmp_path: Path) -> None:
    path, calls = tmp_path / "deep" / "score.json", []

    def make() -> Score:
        calls.append(1)
        return score(len(calls))

    answers = [store.remember(path, key, Score, make) for key in ("a", "a", "b", "b", "a")]
    assert [(v.score.value, kept) for v, kept in answers] == [
        (1, False), (1, True), (2, False), (2, True), (3, False),
    ]  # fmt: skip
    assert [repr(v) for v, _ in answers] == [repr(score(n)) for n in (1, 1, 2, 2, 3)]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", '{"key": "k"}', '{"value": {}}', '{"key": "k", "value": {"x": 1}}',
     '{"key": "k", "value": null}', "\0\0", '{"key": "k", "value": {"metric": '],
)  # fmt: skip
def test_a_torn_or_foreign_memory_is_a_miss(tmp_path: Path, text: str) -> None:
    path = tmp_path / "score.json"
    path.write_text(text)
    value, kept = store.remember(path, "k", Score, lambda: score(1))
    assert (value.score.value, kept) == (1, False)
    assert store.remember(path, "k", Score, lambda: score(2))[1]


def test_a_failing_make_is_not_remembered(tmp_path: Path) -> None:
    def fails() -> Score:
        raise InputError("bad", hint="better")

    with refused(InputError, "bad", hint="better"):
        store.remember(tmp_path / "score.json", "k", Score, fails)
    assert not list(tmp_path.iterdir())


def test_two_processes_that_remember_give_a_whole_value(tmp_path: Path) -> None:
    path = tmp_path / "score.json"
    answers = raced([python(REMEMBER, path, n, wait=False) for n in (1, 2)])
    for answer, mine in zip(answers, (1.0, 2.0), strict=True):
        assert answer in {f"{n} 1 {n}\n" for n in (mine, 3 - mine)}
    value, kept = store.remember(path, "key", Score, lambda: score(3))
    assert kept
    assert value.score.value in (1, 2)
    assert set(value.per_sample or ()) == {value.score.value}
    assert sorted(content(tmp_path)) == ["score.json"]


# --- JSON


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"", "Expecting value"),
        (b"[1]", "not a JSON object"),
        (b"\xff", "utf-8"),
        (b"{", "Expecting"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, data: bytes, fact: str) -> None:
    path = tmp_path / "x.json"
    with refused(InputError, path, "No such file", hint="make it again"):
        _json.read(path)
    path.write_bytes(data)
    with refused(InputError, path, fact, hint="make it again"):
        _json.read(path)


def test_an_interrupt_waits_until_a_model_has_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "model.onnx", store._write_record

    def interrupted(temporary: Path, path: Path, artifact: Artifact) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(temporary, path, artifact)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(store, "_write_record", interrupted)
    _interrupt.listen()
    try:
        with pytest.raises(KeyboardInterrupt):
            store.produce(job(), to_file, out=out)
    finally:
        _interrupt.listen()  # forget it
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    made = store.read(out)
    assert made is not None
    assert made.history[-1].key == job().key
