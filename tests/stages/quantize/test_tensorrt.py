"""The preset of TensorRT on its real builder: what is in scope computes on integers there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploykit.dataset import Dataset
from deploykit.stages.build import BuildOptions, build, unavailable
from deploykit.stages.quantize import QuantizeOptions, placement, quantize
from deploykit.values import Artifact
from tests.formats.test_onnx_graph import CONV, normal, parsed, stored
from tests.stages.quantize.test_qdq import CASES, IMAGE, TWO, Case

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
SCALARS = {name: np.array(v, np.float32) for name, v in (("k", 1.414), ("one", 1), ("half", 0.5))}
JOINED = {
    "silu": Case(
        f"{IMAGE} {{ h = {CONV}(x, w, b) s = Sigmoid(h) r = Mul(h, s) y = {CONV}(r, v) }}",
        (3, 8, 8), TWO, {},
    ),
    "hard_swish": Case(
        f"{IMAGE} {{ h = {CONV}(x, w, b) r = HardSwish(h) y = {CONV}(r, v) }}",
        (3, 8, 8), TWO, {},
    ),
    "gelu": Case(
        f"{IMAGE} {{ h = {CONV}(x, w, b) d = Div(h, k) e = Erf(d) a = Add(e, one) m = Mul(h, a) "
        f"r = Mul(m, half) y = {CONV}(r, v) }}",
        (3, 8, 8), TWO, {}, SCALARS,
    ),
    "average_pool": Case(
        f"(float[N,3,8,8] x) => (float[N,4,4,4] y) {{ h = {CONV}(x, w, b) "
        f"p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(h) y = {CONV}(p, v) }}",
        (3, 8, 8), TWO, {},
    ),
}  # fmt: skip


def built(source: Artifact, data: Dataset, folder: Path, **options: object) -> Artifact:
    """The engine of the quantized model."""
    asked = QuantizeOptions.model_validate({"target": "tensorrt", **options})
    quantized = quantize(source, asked, data=data, out=folder / "q.onnx")
    (spec,) = source.inputs
    sample = "x".join(str(size) for size in spec.shape[1:])
    shapes = {
        f"{kind}_shapes": (f"{spec.name}:{n}x{sample}",)
        for kind, n in (("min", 1), ("opt", 4), ("max", 8))
    }
    return build(quantized, BuildOptions.model_validate(shapes), out=folder / "q.engine")


IN_SCOPE = {name: case for name, case in (CASES | JOINED).items() if name != "depthwise"}


@pytest.mark.parametrize("case", IN_SCOPE.values(), ids=IN_SCOPE)
def test_all_that_computes_reads_integers(case: Case, tmp_path: Path) -> None:
    constants = {name: normal(*shape) for name, shape in case.constants.items()} | case.fixed
    source, data = stored(parsed(case.text, **constants), tmp_path, x=normal(12, *case.shape))
    made = built(source, data, tmp_path, calibration_method="minmax")
    assert made.facts["compute_layers"] >= 1
    assert made.facts["compute_layers_quantized"] == made.facts["compute_layers"]


def test_what_is_kept_in_float_is_not_counted(
    teacher_onnx: Artifact, calibration: Dataset, tmp_path: Path
) -> None:
    kept = ("node_linear", "node_Conv_191")
    made = built(
        teacher_onnx, calibration.first(16), tmp_path, calibration_method="minmax", keep_float=kept
    )
    assert made.facts["compute_layers"] == 14
    assert made.facts["compute_layers_quantized"] == 12


@pytest.mark.parametrize("channels", [1, 4])
def test_a_depthwise_convolution_stays_in_float_and_the_engine_is_smaller(
    channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "(float[N,256,8,8] x) => (float[N,256,8,8] y) { [one] h = Conv(x, w) r = Relu(h) "
        f"[middle] k = Conv<pads=[1,1,1,1], group={256 // channels}>(r, v) s = Relu(k) "
        "[two] y = Conv(s, u) }"
    )
    point = (256, 256, 1, 1)
    model = parsed(text, w=normal(*point), v=normal(256, channels, 3, 3), u=normal(*point))
    source, data = stored(model, tmp_path, x=normal(12, 256, 8, 8))
    made = built(source, data, tmp_path, calibration_method="minmax")
    assert made.facts["compute_layers_quantized"] == (2 if channels == 1 else 3)
    told = [node["reason"] for node in made.history[-2].facts["float_nodes"]]
    assert any("depthwise" in reason for reason in told) == (channels == 1)
    if channels == 1:
        (tmp_path / "all").mkdir()
        monkeypatch.setattr(placement, "_is_depthwise", lambda *_: False)
        larger = built(source, data, tmp_path / "all", calibration_method="minmax")
        assert larger.facts["compute_layers_quantized"] == 3
        assert made.path.stat().st_size < larger.path.stat().st_size
