"""What every layout is asked, and what it answers."""

from __future__ import annotations

from typing import Protocol

from pydantic import Field, field_validator

from deploykit.values import Artifact, TensorSpec, Value


class Serving(Value):
    """How the models of a bundle are named and served."""

    name: str = Field(
        default="model",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        max_length=100,
        description="name of the model, and of its folder in the triton layout",
    )
    version: int = Field(
        default=1, ge=1, description="version of the bundle; only ever raise it, never reuse one"
    )
    max_batch_size: int = Field(
        default=32,
        ge=0,
        description="triton: most samples in one run, 0 turns batching off; "
        "a model of fixed batch is always served with 0",
    )
    instances: int = Field(
        default=1, ge=1, description="triton: copies of the model that run side by side"
    )
    threads: int = Field(
        default=1, ge=1, description="triton: threads of one copy; copies x threads <= cores"
    )
    queue_delay_us: int = Field(
        default=100, ge=0, description="triton: microseconds to wait for more requests to batch"
    )
    max_queue_size: int = Field(
        default=256, ge=1, description="triton: waiting requests beyond which new ones are refused"
    )

    @field_validator("name")
    @classmethod
    def _not_a_file(cls, name: str) -> str:
        if name.endswith((".json", ".npz")):
            raise ValueError("must not end like a file of the bundle (.json, .npz)")
        return name


class Placed(Value):
    """Where the model goes in the bundle, and the text files that the layout adds."""

    model: str
    texts: dict[str, str] = {}


class Layout(Protocol):
    """A way to lay out the models of a bundle. Paths are relative to the bundle, with `/`."""

    def __call__(self, artifact: Artifact, *, backend: str, label: str, serving: Serving) -> Placed:
        """Place one model; `label` tells it apart from the others of the bundle, if there are any.

        Raises UsageError: this layout cannot serve the model on the backend.
        """


def batched(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> bool:
    """Whether the first axis of every input and output is one and the same dynamic dimension.

    An axis that the file leaves unnamed (`NAME_0` for the tensor NAME) counts as the same.
    """
    first = {(spec.name, spec.shape[0] if spec.shape else 0) for spec in (*inputs, *outputs)}
    named = {axis for name, axis in first if axis != f"{name}_0"}
    return len(named) <= 1 and all(isinstance(axis, str) for axis in named)
