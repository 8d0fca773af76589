"""What can be asked of distillation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from deploykit.values import Value

BUILT_IN = ("kd", "dkd", "mse", "cosine", "relation")
LABELLED = ("kd", "dkd", "mse")
"""Losses with a part for the labels."""


class DistillOptions(Value):
    """How the student learns: by default, stochastic gradient descent with a one-cycle rate."""

    loss: str = Field(
        default="kd",
        description="kd: softened logits; dkd: the same, target class and others apart; mse: all "
        "outputs; cosine: embeddings; relation: distances between the embeddings of a batch; or "
        "file.py:function, called with (student's outputs, teacher's outputs, target)",
    )
    temperature: float = Field(default=4.0, gt=0, description="divides the logits before softmax")
    alpha: float = Field(
        default=0.7, ge=0, le=1, description="weight of the teacher; the labels have the rest"
    )
    beta: float = Field(
        default=8.0, ge=0, description="of dkd: weight of the classes that are not the target"
    )
    hints: tuple[str, ...] = Field(
        default=(),
        description="layers whose outputs follow the teacher's through a learned projection: a "
        "name, or student's=teacher's",
    )
    hint_weight: float = Field(default=1.0, gt=0, description="weight of the hints")
    augment: str | None = Field(
        default=None,
        description="file.py:function that gives another batch, called with (inputs by name, "
        "generator); the teacher sees that batch too",
    )
    epochs: int = Field(default=2, ge=1, description="passes over the data")
    optimizer: Literal["sgd", "adamw"] = Field(
        default="sgd", description="sgd: with Nesterov momentum; adamw: for transformers"
    )
    learning_rate: float = Field(
        default=0.05, gt=0, description="peak, after a warm-up of 15 % of the steps, then a cosine"
    )
    batch_size: int = Field(default=128, ge=1, description="samples in a step, of all processes")
    weight_decay: float = Field(default=5e-4, ge=0, description="L2 penalty on all parameters")
    clip: float | None = Field(default=None, gt=0, description="largest norm of the gradient")
    ema: float | None = Field(
        default=None, gt=0, lt=1, description="decay of the mean of the weights that is kept"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="bf16: products in 16 bits; weights and losses stay in fp32"
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="stop when so many epochs brought no better score on a twentieth of the data, "
        "which is held back; the best weights are kept",
    )
    metric: str = Field(
        default="top1", description="score of the data held back: a name or file.py:function"
    )
    seed: int = Field(default=0, ge=0, description="of the order of the data and of dropout")
    threads: int | None = Field(
        default=None, ge=1, description="processor threads; all allowed cores by default"
    )

    @field_validator("loss")
    @classmethod
    def _known(cls, loss: str) -> str:
        if ":" not in loss and loss not in BUILT_IN:
            raise ValueError(f"unknown loss {loss!r}; known: {', '.join(BUILT_IN)}, or a function")
        return loss

    @model_validator(mode="after")
    def _used(self) -> DistillOptions:
        fields = type(self).model_fields.items()
        given = {name for name, field in fields if getattr(self, name) != field.default}
        if "alpha" in given and self.loss not in LABELLED:
            raise ValueError(f"the loss {self.loss} has no part for labels: leave alpha out")
        if "beta" in given and self.loss != "dkd":
            raise ValueError("beta belongs to the loss dkd")
        if "temperature" in given and self.loss not in ("kd", "dkd"):
            raise ValueError(f"the loss {self.loss} has no temperature")
        if "metric" in given and self.patience is None:
            raise ValueError("metric is the score that patience watches: give patience too")
        return self

    @property
    def labels(self) -> bool:
        """Whether the loss cannot do without labels."""
        return self.loss == "dkd" or (self.loss in LABELLED and self.alpha < 1)
