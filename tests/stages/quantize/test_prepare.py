from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from deploykit.backends import open_session
from deploykit.evaluation import collect
from deploykit.formats.onnx_lift import OPSET
from deploykit.stages.quantize import QuantizeOptions, quantize
from deploykit.stages.quantize.prepare import NOT_FOLDED, _rename, prepare
from deploykit.values import Array
from tests.formats.test_onnx_graph import CONV, normal, parsed, stored
from tests.stages.quantize.test_qdq import follow

IMAGE = "(float[N,3,8,8] x) => (float[N,4,8,8] y)"
WEIGHTS = {"w": normal(4, 3, 3, 3), "b": normal(4), "v": normal(4, 4, 3, 3)}
UNFUSED = (
    f"{IMAGE} {{ h = {CONV}(x, w, b) s = Sub(h, m) d = Div(s, e) r = Relu(d) y = {CONV}(r, v) }}"
)
"""A batch norm by hand, as some exporters leave it."""
STATISTICS = {"m": normal(4, 1, 1), "e": np.abs(normal(4, 1, 1)) + np.float32(0.5)}
FIXED = QuantizeOptions(calibration_method="minmax", scope="residual", processor="vnni")


def types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def prepared(
    model: onnx.ModelProto, folder: Path, **arrays: Array
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The prepared model, which gives what the given one gives."""
    source, data = stored(model, folder, **arrays)
    made, told = prepare(source.path)
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, folder / "prepared.onnx")
    after = source.model_copy(update={"path": folder / "prepared.onnx"})
    with open_session(source, "ort-cpu") as one, open_session(after, "ort-cpu") as other:
        want, have = collect(one, data)[0], collect(other, data)[0]
    for name, array in want.items():
        np.testing.assert_allclose(have[name], array, rtol=1e-5, atol=1e-5)
    return made, told


@pytest.mark.parametrize("opset", [9, 11, 12])
def test_an_old_opset_is_lifted_and_quantizes(opset: int, tmp_path: Path) -> None:
    text = f"{IMAGE} {{ h = {CONV}(x, w, b) r = Relu(h) y = {CONV}(r, v) }}"
    model = parsed(text, opset=opset, **WEIGHTS)
    made, told = prepared(model, tmp_path, x=normal(12, 3, 8, 8))
    assert {o.version for o in made.opset_import if o.domain == ""} == {OPSET}
    assert told[0] == f"opset lifted from {opset} to {OPSET}"
    source, data = stored(model, tmp_path, x=normal(12, 3, 8, 8))
    int8 = quantize(source, FIXED, data=data, out=tmp_path / "q.onnx")
    assert int8.facts["compute_nodes_quantized"] == 2
    assert told[0] in int8.facts["prepared"]
    assert follow(source, int8, data, "ort-cpu") > 20


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_a_newer_opset_stays(opset: int, tmp_path: Path) -> None:
    text = f"{IMAGE} {{ y = {CONV}(x, w, b) }}"
    model = parsed(text, opset=opset, w=WEIGHTS["w"], b=WEIGHTS["b"])
    made, told = prepared(model, tmp_path, x=normal(4, 3, 8, 8))
    assert {o.version for o in made.opset_import if o.domain == ""} == {opset}
    assert told == ("folded, symbolic shapes",)


@pytest.mark.parametrize("opset", [11, 17])
def test_sub_and_div_behind_a_convolution_are_folded_into_it(opset: int, tmp_path: Path) -> None:
    model = parsed(UNFUSED, opset=opset, **WEIGHTS, **STATISTICS)
    made, told = prepared(model, tmp_path, x=normal(4, 3, 8, 8))
    assert types(made) == ["Conv", "Relu", "Conv"]
    assert "2 Sub and Div by a constant written as Add and Mul" in told
    assert {"m", "e"}.isdisjoint(t.name for t in made.graph.initializer)


def test_so_are_those_by_constant_nodes(tmp_path: Path) -> None:
    text = f"""{IMAGE} {{
        c = Constant<value = float[4,1,1] {{1, 2, 3, 4}}>()
        h = {CONV}(x, w, b) s = Sub(h, c) d = Div(s, c) y = Relu(d)
    }}"""
    model = parsed(text, w=WEIGHTS["w"], b=WEIGHTS["b"])
    made, _ = prepared(model, tmp_path, x=normal(4, 3, 8, 8))
    assert types(made) == ["Conv", "Relu"]


def test_a_constant_that_others_read_too_stays_as_it_is(tmp_path: Path) -> None:
    text = f"{IMAGE} {{ h = {CONV}(x, w, b) s = Sub(h, m) r = Relu(s) y = Max(r, m) }}"
    constants = {"w": WEIGHTS["w"], "b": WEIGHTS["b"], "m": STATISTICS["m"]}
    made, _ = prepared(parsed(text, **constants), tmp_path, x=normal(4, 3, 8, 8))
    assert types(made) == ["Conv", "Relu", "Max"]


def test_a_constant_that_a_branch_reads_stays_too(tmp_path: Path) -> None:
    text = """(float[N,4] x) => (float[N,4] y) {
        h = Sub(x, m) s = ReduceMax<keepdims=0>(h) c = Greater(s, zero)
        y = If(c) <
            then_branch = t () => (float[N,4] p) { p = Add(h, m) },
            else_branch = e () => (float[N,4] q) { q = Neg(h) }
        >
    }"""
    model = parsed(text, m=normal(4), zero=np.array(0, np.float32))
    made, _ = prepared(model, tmp_path, x=normal(4, 4))
    assert "Sub" not in types(made)


@pytest.mark.parametrize(
    "text",
    [
        "(float[N,4] x) => (float[N,4] y) { y = Sub(m, x) }",
        "(float[N,4] x) => (float[N,4] y) { h = Abs(x) a = Add(h, one) y = Div(m, a) }",
        "(float[N,4] x) => (float[N,4] y) { h = Exp(x) y = Div(x, h) }",
    ],
)
def test_what_is_no_sub_or_div_by_a_constant_stays(text: str, tmp_path: Path) -> None:
    model = parsed(text, m=normal(4), one=np.array(1, np.float32))
    made, told = prepared(model, tmp_path, x=normal(4, 4))
    assert {"Sub", "Div"} & set(types(made))
    assert told == ("folded, symbolic shapes",)


def test_a_div_by_zero_stays(tmp_path: Path) -> None:
    model = parsed(
        "(float[N,2] x) => (float[N,2] y) { y = Div(x, z) }", z=np.array([0, 2], np.float32)
    )
    made, _ = prepared(model, tmp_path, x=np.abs(normal(4, 2)) + 1)
    assert types(made) == ["Div"]


def test_integers_are_divided_as_integers(tmp_path: Path) -> None:
    model = parsed("(int64[N,2] x) => (int64[N,2] y) { y = Div(x, k) }", k=np.array([2, 3]))
    made, _ = prepared(model, tmp_path, x=np.arange(10).reshape(5, 2))
    assert types(made) == ["Div"]


def test_names_that_folding_adds_do_not_clash_when_more_is_folded(tmp_path: Path) -> None:
    """`k` is an output, so its Add is folded only where calibration does not ask for it."""
    text = """(float[1,7,6] x) => (float[1,7,5] y, float[1,7,5] k) {
        h = MatMul(x, w) a = Add(h, b) r = Relu(a) k = MatMul(r, v) y = Add(k, b)
    }"""
    model = parsed(text, w=normal(6, 5), b=normal(5), v=normal(5, 5))
    made, _ = prepared(model, tmp_path, x=normal(12, 7, 6))
    assert types(made) == ["Reshape", "Gemm", "Reshape", "Relu", "MatMul", "Add"]
    before = {name for node in model.graph.node for name in (*node.input, *node.output)}
    after = {name for node in made.graph.node for name in (*node.input, *node.output)}
    assert after - before
    assert all(name.endswith("_folded") for name in after - before)
    assert {value.name for value in made.graph.value_info} - before <= after
    source, data = stored(model, tmp_path, x=normal(12, 7, 6))
    options = FIXED.model_copy(update={"scope": "compute", "processor": "this"})
    int8 = quantize(source, options, data=data, out=tmp_path / "q.onnx")
    assert int8.facts["compute_nodes_quantized"] == 2
    assert follow(source, int8, data, "ort-cpu") > 20


def test_a_branch_reads_what_folding_has_added_by_its_new_name() -> None:
    model = parsed(
        """(float[2] x, bool c) => (float[2] y) {
            added = Relu(x)
            z = Add(added, w)
            y = If(c) <
                then_branch = t () => (float[2] p) { p = Abs(added) },
                else_branch = e () => (float[2] q) { q = Mul(z, w) }
            >
        }""",
        w=normal(2),
        added_folded=normal(2),
    )
    _rename(model, {"x", "c", "y", "w", "z", "added_folded"})
    assert (
        len({t.name for t in model.graph.initializer} | {n.output[0] for n in model.graph.node})
        == 5
    )
    onnx.checker.check_model(model, full_check=True)
    assert "added" not in {name for node in model.graph.node for name in node.output}


@pytest.mark.parametrize("label", ["", "[n] "])
def test_node_names_become_unique(label: str, tmp_path: Path) -> None:
    """ONNX Runtime loads no model of which two nodes have one name."""
    text = f"{IMAGE} {{ {label}h = {CONV}(x, w, b) {label}r = Abs(h) {label}y = {CONV}(r, v) }}"
    source, data = stored(parsed(text, **WEIGHTS), tmp_path, x=normal(12, 3, 8, 8))
    made, _ = prepare(source.path)
    names = [node.name for node in made.graph.node]
    assert all(names)
    assert len(set(names)) == 3
    int8 = quantize(source, FIXED, data=data, out=tmp_path / "q.onnx")
    assert int8.facts["compute_nodes_quantized"] == 2


def test_the_file_that_was_given_is_not_touched(tmp_path: Path) -> None:
    source, _ = stored(parsed(UNFUSED, opset=11, **WEIGHTS, **STATISTICS), tmp_path, x=normal(1))
    before = source.path.read_bytes()
    prepare(source.path)
    assert source.path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "model.onnx"]


@pytest.mark.parametrize("failing", ["symbolic", "both"])
def test_where_shape_inference_fails_the_rest_still_works(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.quantization import shape_inference

    def fake_pre_process(source: Path, target: Path, *, skip_symbolic_shape: bool) -> None:
        if failing == "both" or not skip_symbolic_shape:
            raise RuntimeError("Incomplete symbolic shape inference")
        original(source, target, skip_symbolic_shape=skip_symbolic_shape)

    original = shape_inference.quant_pre_process
    monkeypatch.setattr(shape_inference, "quant_pre_process", fake_pre_process)
    text = f"{IMAGE} {{ h = {CONV}(x, w, b) r = Relu(h) y = {CONV}(r, v) }}"
    source, data = stored(parsed(text, **WEIGHTS), tmp_path, x=normal(12, 3, 8, 8))
    int8 = quantize(source, FIXED, data=data, out=tmp_path / "q.onnx")
    ways = {"symbolic": "folded, without symbolic shapes", "both": NOT_FOLDED}
    assert int8.facts["prepared"] == [ways[failing]]
    assert (NOT_FOLDED in int8.facts["warnings"]) == (failing == "both")
    assert int8.facts["compute_nodes_quantized"] == 2
    assert follow(source, int8, data, "ort-cpu") > 20


@pytest.mark.parametrize(("ir_version", "opset"), [(3, 9), (3, 13), (8, 13)])
def test_weights_that_are_inputs_too(ir_version: int, opset: int, tmp_path: Path) -> None:
    """As all exporters wrote them before IR version 4."""
    text = f"{IMAGE} {{ h = {CONV}(x, w, b) r = Relu(h) y = {CONV}(r, v) }}"
    model = parsed(text, opset=opset, **WEIGHTS)
    model.ir_version = ir_version
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
        for t in model.graph.initializer
    )
    source, data = stored(model, tmp_path, x=normal(12, 3, 8, 8))
    int8 = quantize(source, FIXED, data=data, out=tmp_path / "q.onnx")
    assert int8.facts["compute_nodes_quantized"] == 2
    assert follow(source, int8, data, "ort-cpu") > 20


IMAGE_TEXT = "(float[N,3,8,8] x) => (float[N,4,8,8] y)"


def test_a_relative_path_is_folded_too_and_nothing_is_left_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = stored(parsed(f"{IMAGE_TEXT} {{ y = {CONV}(x, w) }}", w=normal(4, 3, 3, 3)),
                       tmp_path, x=normal(12, 3, 8, 8))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    _, told = prepare(Path(source.path.name))
    assert told[-1].startswith("folded")
    assert sorted(tmp_path.iterdir()) == before
