"""What a student loses against its teacher: plain functions of outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from deploykit._code import load_function
from deploykit.errors import InputError
from deploykit.stages.distill.options import DistillOptions

if TYPE_CHECKING:
    import torch

Outputs = tuple["torch.Tensor", ...]
Loss = Callable[[Outputs, Outputs, "torch.Tensor | None"], "torch.Tensor"]
"""(outputs of the student, of the teacher, target) to a scalar, the mean over the samples."""


def kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    target: torch.Tensor | None,
    temperature: float,
    alpha: float,
) -> torch.Tensor:
    """Sum of alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) and (1 - alpha) CE(target).

    Logits are float [sample, class], targets int64 [sample] or None (then there is no second part);
    the result is a scalar, the mean over the samples. Hinton, Vinyals and Dean 2015
    (arXiv:1503.02531), section 2: T^2 keeps the gradients of both parts at the same size.
    """
    from torch.nn import functional

    soft = functional.kl_div(
        functional.log_softmax(student_logits / temperature, 1),
        functional.log_softmax(teacher_logits / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    loss = alpha * temperature**2 * soft
    if target is None:
        return loss
    return loss + (1 - alpha) * functional.cross_entropy(student_logits, target)


def dkd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    target: torch.Tensor,
    temperature: float,
    beta: float,
) -> torch.Tensor:
    """T^2 (TCKD + beta NCKD): the target class against all others, and the others among themselves.

    Logits are float [sample, class], targets int64 [sample]; a scalar, the mean over the samples.
    Zhao et al. 2022 (arXiv:2203.08679), equation 7, with 1 for their alpha.
    """
    import torch
    from torch.nn import functional

    own = functional.one_hot(target, student_logits.shape[1]).bool()
    parts = []
    for logits in (student_logits, teacher_logits):
        everything = functional.log_softmax(logits / temperature, 1)
        sure = everything[own][:, None]
        rest = torch.logsumexp(everything.masked_fill(own, -torch.inf), 1, keepdim=True)
        others = (logits / temperature)[~own].reshape(len(logits), -1)
        parts.append((torch.cat([sure, rest], 1), functional.log_softmax(others, 1)))
    two, many = (
        functional.kl_div(have, want, reduction="batchmean", log_target=True)
        for have, want in zip(*parts, strict=True)
    )
    return temperature**2 * (two + beta * many)


def mse_loss(
    student: Outputs, teacher: Outputs, target: torch.Tensor | None, alpha: float
) -> torch.Tensor:
    """Mean squares of the differences, summed over the outputs, times alpha; and the rest.

    The rest is (1 - alpha) times that of the first output and the target, of equal shape.
    """
    import torch
    from torch.nn import functional

    pairs = zip(student, teacher, strict=True)
    loss = alpha * torch.stack([functional.mse_loss(s, t) for s, t in pairs]).sum()
    if target is None:
        return loss
    return loss + (1 - alpha) * functional.mse_loss(student[0], target)


def cosine_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 minus the cosine of each sample's embedding, its axes flattened; the mean."""
    from torch.nn import functional

    return 1 - functional.cosine_similarity(student.flatten(1), teacher.flatten(1), dim=1).mean()


def relation_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Huber loss of the distances between the samples, each as a share of the mean distance.

    Embeddings [sample, ...] may differ in width. Park et al. 2019 (arXiv:1904.05068), equation 7.
    """
    import torch
    from torch.nn import functional

    shares = []
    for embedding in (student, teacher):
        flat = embedding.flatten(1)
        square = (flat[:, None] - flat[None]).square().sum(2)
        apart = square[~torch.eye(len(flat), dtype=torch.bool)].clamp_min(1e-12).sqrt()
        shares.append(apart / apart.mean().clamp_min(1e-12))
    return functional.smooth_l1_loss(shares[0], shares[1])


def make(options: DistillOptions) -> Loss:
    """The loss that is asked for. Raises InputError: no such function."""
    from torch.nn import functional

    alpha, temperature = options.alpha, options.temperature

    def first(student: Outputs, teacher: Outputs, target: torch.Tensor | None) -> torch.Tensor:
        one, other = student[0], teacher[0]
        if options.loss == "kd":
            return kd_loss(one, other, target, temperature, alpha)
        if options.loss == "cosine":
            return cosine_loss(one, other)
        if options.loss == "relation":
            return relation_loss(one, other)
        assert target is not None  # noqa: S101 - `lesson.read` has seen to it
        apart = dkd_loss(one, other, target, temperature, options.beta)
        return alpha * apart + (1 - alpha) * functional.cross_entropy(one, target)

    if options.loss == "mse":
        return partial(mse_loss, alpha=alpha)
    return first if ":" not in options.loss else _own(options.loss)


def _own(reference: str) -> Loss:
    """A user's function, whose failures are theirs to mend."""
    import torch

    function = load_function(reference)

    def loss(student: Outputs, teacher: Outputs, target: torch.Tensor | None) -> torch.Tensor:
        try:
            value = function(student, teacher, target)
        except Exception as error:
            raise InputError(
                f"the loss {reference} raises {type(error).__name__}: {error}",
                hint="it is called with (student's outputs, teacher's outputs, target)",
            ) from error
        if not isinstance(value, torch.Tensor) or value.ndim or not value.requires_grad:
            raise InputError(
                f"the loss {reference} gives {value!r}",
                hint="return a scalar tensor that depends on the student's outputs",
            )
        return value

    return loss
