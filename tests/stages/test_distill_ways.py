"""Ways to distill: losses, hints, ensembles, the training and what interrupts it, processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deploykit import store
from deploykit.errors import InputError, ResourceError, StageError, UsageError
from deploykit.stages.distill import DistillOptions, checkpoint, distill
from deploykit.stages.distill.losses import dkd_loss, kd_loss, relation_loss
from deploykit.stages.distill.training import rate
from deploykit.values import Artifact
from tests.stages.test_distill import QUICK, RNG, ROOT_PATH, X, data, equal, mlp, weights

OWN = """
import torch

def good(student, teacher, target):
    return (student[0] - teacher[0]).abs().mean() + 0 * target.sum()

def raises(student, teacher, target):
    raise ValueError("no")

def constant(student, teacher, target):
    return torch.tensor(1.0)

def nan_later(student, teacher, target):
    global calls
    calls = globals().get("calls", 0) + 1
    return student[0].sum() * (float("nan") if calls > 8 else 0.001)

def shifted(inputs, rng):
    return {"x": inputs["x"] + 0.1 * torch.randn(inputs["x"].shape, generator=rng)}

def cut(inputs, rng):
    return {"x": inputs["x"][:, :3]}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


@pytest.fixture
def teacher(tmp_path: Path) -> Artifact:
    return mlp(tmp_path / "teacher")


@pytest.fixture
def student(tmp_path: Path) -> Artifact:
    return mlp(tmp_path / "wide_student", hidden=20)


def quick(**changes: object) -> DistillOptions:
    return DistillOptions(**{"epochs": 3, "batch_size": 32, "threads": 1, **changes})


# Losses


