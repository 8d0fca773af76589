from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploykit.bundle import Bundle, BundleError, Engine, FileEntry, Requirements, verify
from deploykit.bundle.manifest import (
    GoldenInputs,
    GoldenOutputs,
    from_json,
    path_problem,
    read,
    to_json,
)
from deploykit.errors import IntegrityError
from deploykit.values import Preprocessing, TensorSpec

Change = Callable[[Callable[[dict[str, Any]], object]], None]
HERE = Path("bundle")

paths = st.lists(
    st.text("abcxyz0189_.-", min_size=1, max_size=8).filter(lambda t: t.strip(".")), min_size=1
).map("/".join)
texts = st.text(max_size=20)
numbers = st.floats(0, 1e30)


@st.composite
def bundles(draw: st.DrawFn) -> Bundle:
    names = draw(st.lists(paths, min_size=4, max_size=8, unique_by=str.casefold))
    names = [name for name in names if name.casefold() != "manifest.json"]
    model, record, inputs, outputs, *others = (*names, *"wxyz")[: max(4, len(names))]
    kind: Literal["onnx", "engine"] = draw(st.sampled_from(["onnx", "engine"]))
    model += ".onnx" if kind == "onnx" else ".plan"
    roles = {model: "model", record: "record", inputs: "golden", outputs: "golden"}
    spec = TensorSpec(name=draw(texts), dtype="float32", shape=("batch", draw(st.integers(0))))
    runs = kind == "onnx" or draw(st.booleans())
    engine = Engine(
        path=model,
        record=record,
        format=kind,
        native_code=kind == "engine",
        precision="int8",
        backend=draw(texts),
        inputs=(spec,),
        outputs=(spec,),
        requires=Requirements(
            cpu_features_any=tuple(draw(st.lists(texts))),
            runtimes=tuple(draw(st.lists(texts))),
            version=draw(texts),
            match=draw(st.sampled_from(["at least", "exactly"])),
        ),
        built_on=None,
        golden=GoldenOutputs(
            path=outputs,
            batch_size=draw(st.integers(1)),
            atol={draw(texts): draw(numbers)},
            rtol={draw(texts): draw(numbers)},
            max_error=draw(numbers),
        )
        if runs
        else None,
        no_golden=None if runs else draw(texts),
    )
    return Bundle(
        schema="deploykit.bundle/1" if kind == "engine" else "deploykit.bundle/2",
        name=draw(texts),
        version=draw(st.integers(1)),
        created=draw(texts),
        layout=draw(texts),
        files=tuple(
            FileEntry(
                path=name,
                size=draw(st.integers(0)),
                sha256=draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
                role=roles.get(name, "config"),
            )
            for name in (model, record, inputs, outputs, *others)
        ),
        engines=(engine,),
        golden=GoldenInputs(path=inputs, samples=1, data=draw(texts), data_digest=draw(texts)),
        preprocessing=draw(st.none() | st.just(Preprocessing(mean=(0.1, 0.2, 0.3)))),
        evidence=None,
    )


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(bundles())
def test_from_json_gives_back_what_to_json_wrote(bundle: Bundle):
    assert from_json(to_json(bundle), HERE) == bundle


@settings(deadline=None)
@given(paths)
def test_a_plain_relative_path_is_no_problem(path: str):
    assert (path_problem(path) is None) == (path.casefold() != "manifest.json")


@settings(deadline=None)
@given(paths, st.sampled_from(["/", "../", "./", "a//", "a/../", "a\\", "\n", "\0", "\u202e"]))
def test_no_decorated_path_passes(path: str, bad: str):
    assert path_problem(bad + path)
    assert path_problem(f"{path}/..")
    assert path_problem(f"{path}/")


@pytest.mark.parametrize("path", ["", ".", "..", "Manifest.JSON", "C:\\x", "/etc/passwd", "a/\0"])
def test_paths_that_must_not_be_used(path: str):
    assert path_problem(path)


def refused(bundle: Path) -> str:
    with pytest.raises(BundleError) as caught:
        verify(bundle)
    assert caught.value.exit_code == 5
    return str(caught.value)


def test_truncated(bundle: Path):
    path = bundle / "manifest.json"
    content = path.read_bytes()
    for end in (0, 1, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:end])
        assert "is not JSON" in refused(bundle)


