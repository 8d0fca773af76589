"""CUDA through NVIDIA's cuda-python."""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any

import numpy as np

from deploykit._lazy import needs
from deploykit.errors import MissingError, ResourceError
from deploykit.values import Array


class CudaPython:
    """The runtime API on the first device."""

    name = "cuda-python"

    def __init__(self) -> None:
        with needs("cuda.bindings"):
            from cuda.bindings import runtime
        self._runtime: Any = runtime
        self._call("cudaSetDevice", 0)
        self._stream = self._call("cudaStreamCreate")
        self._memory: set[int] = set()

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream)

    def allocate(self, size: int) -> int:
        """Device memory. Raises ResourceError."""
        address = int(self._call("cudaMalloc", max(1, size)))
        self._memory.add(address)
        return address

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._memory.remove(address)
        self._call("cudaFree", address)

    def pinned(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Page-locked host memory, freed with the array."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        address = int(self._call("cudaHostAlloc", max(1, size), 0))
        memory = (ctypes.c_byte * max(1, size)).from_address(address)
        weakref.finalize(memory, self._runtime.cudaFreeHost, address)
        array: Array = np.ctypeslib.as_array(memory)[:size].view(dtype).reshape(shape)
        return array

    def to_device(self, address: int, array: Array) -> None:
        """Begin to copy to the device."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def to_host(self, array: Array, address: int) -> None:
        """Begin to copy to the host."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def record(self) -> object:
        """An event."""
        event = self._call("cudaEventCreate")
        self._call("cudaEventRecord", event, self._stream)
        return event

    def milliseconds(self, start: object, end: object) -> float:
        """Between two events."""
        self._call("cudaEventSynchronize", end)
        return float(self._call("cudaEventElapsedTime", start, end))

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cudaStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free what is left."""
        for address in list(self._memory):
            self.free(address)
        self._call("cudaStreamDestroy", self._stream)

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        if size:
            way = getattr(self._runtime.cudaMemcpyKind, kind)
            self._call("cudaMemcpyAsync", target, source, size, way, self._stream)

    def _call(self, name: str, *arguments: object) -> Any:
        """The result of a call; its first value is an error code."""
        code, *results = getattr(self._runtime, name)(*arguments)
        if code == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
            raise ResourceError(
                f"{name}: the GPU has no {arguments[0]:,} bytes of memory left",
                hint="use a smaller batch, or an engine built with --weight-streaming",
            )
        if code != self._runtime.cudaError_t.cudaSuccess:
            raise MissingError(
                f"CUDA fails in {name}: {code.name}",
                hint="see `deploykit doctor`",
            )
        return results[0] if results else None
