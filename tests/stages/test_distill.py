from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file

from deploykit import store
from deploykit.dataset import Dataset, open_dataset
from deploykit.errors import InputError, StageError, UsageError
from deploykit.formats import torch_folder, torch_module
from deploykit.stages.distill import DistillOptions, distill, kd_loss, paced
from deploykit.stages.prune import PruneOptions, prune
from deploykit.stages.take import TakeOptions, take
from deploykit.values import Array, Artifact, TensorSpec
from tests.stages import small_models

ROOT_PATH = Path(__file__).parents[2]
FACTORIES = Path(small_models.__file__)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(203, 16)).astype(np.float32)
Y = (X[:, :10] + X[:, 6:]).argmax(1)
QUICK = DistillOptions(epochs=3, batch_size=32, threads=1)


def mlp(out: Path, **arguments: int) -> Artifact:
    torch.manual_seed(len(out.name))
    weights = out.with_suffix(".pt")
    torch.save(small_models.mlp(**arguments).state_dict(), weights)
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 16))
    options = TakeOptions(
        factory=f"{FACTORIES}:mlp", arguments=arguments, weights=weights, inputs=(spec,)
    )
    return take(options, out=out)


def data(folder: Path, **arrays: Array) -> Dataset:
    np.savez(folder / "data.npz", **(arrays or {"x": X, "target": Y}))
    return open_dataset(folder / "data.npz")


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.path / torch_folder.WEIGHTS)


def equal(one: Artifact, other: Artifact) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def teacher(tmp_path: Path) -> Artifact:
    return mlp(tmp_path / "teacher")


@pytest.fixture
def student(tmp_path: Path) -> Artifact:
    return prune(mlp(tmp_path / "student"), PruneOptions(ratio=0.5), out=tmp_path / "small")


# The zeros of a masked model


@pytest.mark.parametrize("options", [{"method": "weights", "ratio": 0.5}, {"method": "2:4"}])
def test_a_masked_student_keeps_its_zeros(
    options: dict[str, object], teacher: Artifact, tmp_path: Path
) -> None:
    student = prune(mlp(tmp_path / "s"), PruneOptions(**options), out=tmp_path / "masked")
    made = distill(student, QUICK, teacher=teacher, data=data(tmp_path), out=tmp_path / "out")
    names = torch_folder.describe(made.path).sparse
    assert len(names) == 2
    before, after = weights(student), weights(made)
    for name in names:
        zero = before[name] == 0
        assert zero.float().mean() == pytest.approx(0.5, abs=0.01)
        assert torch.equal(after[name] == 0, zero)


# The loss


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


@given(seed=st.integers(0, 2**16), temperature=st.floats(0.5, 20), alpha=st.floats(0, 1))
def test_the_loss_is_that_of_the_paper(seed: int, temperature: float, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(scale=3, size=(2, 5, 7))
    target = rng.integers(0, 7, 5)
    p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    soft = (np.exp(p) * (p - q)).sum(1).mean()
    hard = -log_softmax(student)[np.arange(5), target].mean()
    tensors = (torch.from_numpy(a) for a in (student, teacher, target))
    loss = kd_loss(*tensors, temperature, alpha)
    assert float(loss) == pytest.approx(alpha * temperature**2 * soft + (1 - alpha) * hard)


def test_without_labels_the_loss_is_the_soft_part() -> None:
    student, teacher = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 2, 0])
    without = kd_loss(student, teacher, None, 4.0, 1.0)
    assert torch.equal(without, kd_loss(student, teacher, target, 4.0, 1.0))
    assert float(kd_loss(teacher, teacher, None, 4.0, 1.0)) == pytest.approx(0, abs=1e-6)


