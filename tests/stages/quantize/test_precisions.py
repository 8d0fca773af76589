"""FP8 for TensorRT, and 4-bit weights: the files, what runtimes make of them, what is refused."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx.reference import ReferenceEvaluator

from deploykit.backends import open_session
from deploykit.dataset import Dataset, open_dataset
from deploykit.errors import AnswerIsNo, InputError, UsageError
from deploykit.evaluation import evaluate
from deploykit.formats import open_model
from deploykit.metrics import sqnr_db
from deploykit.stages.build import BuildOptions, build, unavailable
from deploykit.stages.quantize import Promise, QuantizeOptions, quantize
from deploykit.stages.quantize.blocks import BLOCK, quantized
from deploykit.stages.quantize.levels import FP8, INT4
from deploykit.stages.quantize.prepare import prepare
from deploykit.values import Array, Artifact
from tests.conftest import FASHION
from tests.formats.test_onnx_graph import CONV, normal, parsed, stored
from tests.stages.quantize.test_qdq import RUNTIMES, compute, follow, optimized, values

needs_tensorrt = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
PROFILE = ("images:8x1x28x28",)
OPTIONS = {
    "fp8": QuantizeOptions(target="tensorrt", precision="fp8", calibration_samples=64),
    "int4": QuantizeOptions(precision="int4"),
}


def opset(model: onnx.ModelProto) -> int:
    return next(o.version for o in model.opset_import if o.domain == "")


# FP8


@pytest.fixture(scope="module")
def teacher_fp8(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Artifact:
    out = tmp_path_factory.mktemp("fp8") / "teacher.fp8.onnx"
    return quantize(teacher_onnx, OPTIONS["fp8"], data=calibration, out=out)


def test_fp8_rounds_to_what_e4m3_has_and_saturates() -> None:
    got = FP8.nearest(np.array([0, 1, 1.06, 1.07, 17, 19, 449, -1e9, 2**-10, 2**-9]))
    assert got.tolist() == [0, 1, 1, 1.125, 16, 20, 448, -448, 0, 2**-9]


@given(arrays.arrays(np.float32, 9, elements=st.floats(-1e6, 1e6, width=32)))
def test_fp8_keeps_four_bits_of_any_value_in_range(some: Array) -> None:
    near = FP8.nearest(some)
    assert (FP8.nearest(near) == near).all()
    inside = np.abs(some) <= 448
    assert (np.abs(near - some) <= np.maximum(np.abs(some) / 16, 2.0**-10))[inside].all()
    assert (np.abs(near[~inside]) == 448).all()


def test_an_fp8_file_has_fp8_pairs_and_a_float_bias(
    teacher_onnx: Artifact, teacher_fp8: Artifact
) -> None:
    model = onnx.load(teacher_fp8.path)
    onnx.checker.check_model(model, full_check=True)
    assert opset(model) >= 19
    constants = {t.name: t for t in model.graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    points = {constants[node.input[2]].data_type for node in pairs}
    assert points == {onnx.TensorProto.FLOAT8E4M3FN}
    assert teacher_fp8.precision == "fp8"
    weights = {t.name: values(onnx.load(teacher_onnx.path))[t.name] for t in _floats(teacher_onnx)}
    for node in compute(model):
        assert values(model)[node.input[2]].dtype == np.float32
        stored_as = next(n for n in pairs if n.output[0] == node.input[1]).input
        name = node.input[1].split("_axis0")[0]
        others = tuple(range(1, weights[name].ndim))
        want = np.abs(weights[name]).max(axis=others) / 448
        np.testing.assert_allclose(values(model)[stored_as[1]], want, rtol=1e-6)


def _floats(artifact: Artifact) -> list[onnx.TensorProto]:
    return list(onnx.load(artifact.path).graph.initializer)


def test_fp8_says_what_it_did_and_keeps_the_score(
    teacher_onnx: Artifact, teacher_fp8: Artifact, evaluation: Dataset
) -> None:
    facts = teacher_fp8.facts
    assert facts["compute_nodes"] == facts["compute_nodes_quantized"] == 14
    tried = [c["name"] for c in facts["search"]["candidates"]]
    assert len(tried) == 4
    assert not any("entropy" in name for name in tried)  # it takes levels for evenly spaced
    assert facts["search"]["chosen"]["sqnr_db"] > 18
    low, high = facts["ranges"]["images"]
    assert low == -high
    with open_session(teacher_onnx) as one, open_session(teacher_fp8) as other:
        before, after = (evaluate(s, evaluation, "top1").score.value for s in (one, other))
    assert after >= before - 0.01


def test_candidates_in_fp8_are_judged_by_what_the_file_says(tmp_path: Path) -> None:
    """ONNX Runtime's further optimizations drop a Relu before a pair of FP8."""
    body = f"{{ h = {CONV}(x, w) r = Relu(h) y = {CONV}(r, v) }}"
    text = f"(float[N,3,8,8] x) => (float[N,4,8,8] y) {body}"
    model = parsed(text, w=normal(4, 3, 3, 3), v=normal(4, 4, 3, 3))
    x = normal(12, 3, 8, 8, seed=1)
    source, data = stored(model, tmp_path, x=x)
    made = quantize(source, OPTIONS["fp8"], data=data, out=tmp_path / "q.onnx")
    want = ReferenceEvaluator(onnx.load(made.path)).run(None, {"x": x})[0]
    with open_session(made, "ort-cpu") as session:
        assert sqnr_db(want, session.run({"x": x})["y"]) > 60


