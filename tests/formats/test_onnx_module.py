"""An ONNX graph in PyTorch computes what ONNX Runtime does, operator by operator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from deploykit.errors import InputError
from deploykit.formats import onnx_module
from tests.formats.test_onnx_graph import normal
from tests.formats.test_onnx_graph import parsed as parsed_at

IMAGE = "(float[N,4,9,9] x) => (float[?,?,?,?] y)"
VECTOR = "(float[N,6] x) => (float[?,?] y)"
W, B, V = normal(6, 4, 3, 3), normal(6), normal(4, 1, 3, 3)
GRAPHS: dict[str, tuple[str, str, dict[str, np.ndarray]]] = {
    "conv": (
        IMAGE, "y = Conv<pads=[1,0,2,1], strides=[2,1]>(x, w, b)",
        {"w": W, "b": B},
    ),
    "conv dilated": (
        IMAGE, "y = Conv<dilations=[2,2]>(x, w)",
        {"w": W},
    ),
    "conv grouped": (
        IMAGE, "y = Conv<group=4>(x, v)",
        {"v": V},
    ),
    "conv same upper": (
        IMAGE, 'y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w)',
        {"w": W},
    ),
    "conv same lower": (
        IMAGE, 'y = Conv<auto_pad="SAME_LOWER", strides=[2,2]>(x, w)',
        {"w": W},
    ),
    "max pool": (
        IMAGE, "y = MaxPool<kernel_shape=[3,3], pads=[1,1,0,0], strides=[2,2]>(x)",
        {},
    ),
    "max pool ceil": (
        IMAGE, "y = MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(x)",
        {},
    ),
    "average pool": (
        IMAGE, "y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)",
        {},
    ),
    "average pool all": (
        IMAGE, "y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x)",
        {},
    ),
    "global": (
        IMAGE, "a = GlobalAveragePool(x) m = GlobalMaxPool(x) y = Add(a, m)",
        {},
    ),
    "resize": (
        IMAGE, ('y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", '
     'nearest_mode="floor">(x, , s)'),
        {"s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "resize linear": (
        IMAGE, 'y = Resize<mode="linear">(x, , s)',
        {"s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "pad": (
        IMAGE, "y = Pad(x, p)",
        {"p": np.array([0, 0, 1, 2, 0, 0, 0, 3], np.int64)},
    ),
    "batch norm": (
        IMAGE, "y = BatchNormalization(x, s, t, m, v)",
        {"s": normal(4), "t": normal(4), "m": normal(4), "v": normal(4) ** 2 + 1},
    ),
    "prelu": (
        IMAGE, "y = PRelu(x, s)",
        {"s": normal(4, 1, 1)},
    ),
    "slice": (
        IMAGE, "y = Slice(x, a, b, c, d)",
        {"a": np.array([1, -4]), "b": np.array([3, 2**40]), "c": np.array([1, 3]),
         "d": np.array([1, 2])},
    ),
    "split": (
        IMAGE, "a, b = Split<axis=1>(x, s) y = Concat<axis=1>(b, a)",
        {"s": np.array([1, 3])},
    ),
    "split even": (
        IMAGE, "a, b = Split<axis=1, num_outputs=2>(x) y = Sub(b, a)",
        {},
    ),
    "gather": (
        IMAGE, "y = Gather<axis=2>(x, i)",
        {"i": np.array([-1, 0, 3])},
    ),
    "transpose": (
        IMAGE, "y = Transpose<perm=[0,2,3,1]>(x)",
        {},
    ),
    "mean": (
        IMAGE, "y = ReduceMean(x, a)",
        {"a": np.array([2, 3])},
    ),
    "reshape": (
        IMAGE, ("s = Shape<start=0, end=1>(x) t = Concat<axis=0>(s, r) f = Reshape(x, t) u = "
     "Unsqueeze(f, a) y = Identity(u)"),
        {"r": np.array([4, 81]), "a": np.array([3])},
    ),
    "gemm": (
        VECTOR, "y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)",
        {"w": normal(3, 6), "b": normal(3)},
    ),
    "flatten": (
        VECTOR, "f = Flatten<axis=1>(x) y = MatMul(f, w)",
        {"w": normal(6, 2)},
    ),
    "layer norm": (
        VECTOR, "y = LayerNormalization(x, s, b)",
        {"s": normal(6), "b": normal(6)},
    ),
    "softmax": (
        VECTOR, "s = Softmax(x) l = LogSoftmax(x) y = Add(s, l)",
        {},
    ),
    "clip": (
        VECTOR, "c = Clip(x, l, h) d = Clip(x, l) y = Add(c, d)",
        {"l": np.array(-0.5, np.float32), "h": np.array(0.7, np.float32)},
    ),
    "activations": (
        VECTOR, ("a = Relu(x) b = Sigmoid(x) c = Tanh(x) d = HardSigmoid(x) e = HardSwish(x) f = "
     "LeakyRelu(x) g = Elu(x) h = Softplus(x) i = Erf(x) y = Max(a, b, c, d, e, f, "
     "g, h, i)"),
        {},
    ),
    "gelu": (
        VECTOR, 'a = Gelu(x) b = Gelu<approximate="tanh">(x) y = Div(a, b)',
        {},
    ),
    "where": (
        VECTOR, "m = Greater(x, z) y = Where(m, x, z)",
        {"z": np.array(0.1, np.float32)},
    ),
    "pow": (
        VECTOR, "p = Pow(x, t) q = Sqrt(p) r = Exp(q) y = Min(r, p)",
        {"t": np.array(2, np.float32)},
    ),
    "expand": (
        VECTOR, "e = ConstantOfShape(s) f = Expand(e, s) y = Add(x, f)",
        {"s": np.array([1, 6])},
    ),
    "cast": (
        VECTOR, "c = Cast<to=7>(x) d = Cast<to=1>(c) s = Squeeze(q, a) y = Mul(d, s)",
        {"q": normal(1, 6), "a": np.array([0])},
    ),
}  # fmt: skip


def parsed(text: str, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    return parsed_at(text, opset=20, **constants)


def module_of(graph: onnx.ModelProto, folder: Path) -> torch.nn.Module:
    onnx.save(graph, folder / "m.onnx")
    return onnx_module.load(folder / "m.onnx")


@pytest.mark.parametrize(("head", "body", "constants"), GRAPHS.values(), ids=GRAPHS)
def test_an_operator(
    head: str, body: str, constants: dict[str, np.ndarray], tmp_path: Path
) -> None:
    graph = parsed(f"{head} {{ {body} }}", constants)
    module = module_of(graph, tmp_path)
    x = normal(3, 4, 9, 9) if head == IMAGE else normal(3, 6)
    (want,) = ort.InferenceSession(tmp_path / "m.onnx").run(None, {"x": x})
    (have,) = module(torch.tensor(x))
    np.testing.assert_allclose(have.detach().numpy(), want, rtol=1e-4, atol=1e-5)


def test_every_operator_is_held_against_the_runtime() -> None:
    from deploykit.formats.onnx_operators import operators

    graphs = [parsed(f"{head} {{ {body} }}", given) for head, body, given in GRAPHS.values()]
    seen = {node.op_type for graph in graphs for node in graph.graph.node}
    plain = {"Abs", "Neg", "Log", "Reciprocal", "Not", "Equal", "Less", "LessOrEqual", "And", "Or",
             "GreaterOrEqual", "Dropout", "ReduceSum", "ReduceMax", "ReduceMin"}  # fmt: skip
    assert set(operators()) - seen - plain == set()


def test_what_cannot_be_trained_is_named(tmp_path: Path) -> None:
    graph = parsed(
        f"{VECTOR} {{ h = Round(x) a = Add(h, z) y = Sin(h) }}", {"z": np.zeros(6, "f8")}
    )
    graph.graph.node[1].input[0] = "z"
    graph.graph.initializer[0].CopyFrom(onnx.helper.make_tensor("z", 15, [1], [1j]))
    with pytest.raises(InputError, match="cannot be trained: Round, Sin, constants in COMPLEX128"):
        onnx_module.TrainedGraph(graph, "m")


def test_int32_that_is_no_bias_is_refused(tmp_path: Path) -> None:
    text = f"{VECTOR} {{ d = DequantizeLinear(i, s) y = Add(x, d) }}"
    constants = {"i": np.arange(6, dtype=np.int32), "s": np.array(0.5, np.float32)}
    graph = parsed(text, constants)
    with pytest.raises(InputError, match="no bias of a quantized node"):
        module_of(graph, tmp_path)