def test_the_gradient_of_the_soft_part_does_not_vanish_with_the_temperature() -> None:
    teacher = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    norms = []
    for temperature in (10.0, 40.0):
        student = torch.zeros(64, 10, requires_grad=True)
        kd_loss(student, teacher, None, temperature, 1.0).backward()
        norms.append(float(student.grad.norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


# Training


def test_the_student_comes_to_agree_with_the_teacher(teacher: Artifact, tmp_path: Path) -> None:
    student = mlp(tmp_path / "wide", hidden=64)
    lesson = data(tmp_path, x=X)
    options = DistillOptions(
        alpha=1, epochs=40, batch_size=16, learning_rate=0.1, weight_decay=0, threads=1
    )
    made = distill(student, options, teacher=teacher, data=lesson, out=tmp_path / "out")

    def gap(artifact: Artifact) -> float:
        models = (torch_folder.load(a) for a in (artifact, teacher))
        one, other = (torch_module.run(m, teacher.inputs, {"x": X})[0] for m in models)
        return float(np.square(log_softmax(one) - log_softmax(other)).mean())

    assert gap(made) < gap(student) / 20
    losses = made.facts["loss_per_epoch"]
    assert len(losses) == 40
    assert losses[-1] < losses[0] / 20


def test_the_account(student: Artifact, teacher: Artifact, tmp_path: Path) -> None:
    lesson = data(tmp_path)
    before = store.digest(student.path), store.digest(teacher.path)
    made = distill(student, QUICK, teacher=teacher, data=lesson, out=tmp_path / "out")
    assert (store.digest(student.path), store.digest(teacher.path)) == before
    facts = made.facts
    assert facts["steps"] == 3 * 6
    assert facts["samples_seen"] == 3 * 6 * 32  # of 203, what fills no batch is left out
    assert len(facts["seconds_per_epoch"]) == 3
    assert (facts["teacher"], facts["data"], facts["threads"]) == (teacher.sha256, lesson.digest, 1)
    record = made.history[-1]
    assert record.inputs == {
        "source": student.sha256, "teacher": teacher.sha256, "data": lesson.digest,
    }  # fmt: skip
    assert [r.stage for r in made.history] == ["take", "prune", "distill"]
    assert torch_folder.describe(made.path).edits == torch_folder.describe(student.path).edits
    assert not equal(made, student)
    assert store.read(made.path) == made


def test_a_seed_fixes_the_weights(student: Artifact, teacher: Artifact, tmp_path: Path) -> None:
    lesson = data(tmp_path)
    made = [
        distill(
            student,
            QUICK.model_copy(update={"seed": seed}),
            teacher=teacher,
            data=lesson,
            out=tmp_path / f"out{index}",
        )
        for index, seed in enumerate((3, 3, 4))
    ]
    assert equal(made[0], made[1])
    assert not equal(made[0], made[2])


def test_threads_and_the_global_generator_come_back(
    student: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    options = QUICK.model_copy(update={"threads": threads + 1})
    made = distill(student, options, teacher=teacher, data=data(tmp_path), out=tmp_path / "out")
    assert made.facts["threads"] == threads + 1
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_images_with_batch_statistics_and_dropout(tmp_path: Path) -> None:
    (tmp_path / "preprocessing.toml").write_text(
        'input = "images"\ncolor = "gray"\nmean = [0.5]\nstd = [0.25]\n'
    )
    pixels = RNG.integers(0, 256, (70, 1, 12, 12), dtype=np.uint8)
    lesson = data(tmp_path, images=pixels, target=RNG.integers(0, 4, 70).astype(np.uint8))
    spec = TensorSpec(name="images", dtype="float32", shape=("batch", 1, 12, 12))
    options = TakeOptions(factory=f"{FACTORIES}:convnet", inputs=(spec,))
    model = take(options, out=tmp_path / "model")
    chosen = DistillOptions(epochs=2, batch_size=16, threads=1)
    made = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # the global generator is no part of the result
        out = tmp_path / f"out{seed}"
        made.append(distill(model, chosen, teacher=model, data=lesson, out=out))
    assert equal(*made)
    assert made[0].preprocessing == lesson.preprocessing is not None
    moved = weights(made[0])["0.1.running_mean"]
    assert not torch.equal(moved, weights(model)["0.1.running_mean"])


def test_two_inputs_one_of_them_integers(tmp_path: Path) -> None:
    inputs = (
        TensorSpec(name="x", dtype="float32", shape=("batch", 16)),
        TensorSpec(name="words", dtype="int64", shape=("batch", 4)),
    )
    options = TakeOptions(factory=f"{FACTORIES}:two_inputs", inputs=inputs)
    model = take(options, out=tmp_path / "model")
    lesson = data(tmp_path, words=RNG.integers(0, 10, (203, 4)), x=X, target=Y)
    small = prune(model, PruneOptions(ratio=0.5), out=tmp_path / "small")
    made = distill(small, QUICK, teacher=model, data=lesson, out=tmp_path / "out")
    assert made.facts["loss_per_epoch"][-1] < made.facts["loss_per_epoch"][0]


@pytest.mark.parametrize("epochs", [1, 3])
def test_fewer_samples_than_a_batch(
    epochs: int, student: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    lesson = data(tmp_path, x=X[:10], target=Y[:10])
    options = QUICK.model_copy(update={"epochs": epochs})
    made = distill(student, options, teacher=teacher, data=lesson, out=tmp_path / "out")
    assert (made.facts["steps"], made.facts["samples_seen"]) == (epochs, 10 * epochs)


def test_progress_is_told(student: Artifact, teacher: Artifact, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    distill(
        student, QUICK, teacher=teacher, data=data(tmp_path), out=tmp_path / "out",
        progress=lambda *call: told.append(call),
    )  # fmt: skip
    assert told[-1][:2] == (18, 18)
    assert told[-1][2].startswith("epoch 3, loss ")


def test_progress_is_told_no_more_often_than_its_interval() -> None:
    told: list[int] = []
    clock = itertools.count(0.0, 0.125)
    call = paced(lambda step, total, text: told.append(step), 0.5, lambda: next(clock))
    for step in range(1, 11):
        call(step, 10, "")
    assert told == [1, 5, 9, 10]


# Refusals


def test_a_loss_that_explodes_stops_and_leaves_nothing(
    student: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    options = QUICK.model_copy(update={"learning_rate": 1e20})
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(StageError, match=r"the loss is (nan|inf) at step \d+ of 18") as caught:
        distill(student, options, teacher=teacher, data=data(tmp_path), out=tmp_path / "out")
    assert "learning rate" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "data.npz"])


def test_ctrl_c_leaves_nothing(student: Artifact, teacher: Artifact, tmp_path: Path) -> None:
    def interrupt(step: int, total: int, text: str) -> None:
        raise KeyboardInterrupt

    (tmp_path / "made").mkdir()
    with pytest.raises(KeyboardInterrupt):
        distill(
            student, QUICK, teacher=teacher, data=data(tmp_path), out=tmp_path / "made/out",
            progress=interrupt,
        )  # fmt: skip
    assert not list((tmp_path / "made").iterdir())


def test_labels_are_needed_below_alpha_1(
    student: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    lesson = data(tmp_path, x=X)
    with pytest.raises(UsageError, match="has no labels") as caught:
        distill(student, QUICK, teacher=teacher, data=lesson, out=tmp_path / "out")
    assert "alpha to 1" in caught.value.hint


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Y.astype(np.float32), "'target' is float32"),
        (Y[:, None], "'target' is int64 of 2 axes"),
        (Y + 1, "label 10 is no class of a model with 10 outputs"),
        (Y - 1, "label -1 is no class"),
    ],
)
def test_bad_labels(
    target: Array, message: str, student: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    lesson = data(tmp_path, x=X, target=target)
    with pytest.raises(InputError, match=message):
        distill(student, QUICK, teacher=teacher, data=lesson, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": X, "target": Y}, "no array for the model input 'x'"),
        ({"x": X[:, :9], "target": Y}, r"shape is \(203, 9\)"),
        ({"x": X.astype(np.float64), "target": Y}, "dtype is float64"),
        ({"x": np.where(X > 2, np.nan, X), "target": Y}, "NaN"),
    ],
)
def test_bad_data(
    arrays: dict[str, Array], message: str, student: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    lesson = data(tmp_path, **arrays)
    with pytest.raises(InputError, match=message):
        distill(student, QUICK, teacher=teacher, data=lesson, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_other_classes(student: Artifact, tmp_path: Path) -> None:
    other = mlp(tmp_path / "other", classes=7)
    with pytest.raises(InputError, match=r"student is \(2, 10\), of the teacher \(2, 7\)"):
        distill(student, QUICK, teacher=other, data=data(tmp_path), out=tmp_path / "out")


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_engine_neither_learns_nor_teaches(
    role: str, student: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    models = {"student": student, "teacher": teacher}
    models[role] = models[role].model_copy(update={"format": "engine"})
    with pytest.raises(InputError, match=f"the {role} must be a PyTorch or ONNX model"):
        distill(
            models["student"], QUICK, teacher=models["teacher"], data=data(tmp_path),
            out=tmp_path / "out",
        )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"alpha": 1.1}, {"alpha": -0.1}, {"epochs": 0}, {"temprature": 4}],
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        DistillOptions(**options)
