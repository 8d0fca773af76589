"""What every layout is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pydantic import Field, field_validator

from deploykit.values import Artifact, Feed, TensorSpec, Value


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
    queue_timeout_us: int = Field(
        default=1_000_000,
        ge=0,
        description="triton: microseconds after which a waiting request is refused, 0 for never",
    )
    storage_uri: str = Field(
        default="", description="kserve: where the bundle will lie, such as pvc://models/net"
    )
    memory_gib: int | None = Field(
        default=None,
        ge=1,
        description="kserve: memory of the server in GiB; by default 2, and three times the size "
        "of the models for each copy",
    )

    @field_validator("name")
    @classmethod
    def _not_a_file(cls, name: str) -> str:
        if name.endswith((".json", ".npz", ".yaml")):
            raise ValueError("must not end like a file of the bundle (.json, .npz, .yaml)")
        return name


class Member(Value):
    """A model of a bundle."""

    artifact: Artifact
    backend: str
    label: str
    """Tells it apart from the first model of the bundle, which has none."""
    machine: str | None = None
    """The architecture that it needs, `x86_64`; None for any."""
    cpu_features_any: tuple[str, ...] = ()
    """One of these is needed."""
    gpus: tuple[str, ...] = ()
    """Compute capabilities that it was built for."""
    size_bytes: int = 0
    """Of its files."""


class Laid(Value):
    """Where each model goes in the bundle, and the files that the layout adds."""

    models: tuple[str, ...]
    configs: tuple[str | None, ...]
    """The configuration that serves each model."""
    files: dict[str, bytes] = {}


class Layout(Protocol):
    """A way to lay out the models of a bundle. Paths are relative to the bundle, with `/`."""

    def __call__(self, members: Sequence[Member], serving: Serving, feed: Feed) -> Laid:
        """Lay out the models; `feed` holds golden samples, each input's first axis the sample.

        Raises UsageError: this layout cannot serve a model on its backend.
        """


def batched(inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> bool:
    """Whether the first axis of every input and output is one and the same dynamic dimension.

    An axis that the file leaves unnamed (`NAME_0` for the tensor NAME) counts as the same.
    """
    first = {(spec.name, spec.shape[0] if spec.shape else 0) for spec in (*inputs, *outputs)}
    named = {axis for name, axis in first if axis != f"{name}_0"}
    return len(named) <= 1 and all(isinstance(axis, str) for axis in named)
