"""Device and pinned memory of one execution context, for one set of input shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deploykit.backends._cuda import Cuda
from deploykit.errors import InputError, ResourceError
from deploykit.values import Array, Feed


class Buffers:
    """A context with the memory that its tensors lie in; it is used in one stream."""

    def __init__(self, trt: Any, cuda: Cuda, engine: Any, context: Any, feed: Feed) -> None:
        """Raises InputError: the engine does not take these shapes."""
        self.context, self.outputs = context, dict[str, Array]()
        self._cuda, self._addresses = cuda, dict[str, int]()
        self._allocators: dict[str, Any] = {}
        types = {name: trt.nptype(engine.get_tensor_dtype(name)) for name in _names(engine)}
        self._types = {name: np.dtype(kind) for name, kind in types.items()}
        host = trt.TensorLocation.HOST
        self._on_host = {name for name in feed if engine.get_tensor_location(name) == host}
        for name, array in feed.items():
            if not context.set_input_shape(name, array.shape):
                raise _refused(name, array)
            if name not in self._on_host:
                self._place(name, array.nbytes)
        self._host_values = self.stage({name: feed[name] for name in self._on_host})
        for name, values in self._host_values.items():
            context.set_tensor_address(name, values.ctypes.data)
        if missing := context.infer_shapes():
            raise _refused(missing[0], feed.get(missing[0]))
        for name in _names(engine):
            if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
                self._place_output(trt, name)

    @property
    def data_dependent(self) -> list[str]:
        """Outputs whose size is known after a run only."""
        return list(self._allocators)

    def stage(self, feed: Feed) -> dict[str, Array]:
        """The feed in pinned memory of its own."""
        staged = {}
        for name, array in feed.items():
            pinned = self._cuda.pinned(array.shape, array.dtype.name)
            pinned[...] = array
            staged[name] = pinned
        return staged

    def run(self, staged: Feed) -> Mapping[str, Array]:
        """Copy in, run, copy out, wait. The outputs are overwritten by the next run."""
        self.enqueue(staged)
        self._cuda.synchronize()
        if not self._allocators:
            return self.outputs
        for name, allocator in self._allocators.items():
            self.outputs[name] = self._cuda.pinned(allocator.shape, self._types[name].name)
            self._cuda.to_host(self.outputs[name], allocator.address)
        self._cuda.synchronize()
        return self.outputs

    def enqueue(self, staged: Feed) -> None:
        """Put copies and kernels in the stream. Raises ResourceError: TensorRT cannot start."""
        for name, array in staged.items():
            if name in self._on_host:
                self._host_values[name][...] = array
            else:
                self._cuda.to_device(self._addresses[name], array)
        if not self.context.execute_async_v3(self._cuda.stream):
            raise ResourceError(
                "TensorRT does not start the run", hint="see its log; the GPU's memory may be full"
            )
        for name, output in self.outputs.items():
            if name not in self._allocators:
                self._cuda.to_host(output, self._addresses[name])

    def close(self) -> None:
        """Give the memory back."""
        del self.context
        for address in self._addresses.values():
            self._cuda.free(address)
        for allocator in self._allocators.values():
            allocator.release()
        self._addresses.clear()

    def _place(self, name: str, size: int) -> None:
        self._addresses[name] = self._cuda.allocate(size)
        self.context.set_tensor_address(name, self._addresses[name])

    def _place_output(self, trt: Any, name: str) -> None:
        shape = tuple(self.context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            self._allocators[name] = allocator(trt, self._cuda)
            self.context.set_output_allocator(name, self._allocators[name])
            return
        self.outputs[name] = self._cuda.pinned(shape, self._types[name].name)
        self._place(name, self.outputs[name].nbytes)


def allocator(trt: Any, cuda: Cuda) -> Any:
    """Gives an output whose size depends on the data the memory that it turns out to need."""

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.address, self.size, self.shape = 0, 0, ()

        def reallocate_output(
            self, tensor_name: str, memory: int, size: int, alignment: int
        ) -> int:
            del tensor_name, memory, alignment  # CUDA aligns to 256 bytes at least
            if size > self.size or not self.address:
                self.release()
                self.address, self.size = cuda.allocate(size), size
            return int(self.address)

        def reallocate_output_async(
            self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
        ) -> int:
            del stream
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            del tensor_name
            self.shape = tuple(shape)

        def release(self) -> None:
            if self.address:
                cuda.free(self.address)
            self.address = self.size = 0

    return Allocator()


def _names(engine: Any) -> list[str]:
    return [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]


def _refused(name: str, array: Array | None) -> InputError:
    shape = "x".join(map(str, array.shape)) if array is not None else "of unknown shape"
    return InputError(
        f"input {name!r}: the engine does not take {shape}",
        hint="give shapes within the profile that the engine was built for",
    )
