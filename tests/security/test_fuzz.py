"""Every parser of deploykit's own, fed with what is nearly right: an answer, or two lines."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit import _json, _shapes, environment
from deploykit.bundle import manifest
from deploykit.bundle.manifest import BundleError
from deploykit.cli.ship import _machine
from deploykit.errors import DeploykitError
from deploykit.layouts import oci, triton
from deploykit.preprocessing import read_preprocessing
from deploykit.recipe import read_recipe
from deploykit.values import Artifact, TensorSpec, parse
from tests.conftest import FASHION, ROOT
from tests.layouts import test_triton

GOLDEN = ROOT / "tests" / "golden" / "bundle-2"
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from([2**63, -1, "", "..", "/etc/passwd", "\0", "\udcff", 1e400, [], {}, [[]]]),
).map(copy.deepcopy)  # fmt: skip


HERE = json.dumps({"environment": environment.read().model_dump(mode="json")})


@cache
def document(path: Path) -> str:
    return path.read_text()


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a document something can be changed."""
    inside: Any = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    return [at, *(place for key, child in inside for place in places(child, (*at, key)))]


@st.composite
def nearly(draw: st.DrawFn, text: str) -> str:
    """A JSON document with a few values changed, removed or added."""
    root = [json.loads(text)]
    for _ in range(draw(st.integers(1, 3))):
        *way, last = (0, *draw(st.sampled_from(places(root[0]))))
        parent: Any = root
        for key in way:
            parent = parent[key]
        how = draw(st.sampled_from(["change", "remove", "add"]))
        if how == "remove" and len(way):
            del parent[last]
        elif how == "add" and isinstance(parent[last], dict):
            parent[last][draw(st.text(max_size=9))] = draw(JUNK)
        elif how == "add" and isinstance(parent[last], list):
            parent[last].append(draw(JUNK))
        else:
            parent[last] = draw(JUNK)
    return json.dumps(root[0])


@st.composite
def damaged(draw: st.DrawFn, text: str) -> bytes:
    """A text with a span of its bytes replaced, doubled or cut out."""
    data = text.encode()
    start, length = draw(st.integers(0, len(data))), draw(st.integers(0, 30))
    put = draw(st.binary(max_size=12) | st.just(data[start : start + length] * 2))
    return data[:start] + put + data[start + length :]


def answers(work: Callable[[], object]) -> None:
    """The work ends, or with an error that a user can act on."""
    told = None
    try:
        work()
    except DeploykitError as error:
        told = error
    assert told is None or (str(told) and told.hint)


@given(st.data())
def test_a_manifest(data: st.DataObject) -> None:
    text = document(GOLDEN / "manifest.json")
    given_ = data.draw(nearly(text).map(str.encode) | damaged(text))
    try:
        found = manifest.from_json(given_, Path("bundle"))
    except BundleError:
        return
    for entry in found.files:
        assert not entry.path.startswith("/")
        assert ".." not in entry.path.split("/")
    assert manifest.from_json(manifest.to_json(found), Path("bundle")) == found


@given(st.data())
def test_the_record_of_a_model(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    text = document(GOLDEN / "model.onnx.record.json")
    given_ = data.draw(nearly(text).map(str.encode) | damaged(text))
    path = tmp_path_factory.getbasetemp() / "record.json"
    path.write_bytes(given_)
    answers(lambda: parse(Artifact, _json.read(path), "record"))


@given(st.data())
def test_the_description_of_a_machine(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "machine.json"
    path.write_bytes(data.draw(nearly(HERE).map(str.encode) | damaged(HERE)))
    answers(lambda: _machine(path))


RECIPE = ROOT / "benchmarks" / "recipes" / "fashion_mnist.toml"


@given(st.data())
def test_a_recipe(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_bytes(data.draw(damaged(document(RECIPE))))
    answers(lambda: read_recipe(path))


@given(st.data())
def test_values_in_a_recipe(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    changed = json.loads(data.draw(nearly(json.dumps(tomllib.loads(document(RECIPE))))))
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
    path.write_text(toml(changed), encoding="utf-8", errors="replace")
    answers(lambda: read_recipe(path))


def toml(value: Any) -> str:
    """TOML of plain data; what it cannot say becomes text that is no TOML."""
    if not isinstance(value, dict):
        return json.dumps(value)
    flat = {k: v for k, v in value.items() if not isinstance(v, dict)}
    tables = {k: v for k, v in value.items() if isinstance(v, dict)}
    lines = [f"{json.dumps(k)} = {inline(v)}" for k, v in flat.items()]
    for name, table in tables.items():
        lines.append(f"[{json.dumps(name)}]")
        lines += [f"{json.dumps(k)} = {inline(v)}" for k, v in table.items()]
    return "\n".join(lines) + "\n"


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {inline(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


@given(st.text(alphabet="x:=[].0123456789abcimages_float32 -", max_size=30))
def test_shapes(text: str) -> None:
    spec = TensorSpec(name="a", dtype="float32", shape=("batch", 3))
    answers(lambda: _shapes.parse_shape(text))
    answers(lambda: _shapes.parse_inputs([text]))
    answers(lambda: _shapes.name_axes((spec,), [text]))


@given(st.data())
def test_a_server_s_configuration(data: st.DataObject) -> None:
    text = document(GOLDEN / "fashion_mnist" / "config.pbtxt")
    given_ = data.draw(damaged(text)).decode(errors="replace")
    answers(lambda: triton.check(given_, test_triton.TestCheck.served))
    answers(lambda: triton.parse(given_, "fashion_mnist"))


@given(st.data())
def test_preprocessing(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "preprocessing.toml"
    path.write_bytes(data.draw(damaged(document(FASHION / "preprocessing.toml"))))
    answers(lambda: read_preprocessing(path))


@given(st.data())
def test_the_index_of_an_image_layout(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    digest = {"mediaType": oci.IMAGE, "digest": "sha256:" + "0" * 64, "size": 3}
    text = json.dumps({"schemaVersion": 2, "manifests": [digest]})
    layout = tmp_path_factory.getbasetemp() / "layout"
    (layout / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    (layout / "oci-layout").write_text("{}")
    (layout / "index.json").write_bytes(data.draw(nearly(text).map(str.encode) | damaged(text)))
    answers(lambda: oci.unpack(layout, layout.parent / "unpacked"))
    assert not (layout.parent / "unpacked").exists()
