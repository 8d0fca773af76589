"""Real engines, built with TensorRT for RTX and no GPU."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest

from deploykit import gpu
from deploykit.dataset import Dataset, open_dataset
from deploykit.errors import (
    AnswerIsNo,
    InputError,
    MissingError,
    ResourceError,
    StageError,
    UsageError,
)
from deploykit.formats import open_model
from deploykit.stages.build import BuildOptions, build, child, unavailable
from deploykit.stages.quantize import QuantizeOptions, quantize
from deploykit.values import Artifact

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
SHAPES = {"opt_shapes": ("x:4x3x8x8",)}
without_gpu = pytest.mark.skipif(gpu.unavailable() is None, reason="there is a GPU")


def model(folder: Path, body: str, **constants: np.ndarray) -> Artifact:
    """A model of one dynamic input x: float[n,3,8,8] and one output y."""
    text = (
        f'<ir_version: 9, opset_import: ["" : 19]> m (float[n,3,8,8] x) => (float[n,a,b,c] y)'
        f" {{ {body} }}"
    )
    proto = onnx.parser.parse_model(text)
    for name, array in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, folder / "m.onnx")
    return open_model(folder / "m.onnx")


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.fixture
def conv(tmp_path: Path) -> Artifact:
    return model(tmp_path, "y = Conv<pads=[1,1,1,1]>(x, w)", w=weights(4, 3, 3, 3))


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    np.savez(tmp_path / "data.npz", x=weights(6, 3, 8, 8))
    return open_dataset(tmp_path / "data.npz")


def test_the_work_is_counted(conv: Artifact, tmp_path: Path) -> None:
    made = build(conv, BuildOptions(**SHAPES), out=tmp_path / "m.engine")
    assert made.facts["multiply_accumulates_by_precision"] == {"fp32": 4 * 4 * 8 * 8 * 27}
    assert made.facts["accounted_from"] == "the parsed network"
    assert made.facts["flags"] == ["TF32"]


@pytest.mark.parametrize(
    ("body", "constants", "work"),
    [
        ("y = Conv<group=3>(x, w)", {"w": weights(6, 1, 1, 1)}, 4 * 6 * 64),
        ("y = ConvTranspose<strides=[2,2]>(x, w)", {"w": weights(3, 5, 2, 2)}, 4 * 3 * 64 * 4 * 5),
        ("y = MatMul(x, w)", {"w": weights(8, 7)}, 4 * 3 * 8 * 7 * 8),
        ("t = Transpose<perm=[0,1,3,2]>(x) y = MatMul(t, w)", {"w": weights(8, 2)}, 4 * 24 * 2 * 8),
    ],
)
def test_the_work_of_each_kind_of_layer(
    body: str, constants: dict[str, np.ndarray], work: int, tmp_path: Path
) -> None:
    made = build(model(tmp_path, body, **constants), BuildOptions(**SHAPES), out=tmp_path / "e")
    assert made.facts["multiply_accumulates_by_precision"] == {"fp32": work}


def test_a_float_file_is_no_int8_engine(conv: Artifact, tmp_path: Path) -> None:
    options = BuildOptions(precision="int8", **SHAPES)
    with pytest.raises(AnswerIsNo, match=r"0.0% .* are in int8: fp32 100.0%") as caught:
        build(conv, options, out=tmp_path / "m.engine")
    assert "quantize --target tensorrt --precision int8" in caught.value.hint
    assert not (tmp_path / "m.engine").exists()


def test_a_share_that_is_missed_names_what_is_in_float(tmp_path: Path, data: Dataset) -> None:
    source = model(
        tmp_path, "h = Conv<pads=[1,1,1,1]>(x, w) y = Conv(h, v)",
        w=weights(4, 3, 3, 3), v=weights(4, 4, 1, 1),
    )  # fmt: skip
    kept = QuantizeOptions(target="tensorrt", calibration_method="minmax", keep_float=("*Conv_0*",))
    half = quantize(source, kept, data=data, out=tmp_path / "half.onnx")
    options = BuildOptions(**SHAPES)
    made = build(half, options, out=tmp_path / "half.engine")
    work = made.facts["multiply_accumulates_by_precision"]
    assert set(work) == {"int8", "fp32"}
    share = work["int8"] / sum(work.values())
    with pytest.raises(AnswerIsNo, match=f"{share:.1%} .* at least 99.0% was asked") as caught:
        build(half, options.model_copy(update={"min_share": 0.99}), out=tmp_path / "e")
    assert caught.value.hint.startswith("in float: ")
    assert "(fp32)" in caught.value.hint


def test_a_pair_on_which_nothing_computes_is_told(tmp_path: Path) -> None:
    source = model(
        tmp_path,
        "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) e = Exp(d)"
        " y = Conv<pads=[1,1,1,1]>(e, w)",
        w=weights(4, 3, 3, 3), s=np.float32(0.1), z=np.int8(0),
    )  # fmt: skip
    made = build(source, BuildOptions(precision="fp32", **SHAPES), out=tmp_path / "m.engine")
    assert len(made.facts["pairs_unfused"]) == 1
    assert made.facts["compute_layers_quantized"] == 0
    with pytest.raises(AnswerIsNo, match="are in int8"):  # what the file claims to be
        build(source, BuildOptions(**SHAPES), out=tmp_path / "e")


@pytest.mark.parametrize(
    ("body", "constants", "told"),
    [
        (
            "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Conv(d, w)",
            {"s": np.float32(0.1), "z": np.uint8(128), "w": weights(4, 3, 1, 1)},
            "'x' is quantized to uint8",
        ),
        (
            "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)",
            {"s": np.float32(0.1), "z": np.int8(3)},
            "'x' has a zero point that is not 0",
        ),
        (
            "b = DequantizeLinear(bq, s) y = Conv(x, w, b)",
            {"w": weights(4, 3, 1, 1), "bq": np.ones(4, np.int32), "s": np.float32(1)},
            "the bias 'bq' is int32",
        ),
    ],
)
def test_pairs_that_tensorrt_refuses_are_told_by_tensor(
    body: str, constants: dict[str, np.ndarray], told: str, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match="parser refuses") as caught:
        build(model(tmp_path, body, **constants), BuildOptions(**SHAPES), out=tmp_path / "e")
    assert told in str(caught.value)
    assert "--target tensorrt" in caught.value.hint


def test_an_operator_without_support_is_told(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 19, "ours" : 1]> '
        "m (float[1,3] x) => (float[1,3] y) { y = ours.Fancy(x) }"
    )
    onnx.save(proto, tmp_path / "m.onnx")
    source = open_model(tmp_path / "m.onnx", native=True)
    with pytest.raises(StageError, match=r"no support for the operator ours\.Fancy") as caught:
        build(source, BuildOptions(), out=tmp_path / "e")
    assert "--plugins" in caught.value.hint


def test_several_profiles(conv: Artifact, tmp_path: Path) -> None:
    options = BuildOptions(
        min_shapes=("x:1x3x8x8",),
        opt_shapes=("x:1x3x8x8", "x:16x3x8x8"),
        max_shapes=("x:4x3x8x8", "x:64x3x8x8"),
    )
    made = build(conv, options, out=tmp_path / "m.engine")
    assert made.facts["profiles"] == [
        {"x": [[1, 3, 8, 8], [1, 3, 8, 8], [4, 3, 8, 8]]},
        {"x": [[1, 3, 8, 8], [16, 3, 8, 8], [64, 3, 8, 8]]},
    ]


def test_shapes_from_real_data(conv: Artifact, data: Dataset, tmp_path: Path) -> None:
    options = BuildOptions(batch_sizes=(1, 2, 6))
    made = build(conv, options, out=tmp_path / "m.engine", data=data)
    assert made.facts["profile"] == {"x": [[1, 3, 8, 8], [2, 3, 8, 8], [6, 3, 8, 8]]}
    assert made.history[-1].inputs["shapes"] == data.digest


def test_flags_reach_the_builder(conv: Artifact, tmp_path: Path) -> None:
    options = BuildOptions(
        tf32=False, sparsity=True, weight_streaming=True, tiling="full", workspace_mib=64, **SHAPES
    )
    made = build(conv, options, out=tmp_path / "m.engine")
    assert made.facts["flags"] == ["SPARSE_WEIGHTS", "WEIGHT_STREAMING"]


@without_gpu
@pytest.mark.parametrize(
    ("asked", "kind", "told"),
    [
        ({"timing_cache": "t"}, UsageError, "no timing cache"),
        ({"version_compatible": True}, UsageError, "no version-compatible engines"),
        ({"hardware_compatibility": "ampere-plus"}, UsageError, "no --hardware-compatibility"),
        ({"refit": True}, MissingError, "needs a GPU for --refit"),
        ({"strip_weights": True}, MissingError, "needs a GPU for --strip-weights"),
        ({"gpu": ("sm90",)}, UsageError, "unknown compute capability 'sm90'"),
        ({"plugins": ("absent.so",)}, InputError, "no such plugin library"),
    ],
)
def test_what_this_flavour_lacks_is_said_by_name(
    asked: dict[str, object], kind: type[Exception], told: str, conv: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=told):
        build(conv, BuildOptions.model_validate({**asked, **SHAPES}), out=tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_file_that_is_no_plugin_is_refused(conv: Artifact, tmp_path: Path) -> None:
    (tmp_path / "p.so").write_text("no library")
    options = BuildOptions(plugins=(str(tmp_path / "p.so"),), **SHAPES)
    with pytest.raises(StageError, match=r"p\.so"):
        build(conv, options, out=tmp_path / "e")


def alive() -> list[str]:
    """Building processes that this one started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            command = (folder / "cmdline").read_text()
        except OSError:
            continue
        if int(status[1]) == os.getpid() and status[0] != "Z" and "build.worker" in command:
            found.append(command)
    return found