@needs_tensorrt
def test_fp8_builds_for_gpus_that_have_it_only(teacher_fp8: Artifact, tmp_path: Path) -> None:
    options = BuildOptions(gpu=("sm89", "sm120"), opt_shapes=PROFILE)
    made = build(teacher_fp8, options, out=tmp_path / "m.engine")
    assert made.precision == "fp8"
    assert made.facts["network_layers"]["quantize"] >= 10
    with pytest.raises(UsageError, match="sm80 has no FP8"):
        build(
            teacher_fp8,
            BuildOptions(gpu=("sm80",), opt_shapes=PROFILE),
            out=tmp_path / "old.engine",
        )
    anywhere = build(teacher_fp8, BuildOptions(opt_shapes=PROFILE), out=tmp_path / "any.engine")
    assert anywhere.facts["compute_capabilities"] == ["portable, sm89 and newer"]


@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_a_file_without_its_record_is_known_for_what_it_is(
    precision: str, teacher_fp8: Artifact, tmp_path: Path
) -> None:
    path = teacher_fp8.path
    if precision == "int4":
        text = "(float[N,256] x) => (float[N,256] y) { y = MatMul(x, w) }"
        path = int4_of(text, tmp_path, w=normal(256, 256))[2].path
    (tmp_path / "alone.onnx").write_bytes(path.read_bytes())
    assert open_model(tmp_path / "alone.onnx").precision == precision


# 4-bit weights

KINDS = {
    "matmul": "{ h = MatMul(x, w) y = Tanh(h) }",
    "matmul_relu": "{ h = MatMul(x, w) r = Relu(h) y = Tanh(r) }",
    "matmul_add_relu": "{ h = MatMul(x, w) a = Add(h, b) r = Relu(a) y = Tanh(r) }",
    "gemm_relu": "{ h = Gemm(x, w, b) r = Relu(h) y = Tanh(r) }",
    "gemm_turned": "{ y = Gemm<transB=1>(x, w, b) }",
    "gemm_turned_relu": "{ h = Gemm<transB=1>(x, w, b) r = Relu(h) y = Tanh(r) }",
    "shared": "{ h = Gemm<transB=1>(x, w, b) t = Tanh(h) y = Gemm(t, w) }",
}


def int4_of(text: str, folder: Path, **constants: Array) -> tuple[Artifact, Dataset, Artifact]:
    shape = (12, 256)
    source, data = stored(parsed(text, **constants), folder, x=normal(*shape, seed=1))
    out = folder / "q.onnx"
    return source, data, quantize(source, OPTIONS["int4"], data=data, out=out, force=True)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("text", KINDS.values(), ids=KINDS)
def test_runtimes_take_4_bit_weights_as_they_are(text: str, runtime: str, tmp_path: Path) -> None:
    constants = {"w": normal(256, 256) / 16, "b": normal(256)}
    source, data, made = int4_of(
        f"(float[N,256] x) => (float[N,256] y) {text}", tmp_path, **constants
    )
    model = onnx.load(made.path)
    onnx.checker.check_model(model, full_check=True)
    assert (opset(model), model.ir_version) == (21, 10)
    assert follow(source, made, data, runtime) > 15
    with open_session(made, runtime) as session:
        ran = session.placement({"x": normal(1, 256)}).precisions
    assert ran["int4"] >= made.facts["compute_nodes_quantized"] == len(compute(model))


