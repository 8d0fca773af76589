"""What a session needs of CUDA, behind one small interface: PyCUDA, or cuda-python without it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

from deploykit import gpu
from deploykit._lazy import installed
from deploykit.errors import MissingError
from deploykit.values import Array


class Cuda(Protocol):
    """One device with one stream; addresses are device addresses, in bytes.

    Raises ResourceError where device memory is exhausted.
    """

    @property
    def name(self) -> str:
        """The library."""

    @property
    def stream(self) -> int:
        """Handle of the stream in which everything is ordered."""

    def allocate(self, size: int) -> int:
        """Device memory, at least one byte; returns its address."""

    def free(self, address: int) -> None:
        """Give device memory back."""

    def pinned(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Host memory that is copied without a detour; freed with the array."""

    def to_device(self, address: int, array: Array) -> None:
        """Begin to copy a pinned, contiguous array to the device."""

    def to_host(self, array: Array, address: int) -> None:
        """Begin to copy from the device into a pinned, contiguous array."""

    def record(self) -> object:
        """An event at this point of the stream."""

    def milliseconds(self, start: object, end: object) -> float:
        """Time between two events, once the second has happened."""

    def synchronize(self) -> None:
        """Wait for the stream."""

    def close(self) -> None:
        """Leave the device."""


def unavailable() -> str | None:
    """Why no session on a GPU can be opened, or None; nothing is imported."""
    if reason := gpu.unavailable():
        return reason
    if installed("pycuda") or installed("cuda.bindings"):
        return None
    return "neither pycuda nor cuda-python is installed: pip install pycuda, or cuda-python"


def connect() -> Cuda:
    """PyCUDA if it is installed, else cuda-python. Raises MissingError: neither, or no GPU."""
    if reason := unavailable():
        raise MissingError(f"nothing runs on a GPU here: {reason}", hint="see `deploykit doctor`")
    if installed("pycuda"):
        from deploykit.backends._cuda_pycuda import PyCuda

        return PyCuda()
    from deploykit.backends._cuda_python import CudaPython

    return CudaPython()


_THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL."""


class Graph:
    """Work of a stream, captured once and launched as a whole.

    Through the driver's own library, since PyCUDA has no graphs; the stream is either library's.
    """

    def __init__(self, stream: int, work: Callable[[], object]) -> None:
        """Capture what `work` puts in the stream. Raises RuntimeError: it cannot be captured."""
        self._driver, self._stream = ctypes.CDLL(gpu.DRIVER), ctypes.c_void_p(stream)
        graph, self._run = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)
        try:
            work()
        finally:
            self._check("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        flags = ctypes.c_ulonglong(0)
        self._check("cuGraphInstantiateWithFlags", ctypes.byref(self._run), graph, flags)
        self._check("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Put all of it in the stream."""
        self._check("cuGraphLaunch", self._run, self._stream)

    def close(self) -> None:
        """Give it back."""
        self._check("cuGraphExecDestroy", self._run)

    def _check(self, name: str, *arguments: object) -> None:
        if code := getattr(self._driver, name)(*arguments):
            raise RuntimeError(f"{name} gives {code}")