@given(seed=st.integers(0, 999), temperature=st.floats(0.5, 8))
def test_decoupled_parts_make_the_whole(seed: int, temperature: float) -> None:
    """KD = TCKD + (1 - p of the target) NCKD, for each sample (Zhao et al., equation 6)."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, 1, 7, generator=rng, dtype=torch.float64)
    target = torch.randint(0, 7, (1,), generator=rng)
    rest = 1 - float((teacher / temperature).softmax(1)[0, target])
    whole = kd_loss(student, teacher, None, temperature, 1.0)
    assert float(dkd_loss(student, teacher, target, temperature, rest)) == pytest.approx(
        float(whole), rel=1e-6, abs=1e-9
    )


@given(seed=st.integers(0, 999), scale=st.floats(0.1, 10))
def test_relations_do_not_change_with_scale_and_rotation(seed: int, scale: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    one = torch.randn(6, 5, generator=rng, dtype=torch.float64)
    turned = scale * one @ torch.linalg.qr(torch.randn(5, 5, generator=rng, dtype=torch.float64))[0]
    assert float(relation_loss(turned, one)) == pytest.approx(0, abs=1e-9)
    assert float(relation_loss(one.flip(1).cumsum(1), one)) > 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "dkd"}, {"loss": "mse", "alpha": 1.0}, {"loss": "cosine"}, {"loss": "relation"},
        {"hints": ("0",)}, {"optimizer": "adamw", "learning_rate": 0.01}, {"clip": 0.5},
        {"ema": 0.5}, {"precision": "bf16"},
    ],
    ids=str,
)  # fmt: skip
def test_each_way_learns(
    changes: dict[str, object], student: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    made = distill(
        student, quick(epochs=6, **changes), teacher=teacher, data=data(tmp_path),
        out=tmp_path / "out",
    )  # fmt: skip
    losses = made.facts["loss_per_epoch"]
    assert losses[-1] < losses[0]
    assert not equal(made, student)


def test_a_clipped_gradient_moves_the_weights_less(
    student: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    moved = []
    for clip in (None, 1e-3):
        options = quick(epochs=1, clip=clip, weight_decay=0)
        made = distill(
            student, options, teacher=teacher, data=data(tmp_path), out=tmp_path / f"{clip}"
        )
        old, new = weights(student), weights(made)
        moved.append(sum(float((old[k] - new[k]).square().sum()) for k in old))
    assert moved[1] < moved[0] / 100


def test_teachers_teach_the_mean(student: Artifact, teacher: Artifact, tmp_path: Path) -> None:
    other = mlp(tmp_path / "another_one")
    lesson, options = data(tmp_path), quick(loss="mse", alpha=1.0)

    def taught(name: str, *teachers: Artifact) -> Artifact:
        return distill(student, options, teacher=teachers, data=lesson, out=tmp_path / name)

    both, twice, one = (
        taught("b", teacher, other),
        taught("t", teacher, teacher),
        taught("o", teacher),
    )
    assert equal(twice, one)
    assert not equal(both, one)
    assert both.facts["teacher_2"] == other.sha256
    with pytest.raises(UsageError, match="no teacher"):
        taught("n")


def test_a_loss_and_an_augmentation_of_ones_own(
    student: Artifact, teacher: Artifact, own: Path, tmp_path: Path
) -> None:
    lesson = data(tmp_path)
    options = quick(loss=f"{own}:good", augment=f"{own}:shifted")
    made = [
        distill(student, options, teacher=teacher, data=lesson, out=tmp_path / name)
        for name in "ab"
    ]
    assert equal(*made)
    assert {"loss", "augment"} <= set(made[0].history[-1].inputs)
    plain = quick(loss=f"{own}:good")
    assert not equal(
        made[0], distill(student, plain, teacher=teacher, data=lesson, out=tmp_path / "c")
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "raises"}, "raises ValueError: no"),
        ({"loss": "constant"}, r"gives tensor\(1\.\)"),
        ({"loss": "missing"}, "no function 'missing'"),
        ({"augment": "cut"}, "gives other shapes"),
    ],
)
def test_functions_that_fail(
    changes: dict[str, str], message: str, student: Artifact, teacher: Artifact, own: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    options = quick(**{k: f"{own}:{v}" for k, v in changes.items()})
    with pytest.raises(InputError, match=message):
        distill(student, options, teacher=teacher, data=data(tmp_path), out=tmp_path / "out")


def test_a_hint_at_no_layer(student: Artifact, teacher: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'9', and the model has no such layer"):
        distill(
            student, quick(hints=("0=9",)), teacher=teacher, data=data(tmp_path),
            out=tmp_path / "out",
        )  # fmt: skip


# The training


@pytest.mark.parametrize("total", [5, 18, 100])
def test_the_rate_is_that_of_torch(total: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.3, total, pct_start=0.15, cycle_momentum=False
    )
    for step in range(total):
        assert rate(step, total, 0.3) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step + 1 < total:
            schedule.step()


def test_patience_ends_a_training_and_keeps_the_best(
    student: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    options = quick(epochs=30, patience=2, learning_rate=0.3, metric="agreement")
    lesson = data(tmp_path)
    made = distill(student, options, teacher=teacher, data=lesson, out=tmp_path / "out")
    scores, best = made.facts["score_per_epoch"], made.facts["best_epoch"]
    assert len(scores) < 30
    assert scores[best - 1] == max(scores)
    assert len(scores) == best + 2
    assert made.facts["samples_seen"] == len(scores) * 192, "a twentieth of 203 is held back"


PROGRAM = """
import sys
from pathlib import Path
from deploykit import store
from deploykit.dataset import open_dataset
from deploykit.stages.distill import DistillOptions, distill

