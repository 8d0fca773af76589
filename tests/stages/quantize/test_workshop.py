"""Corrections as variants of one model: cut, written, tried and told; and the options for them."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from deploykit.backends import open_session
from deploykit.dataset import Dataset
from deploykit.evaluation import collect, evaluate
from deploykit.stages.quantize import QuantizeOptions, preset, quantize, rounding, workshop
from deploykit.stages.quantize.placement import chosen
from deploykit.stages.quantize.presets import SCOPES, Target
from deploykit.stages.quantize.workshop import CORRECTIONS, STRENGTHS, Correction, Variant, Workshop
from deploykit.values import Array, Artifact, SessionOptions
from tests.formats.test_onnx_graph import normal, parsed, stored
from tests.stages.quantize.test_qdq import TARGETS, compute, dequantized, follow

quantize_module = importlib.import_module("deploykit.stages.quantize")
SIMULATED = SessionOptions(simulate=True)
FOUR = QuantizeOptions(
    scope="compute", calibration_method="minmax", processor="vnni", corrections=CORRECTIONS
)


def opened(
    source: Artifact, data: Dataset, target: Target = "ort-cpu", *, wide: bool | None = True
) -> tuple[Workshop, Variant]:
    """The workshop of a model, and the variant of all that computes."""
    chosen_preset = preset(target, int8_dot_product=wide)
    shop = Workshop.open(source, chosen_preset, data, op_types=SCOPES["compute"], binned=False)
    return shop, Variant(chosen(shop.graph, SCOPES["compute"]), "minmax")


def result(artifact: Artifact, data: Dataset) -> Array:
    with open_session(artifact, "ort-cpu", SIMULATED) as session:
        return collect(session, data)[0]["y"]


# each alone, on a real model


def test_each_correction_alone_on_a_real_model(
    teacher_onnx: Artifact,
    calibration: Dataset,
    evaluation: Dataset,
    tmp_path: Path,
) -> None:
    shop, variant = opened(teacher_onnx, calibration.first(4))
    few = evaluation.first(64)
    with open_session(teacher_onnx, "ort-cpu") as session:
        want = evaluate(session, few, "top1").score.value
    files: dict[bytes, str] = {}
    for corrections in ((), *((name,) for name in CORRECTIONS), CORRECTIONS):
        name = "+".join(corrections) or "plain"
        some = replace(variant, corrections=corrections)
        artifact = shop.write(some, tmp_path / f"{name}.onnx")
        onnx.checker.check_model(onnx.load(artifact.path), full_check=True)
        with open_session(artifact, "ort-cpu", SIMULATED) as session:
            have = evaluate(session, few, "top1").score.value
        assert have >= want - 0.05, name
        files[artifact.path.read_bytes()] = name
        facts = shop.facts(some, {})
        assert facts["corrections"] == list(corrections)
        assert facts["compute_nodes_quantized"] == 14
        assert facts["multiply_accumulates_quantized"] == facts["multiply_accumulates"]
    assert len(files) >= 5  # smoothing changes nothing that a Relu does not let through


# models for which one of them is made

LOUD = "(float[N,16] x) => (float[N,8] y) { t = Tanh(x) g = Mul(t, loud) y = MatMul(g, w) }"
"""One channel of `g` is 200 times louder than the others, and its weights are that much smaller."""


def loud(folder: Path, text: str = LOUD) -> tuple[Artifact, Dataset]:
    gain = np.ones(16, np.float32)
    gain[3] = 200
    w = normal(16, 8) / gain[:, None]
    return stored(parsed(text, loud=gain, w=w), folder, x=normal(64, 16, seed=1))


UNEVEN = """(float[N,3,8,8] x) => (float[N,4,4,4] y) {
    h = Conv(x, w, b) r = Relu(h) y = Conv(r, v)
}"""


def uneven(folder: Path) -> tuple[Artifact, Dataset]:
    """Channels of a convolution that are 300 times larger than others."""
    sizes = np.geomspace(0.05, 15, 8, dtype=np.float32)
    w = normal(8, 3, 3, 3) * sizes[:, None, None, None]
    v = normal(4, 8, 3, 3) / sizes[:, None, None]
    return stored(parsed(UNEVEN, w=w, b=normal(8) * sizes, v=v), folder, x=normal(64, 3, 8, 8))


def test_an_outlier_channel_is_mended_by_smoothing_alone(tmp_path: Path) -> None:
    source, data = loud(tmp_path)
    shop, variant = opened(source, data)
    db = {
        name: follow(
            source,
            shop.write(replace(variant, corrections=(name,)), tmp_path / "q.onnx"),
            data,
            "simulated",
        )
        for name in CORRECTIONS
    }
    plain = follow(source, shop.write(variant, tmp_path / "q.onnx"), data, "simulated")
    assert min(db.pop(name) for name in STRENGTHS) > plain + 15
    assert max(db.values()) < plain + 5
    made = quantize(source, FOUR, data=data, out=tmp_path / "m.onnx")
    assert len(STRENGTHS.keys() & set(made.facts["corrections"])) == 1  # one of the two strengths
    assert "cross_layer_equalization" not in made.facts["corrections"]
    assert follow(source, made, data, "simulated") > plain + 15
    names = [c["name"] for c in made.facts["search"]["candidates"]]
    assert names[:3] == [
        "compute-minmax",
        "compute-minmax+cross_layer_equalization",
        "compute-minmax+smooth_quant",
    ]
    assert made.facts["candidate"] == made.facts["search"]["chosen"]["name"]


def test_smoothing_by_a_node_of_its_own_counts_the_work(tmp_path: Path) -> None:
    text = LOUD.replace("g = Mul(t, loud)", "s = Mul(t, loud) g = Elu(s)")
    source, data = loud(tmp_path, text)
    options = FOUR.model_copy(update={"corrections": ("smooth_quant",)})
    facts = quantize(source, options, data=data, out=tmp_path / "m.onnx").facts
    assert facts["corrections"] == ["smooth_quant"]
    assert facts["multiply_accumulates_quantized"] == facts["multiply_accumulates"] == 16 * 8
    operators = [n["operator"] for n in facts["float_nodes"]]
    assert operators == ["Tanh", "Mul", "Elu", "Mul"]


def test_uneven_layers_are_mended_by_equalization(tmp_path: Path) -> None:
    source, data = uneven(tmp_path)
    options = FOUR.model_copy(update={"corrections": ("none",)})
    plain = quantize(source, options, data=data, out=tmp_path / "plain.onnx")
    made = quantize(source, FOUR, data=data, out=tmp_path / "m.onnx")
    assert "cross_layer_equalization" in made.facts["corrections"]
    before, after = (follow(source, one, data, "simulated") for one in (plain, made))
    assert after > before + 10
    assert plain.facts["corrections"] == []
    assert "search" not in plain.facts


def test_corrections_that_do_not_help_are_left_out_and_told(tmp_path: Path) -> None:
    """Weights that are levels themselves: nothing is lost that could be made good."""
    w = np.sign(normal(16, 8)).astype(np.float32)
    text = "(float[N,16] x) => (float[N,8] y) { h = MatMul(x, w) y = Add(h, b) }"
    source, data = stored(parsed(text, w=w, b=normal(8)), tmp_path, x=normal(64, 16))
    tried: tuple[Correction, ...] = (
        "cross_layer_equalization", "adaptive_rounding", "bias_correction",
    )  # fmt: skip
    options = FOUR.model_copy(update={"corrections": tried})
    made = quantize(source, options, data=data, out=tmp_path / "m.onnx")
    assert made.facts["corrections"] == []
    assert made.facts["candidate"] == "compute-minmax"
    found = made.facts["search"]["candidates"]
    assert [c["name"] for c in found] == [
        "compute-minmax", *(f"compute-minmax+{name}" for name in tried),
    ]  # fmt: skip
    assert all(abs(c["sqnr_db"] - found[0]["sqnr_db"]) < 0.2 for c in found)


# what is cut


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("text", "weights", "shape"),
    [
        ("(float[N,24] x) => (float[N,6] y) { h = MatMul(x, w) y = Add(h, b) }", (24, 6), (24,)),
        ("(float[N,24] x) => (float[N,6] y) { y = Gemm(x, w) }", (24, 6), (24,)),
        (
            "(float[N,4,5,5] x) => (float[N,6,3,3] y) { y = Conv(x, w) }",
            (6, 4, 3, 3),
            (4, 5, 5),
        ),
    ],
    ids=["matmul", "gemm", "conv"],
)
@pytest.mark.parametrize("first", [(), ("adaptive_rounding",)])
def test_bias_correction_in_the_written_model(
    first: tuple[Correction, ...],
    text: str,
    weights: tuple[int, ...],
    shape: tuple[int, ...],
    target: Target,
    tmp_path: Path,
) -> None:
    """Coarse scales make the errors of the weights large beside those of the activations."""
    w = normal(*weights)
    axis = 0 if len(weights) == 4 else 1
    np.moveaxis(w, axis, 0).reshape(6, -1)[:] = np.moveaxis(w, axis, 0).reshape(6, -1)
    index = (slice(None), 0, 0, 0) if axis == 0 else (0, slice(None))
    w[index] = 40
    x = np.abs(normal(32, *shape))
    x[:, 0] = 0
    source, data = stored(parsed(text, w=w, b=normal(6)), tmp_path, x=x)
    shop, variant = opened(source, data, target)
    want = result(source, data)
    others = tuple(i for i in range(want.ndim) if i != 1)

    def bias(*corrections: Correction) -> float:
        artifact = shop.write(replace(variant, corrections=corrections), tmp_path / "q.onnx")
        onnx.checker.check_model(onnx.load(artifact.path), full_check=True)
        return float(np.abs((result(artifact, data) - want).mean(others)).max())

    assert bias("bias_correction") < 0.35 * bias()
    if first:
        assert bias(*first, "bias_correction") <= bias(*first) * 1.05 + 1e-3


def test_adaptive_integers_are_written_for_each_node_that_shares_weights(tmp_path: Path) -> None:
    text = """(float[N,12] x) => (float[N,12] y) {
        [one] h = MatMul(x, w) r = Relu(h) [two] y = MatMul(r, w)
    }"""
    x = normal(40, 12) @ normal(12, 12, seed=3)
    source, data = stored(parsed(text, w=normal(12, 12)), tmp_path, x=x)
    shop, variant = opened(source, data)
    path = tmp_path / "q.onnx"
    shop.write(replace(variant, corrections=("adaptive_rounding",)), path)
    written = onnx.load(path)
    one, two = (dequantized(written, node.input[1]) for node in compute(written))
    shop.write(variant, path)
    plain = onnx.load(path)
    nearest = dequantized(plain, compute(plain)[0].input[1])
    np.testing.assert_array_equal(one[1], nearest[1])
    assert one[0].dtype == np.int8
    assert 0 < np.abs(one[0].astype(int) - nearest[0]).max() <= 3
    assert (one[0] != two[0]).any()


def test_rounding_is_done_once_for_equal_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = loud(tmp_path)
    shop, _ = opened(source, data)
    asked: list[list[str]] = []
    real = rounding.adaptive

    def counted(graph: object, scales: dict[str, Array], *rest: object) -> dict[str, Array]:
        asked.append(list(scales))
        return real(graph, scales, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(workshop, "adaptive", counted)
    (name,) = (n.name for n in shop.graph.nodes.values() if n.op_type == "MatMul")
    scale = np.full(8, 0.02, np.float32)
    first = shop.rounding({name: scale})
    again = shop.rounding({name: scale.copy()})
    other = shop.rounding({name: scale * 2})
    assert asked == [[name], [], [name]]
    np.testing.assert_array_equal(first[name], again[name])
    assert (other[name] != first[name]).any()
    assert shop.rounding({}) == {}


def test_an_equalized_graph_has_a_calibration_of_its_own(tmp_path: Path) -> None:
    source, data = uneven(tmp_path)
    shop, _ = opened(source, data)
    other = shop.equalized("cross_layer_equalization")
    assert other
    assert shop.equalized("cross_layer_equalization") is other
    assert shop.corrected(Variant((), "minmax", corrections=("bias_correction",))) is shop
    assert shop.corrected(Variant((), "minmax", corrections=("cross_layer_equalization",))) is other
    assert other.rounded is not shop.rounded
    assert shop.seen["r"].high > 3 * other.seen["r"].high
    both = shop.corrected(Variant((), "minmax", corrections=CORRECTIONS))
    middle = other.equalized("smooth_quant")
    assert middle
    assert both is middle.equalized("smooth_quant_strong")
    assert both is not shop.equalized("smooth_quant_strong")
    np.testing.assert_allclose(  # of the equalized graph, not of the first one
        next(iter(other.channels.values())).largest,
        next(iter(shop.channels.values())).largest,
    )
    last = list(shop.channels)[-1]
    assert (other.channels[last].largest != shop.channels[last].largest).any()


def test_where_nothing_can_be_equalized_the_graph_stays(tmp_path: Path) -> None:
    text = "(float[N,4,4] x) => (float[N,4,4] y) { y = MatMul(x, x) }"
    source, data = stored(parsed(text), tmp_path, x=normal(16, 4, 4))
    shop, variant = opened(source, data)
    assert shop.equalized("cross_layer_equalization") is None
    assert shop.equalized("smooth_quant") is None
    corrected = replace(variant, corrections=CORRECTIONS)
    assert shop.corrected(corrected) is shop
    shop.write(variant, tmp_path / "plain.onnx")
    shop.write(corrected, tmp_path / "all.onnx")
    assert (tmp_path / "plain.onnx").read_bytes() == (tmp_path / "all.onnx").read_bytes()


# the options


@pytest.mark.parametrize(
    ("corrections", "tried", "chooses"),
    [
        (("auto",), CORRECTIONS, False),
        (("none",), (), False),
        ((), (), False),
        (("smooth_quant",), ("smooth_quant",), True),
        (("bias_correction", "smooth_quant"), ("smooth_quant", "bias_correction"), True),
        (("auto", "smooth_quant"), CORRECTIONS, True),
    ],
)
def test_which_corrections_are_tried(
    corrections: tuple[Correction, ...], tried: tuple[Correction, ...], *, chooses: bool
) -> None:
    fixed = QuantizeOptions(scope="compute", calibration_method="minmax", corrections=corrections)
    assert fixed.tried_corrections == tried
    assert fixed.chooses == chooses
    assert fixed.model_copy(update={"scope": "auto"}).chooses
    assert fixed.model_copy(update={"calibration_method": "auto"}).chooses


@pytest.mark.parametrize("corrections", [("auto",), ("none",)])
def test_where_all_is_fixed_auto_tries_none(
    corrections: tuple[Correction, ...], tmp_path: Path
) -> None:
    source, data = loud(tmp_path)
    options = FOUR.model_copy(update={"corrections": corrections})
    facts = quantize(source, options, data=data, out=tmp_path / "m.onnx").facts
    assert facts["corrections"] == []
    assert "search" not in facts


@pytest.mark.parametrize(
    ("target", "processor", "dot_product", "want", "told"),
    [
        ("tensorrt", "this", True, ("ort-cpu", True), "engines are built here, not run"),
        ("tensorrt", "this", False, ("ort-cpu", True), "engines are built here, not run"),
        ("ort-cpu", "vnni", False, ("ort-cpu", True), "this CPU sums 8-bit products in 16 bits"),
        ("openvino", "vnni", False, ("ort-cpu", True), "this CPU sums 8-bit products in 16 bits"),
        ("ort-cpu", "vnni", True, ("ort-cpu", False), ""),
        ("ort-cpu", "any", False, ("ort-cpu", False), ""),
        ("ort-cpu", "this", True, ("ort-cpu", False), ""),
    ],
)
def test_where_candidates_are_judged(
    target: Target,
    processor: str,
    want: tuple[str, bool],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    dot_product: bool,
) -> None:
    monkeypatch.setattr(quantize_module, "has_int8_dot_product", lambda: dot_product)
    options = QuantizeOptions.model_validate({"target": target, "processor": processor})
    runtime, simulated, warnings = quantize_module._runtime(options)
    assert (runtime, simulated) == want
    assert len(warnings) == bool(told)
    assert all(told in warning for warning in warnings)


# the work of a model whose dimensions are open

OPEN_SIZES = {
    "image": ("float[N,4,P,Q]", "h = Relu(x) y = Conv(h, w)", 4 * 5 * 3 * 27),
    "product of activations": (
        "float[P,Q]",
        "h = Conv(x, w) f = Flatten(h) t = Transpose(f) y = MatMul(f, t)",
        4 * 5 * 3 * 27 + 4 * 5 * 3,
    ),
    "rows of all samples": (
        "float[M,4]",
        "t = Transpose<perm=[0,2,3,1]>(x) r = Reshape(t, rows) y = MatMul(r, v)",
        7 * 5 * 3 * 4,
    ),
    "size by the weights": ("float[M,4]", "f = Flatten(x) y = MatMul(f, u)", 7 * 5 * 3 * 4),
}


@pytest.mark.parametrize(
    ("name", "smooth"),
    [
        *((name, False) for name in OPEN_SIZES),
        ("rows of all samples", True),
        ("size by the weights", True),
    ],
)
def test_open_dimensions_count_as_those_of_a_sample(
    name: str, smooth: bool, tmp_path: Path
) -> None:
    out, nodes, work = OPEN_SIZES[name]
    constants = {"w": normal(4, 3, 3, 3), "v": normal(3, 4), "u": normal(105, 4)}
    constants["rows"] = np.array([-1, 3])
    model = parsed(
        f"(float[N,3,H,W] x) => ({out} y) {{ {nodes} }}",
        **{name: value for name, value in constants.items() if f", {name})" in nodes},
    )
    x = normal(16, 3, 7, 5) * normal(3, 7, 5) ** 3
    source, data = stored(model, tmp_path, x=x)
    shop, variant = opened(source, data)
    shop = shop.equalized("smooth_quant") or shop if smooth else shop
    assert smooth == any("Smooth" in node for node in shop.graph.nodes)
    assert shop.facts(variant, {})["multiply_accumulates"] == work