def test_an_interrupt_ends_the_building_process(conv: Artifact, tmp_path: Path) -> None:
    heard = []

    def talk(text: str, done: int, total: int) -> None:
        heard.append((text, done, total, alive()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(conv, BuildOptions(**SHAPES), out=tmp_path / "m.engine", talk=talk)
    assert len(heard) == 1
    assert heard[0][3]
    assert not alive()
    assert not list(tmp_path.glob("*engine*"))


def test_progress_is_told(conv: Artifact, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    build(conv, BuildOptions(**SHAPES), out=tmp_path / "m.engine", talk=lambda *a: heard.append(a))
    assert len(heard) > 10
    assert all(text and 0 <= done <= total for text, done, total in heard)


@pytest.mark.parametrize(
    ("number", "kind", "told"),
    [
        (signal.SIGSEGV, StageError, "tensorrt-rtx crashed while it built .*signal 11"),
        (signal.SIGKILL, ResourceError, "the system killed the build"),
    ],
)
def test_a_crash_of_native_code_is_told(
    number: int, kind: type[Exception], told: str, conv: Artifact, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    code = f"import os, sys; sys.stdin.readline(); os.kill(os.getpid(), {int(number)})"
    monkeypatch.setattr(child, "WORKER", (child.WORKER[0], "-c", code))
    with pytest.raises(kind, match=told):
        build(conv, BuildOptions(**SHAPES), out=tmp_path / "m.engine")
    assert not (tmp_path / "m.engine").exists()


@without_gpu
def test_without_a_driver_it_is_said_why() -> None:
    with pytest.raises(OSError, match=r"libcuda"):
        ctypes.CDLL(gpu.DRIVER)
    assert gpu.unavailable() == "no NVIDIA driver on this machine (libcuda.so.1 is not there)"
