"""What a file is made of: counted by hand, against PyTorch's own counter, and on hostile files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deploykit.errors import InputError
from deploykit.formats import onnx_weights, torch_folder
from deploykit.formats.onnx_anatomy import Anatomy, Part, anatomy
from deploykit.values import Artifact
from tests.fixtures_core import refused
from tests.formats.test_onnx_check import custom
from tests.formats.test_onnx_graph import normal, parsed


def of(folder: Path, model: onnx.ModelProto, **shapes: tuple[int, ...]) -> Anatomy:
    onnx.save(model, folder / "model.onnx")
    return anatomy(folder / "model.onnx", shapes)


@pytest.mark.parametrize(
    ("text", "weights", "count"),
    [
        ("(float[N,3,8,8] x) => (float[N,5,8,8] y) { y = Conv<pads=[1,1,1,1]>(x, w) }",
         (5, 3, 3, 3), 5 * 64 * 27),
        ("(float[N,4,8,8] x) => (float[N,4,8,8] y) { y = Conv<pads=[1,1,1,1], group=4>(x, w) }",
         (4, 1, 3, 3), 4 * 64 * 9),
        ("(float[N,3,4,4] x) => (float[N,5,8,8] y) { y = ConvTranspose<strides=[2,2]>(x, w) }",
         (3, 5, 2, 2), 3 * 16 * 5 * 4),
        ("(float[N,6] x) => (float[N,5] y) { y = Gemm<transB=1>(x, w) }", (5, 6), 30),
        ("(float[6,1] x) => (float[1,5] y) { y = Gemm<transA=1>(x, w) }", (6, 5), 30),
        ("(float[N,7,6] x) => (float[N,7,5] y) { y = MatMul(x, w) }", (6, 5), 210),
        ("(float[N,7,6] x) => (float[N,7,5] y) { y = Einsum<equation=\"bij,jk->bik\">(x, w) }",
         (6, 5), 210),
        ("(float[N,6] x) => (float[N,6] y) { y = Mul(x, w) }", (6,), 0),
    ],
)  # fmt: skip
def test_work_by_hand(tmp_path: Path, text: str, weights: tuple[int, ...], count: int) -> None:
    found = of(tmp_path, parsed(text, w=normal(*weights)))
    assert (found.multiply_accumulates, found.uncounted) == (count, {})
    assert found.shapes["x"][0] in (1, 6)


def test_a_recurrent_layer_computes_at_each_step(tmp_path: Path) -> None:
    text = "(float[9,N,4] x) => (float[9,1,N,5] y) { y, h, c = LSTM<hidden_size=5>(x, w, r) }"
    found = of(tmp_path, parsed(text, w=normal(1, 20, 4), r=normal(1, 20, 5)))
    assert found.multiply_accumulates == 9 * (80 + 100)


def test_work_is_what_pytorch_counts(teacher: Artifact, teacher_onnx: Artifact) -> None:
    module = torch_folder.load(teacher)
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 1, 28, 28))
    found = anatomy(teacher_onnx.path)
    assert found.multiply_accumulates == counter.get_total_flops() // 2
    assert found.parameters >= sum(p.numel() for p in module.parameters()) - 1000  # folded norms
    assert found.parts == (
        Part(precision="fp32", nodes=14, multiply_accumulates=found.multiply_accumulates),
    )


HIDDEN = """(float[batch,28,28,3] x) => (float[batch,5,26,26] y) {
    half = Cast<to=10>(k) w = Cast<to=1>(half)
    turned = Transpose<perm=[0,3,1,2]>(x)
    whole = Shape(x) rank = Shape(whole) twice = Mul(rank, two) zeros = ConstantOfShape(twice)
    some = Cast<to=1>(zeros) none = Cast<to=7>(some)
    wide = Pad(turned, none)
    y = Conv(wide, w)
}"""


def test_casts_of_constants_hide_no_work(tmp_path: Path) -> None:
    model = parsed(HIDDEN, k=normal(5, 3, 3, 3), two=np.array([2]))
    found = of(tmp_path, model)
    assert found.shapes_by == "onnx and one run on ones"
    assert (found.multiply_accumulates, found.problem) == (5 * 26 * 26 * 27, "")


def test_dynamic_sizes_are_named_and_may_be_given(tmp_path: Path) -> None:
    text = "(float[N,3,H,W] x) => (float[N,5,H,W] y) { y = Conv(x, w) }"
    model = parsed(text, w=normal(5, 3, 1, 1))
    found = of(tmp_path, model)
    assert found.dynamic == {"N": ("x:0",), "H": ("x:2",), "W": ("x:3",)}
    assert found.shapes == {"x": (1, 3, 224, 224)}
    assert found.multiply_accumulates == 15 * 224 * 224
    assert of(tmp_path, model, x=(2, 3, 10, 20)).multiply_accumulates == 2 * 15 * 200
    for shape in ((2, 4, 10, 20), (2, 3, 10)):
        with refused(InputError, str(list(shape)), "does not fit x", hint="own numbers"):
            of(tmp_path, model, x=shape)
    with refused(InputError, "no input 'z'", hint="inputs are x"):
        of(tmp_path, model, z=(1,))


def test_one_name_is_one_size(tmp_path: Path) -> None:
    text = "(float[N,S] x, float[S,N] z) => (float[N,N] y) { y = MatMul(x, z) }"
    assert of(tmp_path, parsed(text), x=(3, 7)).shapes == {"x": (3, 7), "z": (7, 3)}


def test_a_model_that_runs_at_no_usual_size_is_counted_in_part(tmp_path: Path) -> None:
    text = """(float[N,S] x) => (float[N,A,B] y) {
        h = MatMul(x, a)
        wide = Reshape(x, to)
        y = MatMul(wide, b)
    }"""
    model = parsed(text, a=normal(1, 4), b=normal(7, 5), to=np.array([1, -1, 7]))
    found = of(tmp_path, model)
    assert "MatMul" in found.uncounted
    assert "does not run at these shapes" in found.problem


@pytest.mark.parametrize(
    ("steps", "precision"),
    [
        ("q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, s, k)",
         "int8"),
        ("d = Identity(x) v = DequantizeLinear(w, s, k)", "int8 weights, fp32"),
        ("q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = Cast<to=1>(w)", "fp32"),
    ],
)  # fmt: skip
def test_the_precision_of_a_part_is_that_of_what_it_reads(
    tmp_path: Path, steps: str, precision: str
) -> None:
    text = f"(float[N,4] x) => (float[N,4] y, float[N,4] p) {{ {steps} t = Transpose<perm=[1,0]>(v) y = MatMul(d, t) p = MatMul(x, f) }}"  # noqa: E501
    model = parsed(
        text, w=np.ones((4, 4), np.int8), s=np.float32(0.1), z=np.uint8(9), k=np.int8(0),
        f=normal(4, 4),
    )  # fmt: skip
    found = of(tmp_path, model)
    parts = {part.precision: part.nodes for part in found.parts}
    assert parts == ({"fp32": 2} if precision == "fp32" else {precision: 1, "fp32": 1})
    assert found.quantized == ((0, 0) if precision == "fp32" else (1, 16))
    assert found.weights["int8"].bytes == 17


def test_branches_are_counted_and_told(tmp_path: Path) -> None:
    text = """(float[N,4] x, bool c) => (float[N,4] y) {
        y = If(c) <
            then_branch = t () => (float[N,4] p) { p = MatMul(x, w) },
            else_branch = e () => (float[N,4] q) { q = Relu(x) }
        >
    }"""
    found = of(tmp_path, parsed(text, w=normal(4, 4)))
    assert found.operators == {"If": 1, "MatMul": 1, "Relu": 1}
    assert (found.nodes_in_subgraphs, found.multiply_accumulates) == (2, 16)


@pytest.mark.parametrize("name", ["Magic", "EPContext"])
def test_native_nodes_are_told_and_not_run(tmp_path: Path, name: str) -> None:
    domain = "com.microsoft" if name == "EPContext" else "com.acme"
    found = of(tmp_path, custom(name, domain))
    assert found.native_nodes == (f"{domain}::{name} 'spell'",)
    assert found.operators == {f"{domain}::{name}": 1}
    assert found.domains[domain] == 1
    assert bool(found.uncounted) == (name == "EPContext")


def test_weights_beside_it_are_told_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "(float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }"
    monkeypatch.setattr(onnx_weights, "LARGEST", 1000)
    names = onnx_weights.write(parsed(text, w=normal(64, 64)), tmp_path / "m.onnx")
    found = anatomy(tmp_path / "m.onnx")
    assert found.files == {names[0]: 4 * 64 * 64}
    assert (found.parameters, found.multiply_accumulates) == (64 * 64, 64 * 64)