@pytest.mark.parametrize("text", KINDS.values(), ids=KINDS)
def test_onnx_runtime_unpacks_no_weights(text: str, tmp_path: Path) -> None:
    constants = {"w": normal(256, 256) / 16, "b": normal(256)}
    _, _, made = int4_of(f"(float[N,256] x) => (float[N,256] y) {text}", tmp_path, **constants)
    found = optimized(made.path)
    assert found["MatMulNBits"] == made.facts["compute_nodes_quantized"]
    assert not {"DequantizeLinear", "MatMul", "Gemm"} & set(found)
    relus = [n["reason"] for n in made.facts["float_nodes"] if n["operator"] == "Relu"]
    assert all("written as Max" in reason for reason in relus)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{ h = MatMul(x, small) y = MatMul(h, back) }", "8,192 weights, 4 bits pay from 65,536"),
        ("{ h = MatMul(x, odd) y = MatMul(h, uneven) }", "300 inputs are no multiple of the block"),
        ("{ h = MatMul(x, w) y = Clip(h, lo, hi) }", "does not fuse 4-bit weights with 'Clip_1'"),
        ("{ t = Transpose(x) p = MatMul(t, x) y = MatMul(x, p) }", "no float32 matrix"),
    ],
    ids=["small", "uneven", "clip", "two_activations"],
)
def test_what_does_not_take_4_bits_stays_in_float_with_a_reason(
    text: str, reason: str, tmp_path: Path
) -> None:
    every = {
        "small": normal(256, 32), "back": normal(32, 256), "odd": normal(256, 300),
        "uneven": normal(300, 256), "w": normal(256, 256), "lo": np.float32(0),
        "hi": np.float32(6), "v": normal(256, 256),
    }  # fmt: skip
    whole = f"(float[N,256] x) => (float[N,256] z) {text[:-1]} t2 = Tanh(y) z = MatMul(t2, v) }}"
    used = {name: value for name, value in every.items() if name in whole.replace("(x", "( x")}
    _, _, made = int4_of(whole, tmp_path, **{n: np.asarray(v) for n, v in used.items()})
    reasons = [
        n["reason"] for n in made.facts["float_nodes"] if n["operator"] in ("MatMul", "Gemm")
    ]
    assert any(reason in text for text in reasons)
    assert made.facts["compute_nodes_quantized"] >= 1


