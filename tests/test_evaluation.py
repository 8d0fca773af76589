"""Real sessions on real models: the counted batches come from ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from deploykit.backends import open_session
from deploykit.dataset import Dataset, open_dataset, padded
from deploykit.errors import InputError, UsageError
from deploykit.evaluation import collect, compare, evaluate
from deploykit.formats import open_model
from deploykit.session import Session
from deploykit.values import Array, Artifact
from tests.fixtures_core import refused

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(3, 4)).astype(np.float32)
X = RNG.normal(size=(11, 3)).astype(np.float32)
LABELS = (X @ WEIGHTS).argmax(1)
LABELS[:3] = (LABELS[:3] + 1) % 4

Shape = Sequence[int | str]
Sized = Callable[..., Session]


def linear(path: Path, batch: int | str, weights: Array, names: tuple[str, str]) -> Path:
    """y = x W and the sum of y over the classes, in ONNX."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], [names[0]]),
        helper.make_node("ReduceSum", [names[0], "axes"], [names[1]], keepdims=0),
    ]
    tensors = {"w": weights, "axes": np.array([1])}
    shapes: dict[str, Shape] = {names[0]: (batch, weights.shape[1]), names[1]: (batch,)}
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, (batch, 3))],
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in shapes.items()],
        [numpy_helper.from_array(a, n) for n, a in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sized]:
    """Opens linear models: by batch, weights and names of the outputs."""
    folder, sessions = tmp_path_factory.mktemp("models"), []

    def opens(
        batch: int | str = "batch", weights: Array = WEIGHTS, names: tuple[str, str] = ("y", "sum")
    ) -> Session:
        path = linear(folder / f"{len(sessions)}.onnx", batch, weights, names)
        sessions.append(open_session(open_model(path), "ort-cpu"))
        return sessions[-1]

    yield opens
    for session in sessions:
        session.__exit__(None, None, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("data") / "x.npz"
    np.savez(path, x=X, target=LABELS)
    return open_dataset(path)


def metric(folder: Path, body: str) -> str:
    (folder / "metric.py").write_text(f"import numpy as np\n{body}")
    return f"{folder / 'metric.py'}:metric"


# --- collect


@settings(max_examples=30)
@given(size=st.integers(1, 20), count=st.integers(1, 11), fixed=st.none() | st.integers(1, 13))
def test_outputs_are_those_of_all_samples_at_any_batch_size(
    opened: Sized, data: Dataset, size: int, count: int, fixed: int | None
) -> None:
    session = opened(fixed or "batch")
    outputs, targets = collect(session, data.first(count), batch_size=size)
    assert list(outputs) == ["y", "sum"]
    assert outputs["y"].shape == (count, 4)
    assert np.allclose(outputs["y"], X[:count] @ WEIGHTS, atol=1e-5)
    assert np.allclose(outputs["sum"], (X[:count] @ WEIGHTS).sum(1), atol=1e-5)
    assert targets is not None
    assert np.array_equal(targets, LABELS[:count])


def test_a_fixed_batch_is_filled_with_the_last_sample() -> None:
    assert padded(np.arange(3), 5).tolist() == [0, 1, 2, 2, 2]
    assert padded(np.arange(3), 3).tolist() == [0, 1, 2]


def test_progress_is_told_in_samples(opened: Sized, data: Dataset) -> None:
    calls: list[tuple[int, int]] = []
    collect(opened(), data, batch_size=4, progress=lambda *call: calls.append(call))
    assert calls == [(4, 11), (8, 11), (11, 11)]
    calls.clear()
    collect(opened(5), data, batch_size=4, progress=lambda *call: calls.append(call))
    assert calls == [(5, 11), (10, 11), (11, 11)]


def test_data_without_labels_gives_no_targets(opened: Sized, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=X)
    assert collect(opened(), open_dataset(tmp_path / "x.npz"))[1] is None


def test_data_that_does_not_fit_is_refused(opened: Sized, tmp_path: Path) -> None:
    for arrays, fact in (
        ({"z": X}, "'x'"),
        ({"x": X.astype(float)}, "float64"),
        ({"x": X[:, :2]}, "("),
    ):
        np.savez(tmp_path / "x.npz", **arrays)
        with refused(InputError, tmp_path, fact, hint=""):
            collect(opened(), open_dataset(tmp_path / "x.npz"))


# --- evaluate


def test_a_built_in_metric_scores_the_first_output(opened: Sized, data: Dataset) -> None:
    found = evaluate(opened(), data, "top1", batch_size=4)
    assert (found.metric, found.samples) == ("top1", 11)
    assert found.score.value == pytest.approx(8 / 11)
    assert found.per_sample == (0.0,) * 3 + (1.0,) * 8


def test_a_metric_that_compares_takes_a_reference(opened: Sized, data: Dataset) -> None:
    reference, _ = collect(opened(), data)
    assert evaluate(opened(), data, "agreement", reference=reference).score.value == 1
    turned = evaluate(opened(weights=-WEIGHTS), data, "cosine", reference=reference)
    assert turned.score.value == pytest.approx(-1)
    with refused(InputError, "'agreement'", "reference model", hint="--reference"):
        evaluate(opened(), data, "agreement")


def test_an_unknown_metric_is_refused(opened: Sized, data: Dataset) -> None:
    with refused(UsageError, "'tpo1'", hint="did you mean"):
        evaluate(opened(), data, "tpo1")


def test_a_metric_of_ones_own_is_called_with_all(
    opened: Sized, data: Dataset, tmp_path: Path
) -> None:
    name = metric(
        tmp_path,
        """
def metric(outputs, target, reference):
    assert sorted(outputs) == sorted(reference) == ["sum", "y"]
    assert len(outputs["y"]) == len(target) == 11
    return np.float32((outputs["y"].argmax(1) == target).mean() + np.abs(
        outputs["y"] - reference["y"]).max())
""",
    )
    reference, _ = collect(opened(), data)
    found = evaluate(opened(), data, name, reference=reference, batch_size=4)
    assert found.score.value == pytest.approx(8 / 11)
    assert np.isnan([found.score.low, found.score.high]).all()
    assert (found.metric, found.samples, found.per_sample) == ("metric.py:metric", 11, None)


@pytest.mark.parametrize(
    ("body", "fact", "hint"),
    [
        ("def metric(a, b, c): raise KeyError('k')", "raises KeyError: 'k'", "returns a number"),
        ("def metric(a, b, c): raise SystemExit(0)", "raises SystemExit: 0", "returns a number"),
        ("def metric(a): return 1", "raises TypeError", "(outputs, target, reference)"),
        ("def metric(a, b, c): return 'x'", "raises ValueError", "returns a number"),
        ("def metric(a, b, c): return None", "raises TypeError", "returns a number"),
        ("def metric(a, b, c): return float('nan')", "gives nan", "finite number"),
        ("def metric(a, b, c): return np.inf", "gives inf", "finite number"),
        ("def metrik(a, b, c): return 1", "no function 'metric'", "did you mean 'metrik'?"),
    ],
)
def test_a_metric_that_fails_is_bad_input(
    opened: Sized, data: Dataset, tmp_path: Path, body: str, fact: str, hint: str
) -> None:
    with refused(InputError, "metric.py", fact, hint=hint):
        evaluate(opened(), data, metric(tmp_path, body))


def test_a_metric_that_is_not_there_is_named(opened: Sized, data: Dataset, tmp_path: Path) -> None:
    with refused(InputError, tmp_path / "no.py", "no such file", hint="file.py:function"):
        evaluate(opened(), data, f"{tmp_path / 'no.py'}:metric")


# --- compare


def test_models_are_compared_output_by_output(opened: Sized, data: Dataset) -> None:
    y, total = compare(opened(), opened(4, weights=WEIGHTS * np.float32(1.5)), data, batch_size=3)
    want = X @ WEIGHTS
    assert (y.output, total.output) == ("y", "sum")
    assert y.max_absolute == pytest.approx(np.abs(want).max() / 2, rel=1e-4)
    assert y.max_relative == pytest.approx(0.5, rel=1e-4)
    assert y.sqnr_db == pytest.approx(20 * np.log10(2), rel=1e-4)
    assert y.cosine == pytest.approx(1)
    assert (y.agreement, total.agreement) == (1, None)


def test_outputs_of_other_names_are_not_compared(opened: Sized, data: Dataset) -> None:
    with refused(InputError, "['sum', 'y']", "['sum', 'z']", hint="same outputs"):
        compare(opened(), opened(names=("z", "sum")), data)


# --- the trained model


def test_the_teacher_scores_as_numpy_says(teacher: Artifact, evaluation: Dataset) -> None:
    some = evaluation.first(200)
    with open_session(teacher) as session:
        outputs, targets = collect(session, some)
        found = evaluate(session, some, "top1")
    assert found.score.value == (outputs["logits"].argmax(1) == targets).mean() > 0.9
    assert found.score.low < found.score.value < found.score.high
