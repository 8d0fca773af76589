"""CUDA through PyCUDA."""

from __future__ import annotations

from typing import Any

from deploykit._lazy import needs
from deploykit.errors import ResourceError
from deploykit.values import Array


class PyCuda:
    """The first device's primary context, which TensorRT works in too."""

    name = "pycuda"

    def __init__(self) -> None:
        with needs("pycuda"):
            from pycuda import driver
        self._driver: Any = driver
        driver.init()
        self._context = driver.Device(0).retain_primary_context()
        self._context.push()
        self._stream = driver.Stream()
        self._memory: dict[int, Any] = {}

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream.handle)

    def allocate(self, size: int) -> int:
        """Device memory. Raises ResourceError."""
        try:
            memory = self._driver.mem_alloc(max(1, size))
        except self._driver.MemoryError as error:
            raise exhausted(size) from error
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._memory.pop(address).free()

    def pinned(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Page-locked host memory."""
        array: Array = self._driver.pagelocked_empty(shape, dtype)
        return array

    def to_device(self, address: int, array: Array) -> None:
        """Begin to copy to the device."""
        if array.nbytes:
            self._driver.memcpy_htod_async(address, array, self._stream)

    def to_host(self, array: Array, address: int) -> None:
        """Begin to copy to the host."""
        if array.nbytes:
            self._driver.memcpy_dtoh_async(array, address, self._stream)

    def record(self) -> object:
        """An event."""
        event = self._driver.Event()
        event.record(self._stream)
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two events."""
        end.synchronize()
        return float(start.time_till(end))

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def close(self) -> None:
        """Free what is left and leave the context."""
        for address in list(self._memory):
            self.free(address)
        del self._stream
        self._context.pop()
        self._context.detach()


def exhausted(size: int) -> ResourceError:
    """The error for device memory that is not to be had."""
    return ResourceError(
        f"the GPU has no {size:,} bytes of memory left",
        hint="use a smaller batch, or an engine built with --weight-streaming",
    )
