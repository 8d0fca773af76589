"""The joint between what is asked and who runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from deploykit.values import (
    Array,
    Artifact,
    Feed,
    Format,
    Kernel,
    Placement,
    SessionOptions,
    TensorSpec,
)


class Closing(ABC):
    """What is closed at the end of a `with` block, whatever happens in it."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Session(Protocol):
    """A model that is loaded and ready to run."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` takes."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` gives."""

    def run(self, feed: Feed) -> dict[str, Array]:
        """Run one batch, host to host; the feed is left as it is."""

    def prepare(self, feed: Feed) -> Callable[[], object]:
        """Put the data in place once and return the callable to time."""

    def placement(self, feed: Feed) -> Placement:
        """Say what really ran, from the runtime's own account of running this feed."""

    def kernels(self, feed: Feed, runs: int) -> tuple[Kernel, ...]:
        """How long each kernel takes, from the runtime's own profile of so many runs.

        Profiling slows them a little. Nothing where the runtime keeps no profile.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Backend(Protocol):
    """A runtime that opens models."""

    @property
    def name(self) -> str:
        """As it is written on the command line."""

    @property
    def formats(self) -> frozenset[Format]:
        """The formats that it opens."""

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None. One sentence for doctor, skips and errors."""

    def open(self, artifact: Artifact, options: SessionOptions) -> Session:
        """Load a model.

        Raises UsageError: not a format of this backend. InputError: the runtime refuses the model.
        """