@pytest.mark.parametrize(
    "text", ["[]", "null", '"x"', "{}", "[" * 100_000, '{"schema": "deploykit.bundle/1"}']
)
def test_other_json(bundle: Path, text: str):
    (bundle / "manifest.json").write_text(text)
    refused(bundle)


def test_no_text(bundle: Path):
    (bundle / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert "is not JSON" in refused(bundle)


def test_missing(bundle: Path):
    (bundle / "manifest.json").unlink()
    assert "manifest.json is missing" in refused(bundle)


def test_a_later_schema(bundle: Path, edit: Change):
    edit(lambda m: m.update(schema="deploykit.bundle/3"))
    text = refused(bundle)
    assert "'deploykit.bundle/3'" in text
    assert "reads deploykit.bundle/1 and deploykit.bundle/2" in text


def test_an_unknown_key_at_any_depth(bundle: Path, edit: Change):
    edit(lambda m: m["engines"][0]["requires"].update(cpu_featurs=[]))
    assert "unknown key 'engines.0.requires.cpu_featurs'" in refused(bundle)


def test_a_repeated_key(bundle: Path):
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace('"version": 3', '"version": 3, "version": 4', 1))
    assert "'version' is given 2 times" in refused(bundle)


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "net/../../evil", "net//3/model.onnx"])
def test_a_path_that_escapes(bundle: Path, edit: Change, path: str):
    edit(lambda m: m["files"][0].update(path=path))
    assert f"path {path!r} is not relative and normalised" in refused(bundle)


def test_an_engine_that_escapes(bundle: Path, edit: Change, tmp_path: Path):
    (tmp_path / "evil.onnx").write_bytes(b"")
    edit(lambda m: m["engines"][0].update(path="../evil.onnx"))
    assert "'../evil.onnx' is not listed as model" in refused(bundle)


@pytest.mark.parametrize("key", ["path", "record"])
def test_an_engine_of_a_file_in_another_role(bundle: Path, edit: Change, key: str):
    edit(lambda m: m["engines"][0].update({key: "evidence.json"}))
    assert "'evidence.json' is not listed as" in refused(bundle)


def test_a_path_listed_twice_but_for_case(bundle: Path, edit: Change):
    edit(lambda m: m["files"].append({**m["files"][0], "path": "EVIDENCE.json"}))
    assert "path 'evidence.json' is listed 2 times" in refused(bundle)


def test_a_manifest_that_lists_itself(bundle: Path, edit: Change):
    edit(lambda m: m["files"].append({**m["files"][0], "path": "manifest.json"}))
    assert "no manifest lists" in refused(bundle)


def test_no_engines(bundle: Path, edit: Change):
    edit(lambda m: m.update(engines=[]))
    assert "there are no engines" in refused(bundle)


def test_neither_golden_outputs_nor_a_reason(bundle: Path, edit: Change):
    edit(lambda m: m["engines"][0].update(golden=None))
    assert "golden outputs, or the reason" in refused(bundle)


def test_native_code_that_is_told_to_be_none(bundle: Path, edit: Change):
    edit(lambda m: m["engines"][0].update(native_code=True))
    assert "native_code is True for the format onnx" in refused(bundle)


def test_an_onnx_model_told_to_be_an_engine(bundle: Path, edit: Change):
    edit(
        lambda m: m["engines"][0].update(
            format="engine", native_code=True, golden=None, no_golden="not run"
        )
    )
    assert "its name is not one of the format engine" in refused(bundle)


def test_native_code_without_a_portable_model(bundle: Path, edit: Change):
    path = "net/3/model.plan"
    (bundle / "net/3/model.onnx").rename(bundle / path)
    edit(
        lambda m: (
            m["engines"][0].update(
                path=path, format="engine", native_code=True, golden=None, no_golden="not run"
            ),
            [f.update(path=path) for f in m["files"] if f["role"] == "model"],
        )
    )
    assert "without a portable ONNX model beside it" in refused(bundle)


def test_a_torch_model_is_never_built_from_a_bundle(bundle: Path, edit: Change):
    edit(lambda m: m["engines"][0].update(format="torch"))
    assert "engines.0.format" in refused(bundle)


def test_a_manifest_without_end(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deploykit.bundle.manifest.LARGEST_MANIFEST", 10)
    with pytest.raises(IntegrityError, match="larger than 10 bytes"):
        read(bundle)