def test_convolutions_stay_in_float(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(AnswerIsNo, match="0 of 14 compute nodes") as caught:
        quantize(teacher_onnx, OPTIONS["int4"], data=calibration, out=tmp_path / "m.onnx")
    assert "MatMul and Gemm with 65,536 constant weights or more" in (caught.value.hint or "")
    assert not list(tmp_path.iterdir())


@given(
    arrays.arrays(
        np.float32, (2 * BLOCK, 3), elements=st.floats(-1e3, 1e3, width=32), fill=st.just(0)
    )
)
def test_no_block_is_further_off_than_by_its_largest_weight(weights: Array) -> None:
    levels, scale = quantized(weights)
    assert levels.dtype == INT4.dtype
    assert (levels.shape, scale.shape, scale.dtype) == ((64, 3), (2, 3), np.float32)
    assert (scale > 0).all()

    def error(steps: Array) -> Array:
        wide = np.repeat(steps, BLOCK, axis=0).astype(np.float64)
        off = INT4.nearest(weights / wide) * wide - weights
        return np.asarray((off**2).reshape(2, BLOCK, 3).sum(axis=1))

    largest = np.abs(weights).reshape(2, BLOCK, 3).max(axis=1)
    plain = np.where(largest > 1e-30, largest / 7, 1)
    power = (weights.astype(np.float64) ** 2).reshape(2, BLOCK, 3).sum(axis=1)
    assert (error(scale) <= error(plain) * 1.001 + 1e-9 * power).all()
    back = levels.astype(np.float32) * np.repeat(scale, BLOCK, axis=0)
    np.testing.assert_allclose(
        error(scale).sum(), ((back - weights) ** 2).sum(), rtol=1e-3, atol=1e-3
    )


@pytest.fixture(scope="module")
def perceptron(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """672-256-256-10, trained on the middle of Fashion-MNIST's images, without their margins."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("perceptron")
    for name, stop in (("train", 4000), ("evaluation", 1000), ("calibration", 256)):
        with np.load(FASHION / f"{name}.npz") as file:
            images = file["images"][:stop, :, :, 2:26].reshape(-1, 672).astype(np.float32)
            np.savez(folder / f"{name}.npz", x=images / 128 - 1, target=file["target"][:stop])
    with np.load(folder / "train.npz") as file:
        x, target = torch.from_numpy(file["x"]), torch.from_numpy(file["target"])
    sizes = (672, 256, 256, 10)
    layers = [torch.nn.Linear(a, b) for a, b in pairwise(sizes)]
    net = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(6):
        for some in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[some]), target[some]).backward()
            optimizer.step()
    weights: dict[str, Any] = {}
    for number, layer in enumerate(layers):
        weights |= {f"w{number}": layer.weight, f"b{number}": layer.bias}
    text = """(float[N,672] x) => (float[N,10] y) {
        h = Gemm<transB=1>(x, w0, b0) r = Relu(h) i = Gemm<transB=1>(r, w1, b1) s = Relu(i)
        y = Gemm<transB=1>(s, w2, b2)
    }"""
    model = parsed(text, **{n: np.asarray(w.detach().numpy()) for n, w in weights.items()})
    onnx.save(model, folder / "perceptron.onnx")
    return open_model(folder / "perceptron.onnx")


def test_a_trained_model_keeps_its_score_in_a_fifth_of_its_size(
    perceptron: Artifact, tmp_path: Path
) -> None:
    folder = perceptron.path.parent
    data, evaluation = (open_dataset(folder / f"{n}.npz") for n in ("calibration", "evaluation"))
    made = quantize(
        perceptron,
        OPTIONS["int4"],
        data=data,
        out=tmp_path / "q.onnx",
        promise=Promise(evaluation, "top1", 0.02),
    )
    facts = made.facts
    assert made.precision == "int4"
    assert perceptron.path.stat().st_size > 5 * made.path.stat().st_size
    assert (facts["candidate"], facts["calibration_method"]) == ("compute-int4", None)
    assert (facts["compute_nodes"], facts["compute_nodes_quantized"]) == (3, 2)
    assert facts["search"]["chosen"]["sqnr_db"] > 15
    assert facts["search"]["float_score"] > 0.75
    assert facts["search"]["chosen"]["drop"] <= 0.02
    assert facts["ranges"] == {}


def test_layers_go_back_to_float_where_a_promise_asks_for_it(
    perceptron: Artifact, tmp_path: Path
) -> None:
    folder = perceptron.path.parent
    data, evaluation = (open_dataset(folder / f"{n}.npz") for n in ("calibration", "evaluation"))

    def keeping(drop: float) -> Any:
        promise, out = Promise(evaluation, "cosine", drop), tmp_path / "q.onnx"
        made = quantize(
            perceptron, OPTIONS["int4"], data=data, out=out, promise=promise, force=True
        )
        return made.facts

    whole = keeping(0.99)
    assert whole["compute_nodes_quantized"] == 2
    part = keeping(whole["search"]["chosen"]["drop"] * 0.9)
    assert part["compute_nodes_quantized"] == 1
    assert "in float by measurement" in {n["reason"] for n in part["float_nodes"]}
    with pytest.raises(AnswerIsNo, match="no INT4 model keeps cosine within 0"):
        keeping(0.0)


@needs_tensorrt
def test_4_bit_weights_build_for_old_and_new_gpus(perceptron: Artifact, tmp_path: Path) -> None:
    data = open_dataset(perceptron.path.parent / "calibration.npz")
    options = QuantizeOptions(target="tensorrt", precision="int4")
    made = quantize(perceptron, options, data=data, out=tmp_path / "q.onnx")
    assert any("engines are built here, not run" in warning for warning in made.facts["warnings"])
    plan = BuildOptions(gpu=("sm80", "sm89"), opt_shapes=("x:4x672",))
    small = build(made, plan, out=tmp_path / "q.engine")
    assert small.precision == "int4"
    assert small.facts["network_layers"]["dequantize"] == 2
    whole = build(perceptron, plan, out=tmp_path / "f.engine")
    assert small.path.stat().st_size < whole.path.stat().st_size / 2


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (np.full((12, 256), np.nan, np.float32), "NaN"),
        (np.broadcast_to(np.float32(1), (12, 256)), "repetitions"),
    ],
    ids=["nan", "constant"],
)
def test_bad_data_is_refused_though_no_range_comes_of_it(
    x: Array, told: str, tmp_path: Path
) -> None:
    text = "(float[N,256] x) => (float[N,256] y) { y = MatMul(x, w) }"
    source, data = stored(parsed(text, w=normal(256, 256)), tmp_path, x=x)
    with pytest.raises(InputError, match=told):
        quantize(source, OPTIONS["int4"], data=data, out=tmp_path / "q.onnx")


def test_a_constant_input_beside_another_is_refused(tmp_path: Path) -> None:
    text = "(float[N,256] x, float[N,256] c) => (float[N,256] y) { a = Add(x, c) y = MatMul(a, w) }"
    arrays = {"x": normal(12, 256), "c": np.ones((12, 256), np.float32)}
    source, data = stored(parsed(text, w=normal(256, 256)), tmp_path, **arrays)
    with pytest.raises(InputError, match="input 'c' is 1"):
        quantize(source, OPTIONS["int4"], data=data, out=tmp_path / "q.onnx")


def test_a_model_that_gives_nan_is_refused(tmp_path: Path) -> None:
    text = "(float[N,256] x) => (float[N,256] y) { h = MatMul(x, w) y = Log(h) }"
    source, data = stored(parsed(text, w=normal(256, 256)), tmp_path, x=normal(12, 256))
    with pytest.raises(InputError, match="tensor 'y': a value is NaN"):
        quantize(source, OPTIONS["int4"], data=data, out=tmp_path / "q.onnx")


def test_weights_of_equal_scales_that_two_nodes_read_turned_and_not(tmp_path: Path) -> None:
    text = f"(float[N,256] x) => (float[N,256] y) {KINDS['shared']}"
    signs = np.sign(normal(256, 256)) / np.float32(16)
    source, data, made = int4_of(text, tmp_path, w=signs, b=normal(256))
    assert follow(source, made, data, "ort-cpu") > 30


# What is refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (QuantizeOptions(precision="fp8"), "ort-cpu has no FP8 kernels"),
        (QuantizeOptions(precision="fp8", target="openvino"), "openvino has no FP8 kernels"),
        (
            QuantizeOptions(precision="fp8", target="tensorrt", calibration_method="entropy"),
            "entropy is no calibration method for fp8",
        ),
        (
            QuantizeOptions(precision="int4", calibration_method="mse"),
            "mse is no calibration method for int4",
        ),
    ],
)
def test_what_a_precision_does_not_go_with(
    options: QuantizeOptions,
    told: str,
    teacher_onnx: Artifact,
    calibration: Dataset,
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        quantize(teacher_onnx, options, data=calibration, out=tmp_path / "m.onnx")
    assert caught.value.hint
    assert not list(tmp_path.iterdir())


def test_quantizing_an_fp8_model_again_is_refused(
    teacher_fp8: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="quantized already"):
        quantize(teacher_fp8, OPTIONS["int4"], data=calibration, out=tmp_path / "m.onnx")


def test_a_model_that_cannot_be_lifted_says_so(tmp_path: Path) -> None:
    """There is no way from the Scan of opset 8 with its lengths of sequences to later ones."""
    body = onnx.parser.parse_graph(
        "b (float[1] s, float[1] a) => (float[1] t, float[1] o) { t = Add(s, a) o = Identity(t) }"
    )
    scan = onnx.helper.make_node("Scan", ["n", "i", "x"], ["f", "y"], num_scan_inputs=1, body=body)
    model = parsed("(int64[1] n, float[1,1] i, float[1,3,1] x) => (float[1,3,1] y) { y = Neg(x) }")
    model.graph.node[0].CopyFrom(scan)
    model.opset_import[0].version = 8
    onnx.save(model, tmp_path / "scan.onnx")
    with pytest.raises(InputError, match="cannot be lifted from opset 8 to 21") as caught:
        prepare(tmp_path / "scan.onnx", opset=21)
    assert caught.value.hint == "export it with opset 21"