student, teacher, data, out, options = sys.argv[1:]
made = distill(
    store.read(Path(student)), DistillOptions.model_validate_json(options),
    teacher=store.read(Path(teacher)), data=open_dataset(data), out=Path(out),
    progress=lambda step, total, text: print(step, flush=True),
)
"""
RICH = {
    "epochs": 40, "batch_size": 32, "threads": 1, "ema": 0.9, "hints": ("0",),
    "optimizer": "adamw", "learning_rate": 0.01, "patience": 39, "metric": "agreement",
}  # fmt: skip


def test_killed_it_goes_on_to_the_same_result(
    student: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    lesson, options = data(tmp_path), DistillOptions(**RICH)
    whole = distill(student, options, teacher=teacher, data=lesson, out=tmp_path / "whole")
    out = tmp_path / "killed"
    kept = checkpoint.path_for(out)
    words = [student.path, teacher.path, tmp_path / "data.npz", out, options.model_dump_json()]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT_PATH)},
    )  # fmt: skip
    while not kept.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    made = distill(student, options, teacher=teacher, data=lesson, out=out)
    assert 0 < made.facts["resumed_after_epoch"] < 40
    assert equal(made, whole)
    for fact in ("loss_per_epoch", "score_per_epoch", "best_epoch"):
        assert made.facts[fact] == whole.facts[fact]
    assert not kept.exists()


def test_a_torn_checkpoint_or_one_of_another_job_is_not_used(
    student: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    lesson, out = data(tmp_path), tmp_path / "out"
    kept = checkpoint.path_for(out)
    kept.write_bytes(b"torn")
    made = distill(student, QUICK, teacher=teacher, data=lesson, out=out)
    assert "resumed_after_epoch" not in made.facts
    checkpoint.save(kept, "another", checkpoint.Progress(epochs=2), {"student/x": torch.zeros(1)})
    assert checkpoint.load(kept, "another") is not None
    assert checkpoint.load(kept, "mine") is None


def test_a_loss_that_is_nan_keeps_the_last_checkpoint(
    student: Artifact, teacher: Artifact, own: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(StageError, match=r"the loss is nan at step 9 of 18; .* epoch 1 is kept"):
        distill(
            student, quick(loss=f"{own}:nan_later"), teacher=teacher, data=data(tmp_path), out=out
        )
    assert checkpoint.path_for(out).exists()
    assert not out.exists()


def test_a_full_disk_at_a_checkpoint(
    student: Artifact, teacher: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    lesson = data(tmp_path)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ResourceError, match="no space left"):
        distill(student, QUICK, teacher=teacher, data=lesson, out=tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("changes", [{}, {"hints": ("0",), "clip": 1.0}], ids=str)
def test_two_processes_learn_what_one_learns(
    changes: dict[str, object], student: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    lesson, options = data(tmp_path), quick(**changes)
    one = distill(student, options, teacher=teacher, data=lesson, out=tmp_path / "one")
    (tmp_path / "program.py").write_text(PROGRAM)
    words = [
        tmp_path / "program.py", student.path, teacher.path, tmp_path / "data.npz",
        tmp_path / "two", options.model_dump_json(),
    ]  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         *map(str, words)],
        check=False, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT_PATH)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    two = store.read(tmp_path / "two")
    assert two is not None
    assert two.facts["processes"] == 2
    assert two.facts["loss_per_epoch"] == pytest.approx(one.facts["loss_per_epoch"], rel=1e-4)
    a, b = weights(one), weights(two)
    assert all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)
    assert not checkpoint.path_for(two.path).exists()


# Refusals


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "kdd"}, {"loss": "cosine", "alpha": 0.5}, {"beta": 2}, {"metric": "top5"},
        {"loss": "mse", "temperature": 2}, {"ema": 1}, {"clip": 0}, {"patience": 0},
    ],
)  # fmt: skip
def test_options_that_do_not_fit(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DistillOptions(**options)


def test_targets_of_a_regression_that_do_not_fit(
    student: Artifact, teacher: Artifact, tmp_path: Path
) -> None:
    lesson = data(tmp_path, x=X, target=RNG.normal(size=(203, 3)).astype(np.float32))
    with pytest.raises(InputError, match=r"'target' is \(3,\) a sample"):
        distill(student, quick(loss="mse"), teacher=teacher, data=lesson, out=tmp_path / "out")
