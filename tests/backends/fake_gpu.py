"""A GPU that is none: its memory is this process's, its TensorRT knows two engines.

It shows that data, shapes and errors go the right way through our own code. It shows nothing about
TensorRT, PyCUDA or cuda-python, and no time taken on it means anything.
"""

from __future__ import annotations

import ctypes
import enum
import json
from types import SimpleNamespace
from typing import Any

import numpy as np

DOUBLE, NONZERO, BROKEN = b"fake plan: y = 2 x", b"fake plan: y = x[x > 0]", b"fake plan: none"
PROFILES = (((1, 3), (1, 3), (4, 3)), ((1, 3), (16, 3), (64, 3)))
STREAM = 77


class Memory:
    """Blocks by address."""

    def __init__(self, limit: int = 1 << 20) -> None:
        self.blocks: dict[int, Any] = {}
        self.limit = limit

    def allocate(self, size: int) -> int:
        if size > self.limit:
            raise MemoryError
        block = ctypes.create_string_buffer(size)
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, address: int) -> None:
        del self.blocks[address]


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class Context:
    """Runs y = 2 x, or y = x[x > 0] whose size depends on the data."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.profile, self.profiler = engine, 0, None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return stream == STREAM

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = PROFILES[self.profile]
        self.shapes[name] = tuple(shape)
        return all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "y"
        return (-1,) if self.engine.plan == NONZERO else self.shapes["x"]

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self.allocators[name] = allocator
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        x = _at(self.addresses["x"], self.shapes["x"])
        y = 2 * x if self.engine.plan == DOUBLE else x[x > 0]
        if "y" in self.allocators:
            allocator = self.allocators["y"]
            address = allocator.reallocate_output_async("y", 0, y.nbytes, 256, stream)
            allocator.notify_shape("y", y.shape)
        else:
            address = self.addresses["y"]
        _at(address, y.shape)[...] = y
        if self.profiler:
            self.profiler.report_layer_time("double", 0.25)
        return True


def _at(address: int, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    block = (ctypes.c_float * max(1, size)).from_address(address)
    return np.ctypeslib.as_array(block)[:size].reshape(shape)


class Engine:
    num_io_tensors = 2
    num_optimization_profiles = len(PROFILES)

    def __init__(self, plan: bytes) -> None:
        self.plan = plan
        self.contexts: list[Context] = []

    def create_execution_context(self) -> Context:
        self.contexts.append(Context(self))
        return self.contexts[-1]

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> str:
        return {"x": "input", "y": "output"}[name]

    def get_tensor_dtype(self, name: str) -> str:
        return f"dtype of {name}"

    def get_tensor_location(self, name: str) -> str:
        return f"device, {name}"

    def get_tensor_profile_shape(self, name: str, index: int) -> tuple[tuple[int, ...], ...]:
        assert name == "x"
        return PROFILES[index]

    def create_engine_inspector(self) -> Any:
        layer = {
            "Name": "double", "LayerType": "gemm",
            "Inputs": [{"Name": "x", "Format/Datatype": "Int8 NC/32HW32"}],
        }  # fmt: skip
        text = json.dumps({"Layers": [layer]})
        return SimpleNamespace(get_engine_information=lambda how: text)


class Runtime:
    def __init__(self, log: Any) -> None:
        self.log = log

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        if plan == BROKEN:
            self.log.log(Severity.ERROR, "Magic tag does not match\nin detail")
            return None
        return Engine(plan)


def tensorrt() -> Any:
    """What the adapter uses of the module."""
    base = type("Base", (), {"__init__": lambda self: None})
    return SimpleNamespace(
        __version__="0.fake", ILogger=ILogger, Runtime=Runtime, IProfiler=base,
        IOutputAllocator=base, nptype=lambda dtype: np.float32,
        TensorLocation=SimpleNamespace(HOST="host"), TensorIOMode=SimpleNamespace(OUTPUT="output"),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
    )  # fmt: skip


def pycuda_driver(memory: Memory) -> Any:
    """`pycuda.driver`, over `memory`."""

    class Block(int):
        def free(self) -> None:
            memory.free(int(self))

    class Event:
        def record(self, stream: Any) -> None:
            assert stream.handle == STREAM

        def synchronize(self) -> None:
            pass

        def time_till(self, other: Any) -> float:
            del other
            return 0.5

    context = SimpleNamespace(push=lambda: None, pop=lambda: None, detach=lambda: None)

    def to_device(address: int, array: np.ndarray, stream: Any) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def to_host(array: np.ndarray, address: int, stream: Any) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    return SimpleNamespace(
        init=lambda: None, Event=Event, MemoryError=MemoryError,
        Device=lambda i: SimpleNamespace(retain_primary_context=lambda: context),
        Stream=lambda: SimpleNamespace(handle=STREAM, synchronize=lambda: None),
        mem_alloc=lambda size: Block(memory.allocate(size)),
        pagelocked_empty=np.empty,
        memcpy_htod_async=to_device, memcpy_dtoh_async=to_host,
    )  # fmt: skip


def cuda_runtime(memory: Memory) -> Any:
    """`cuda.bindings.runtime`, over `memory`."""
    code = enum.Enum("cudaError_t", {"cudaSuccess": 0, "cudaErrorMemoryAllocation": 2})

    def allocate(size: int, *flags: int) -> tuple[Any, int | None]:
        try:
            return code.cudaSuccess, memory.allocate(size)
        except MemoryError:
            return code.cudaErrorMemoryAllocation, None

    def free(address: int) -> tuple[Any]:
        memory.free(address)
        return (code.cudaSuccess,)

    def copy(target: int, source: int, size: int, *way: Any) -> tuple[Any]:
        ctypes.memmove(target, source, size)
        return (code.cudaSuccess,)

    def done(*arguments: Any) -> tuple[Any]:
        return (code.cudaSuccess,)

    kinds = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    return SimpleNamespace(
        cudaError_t=code, cudaMemcpyKind=kinds, cudaMalloc=allocate, cudaHostAlloc=allocate,
        cudaFree=free, cudaFreeHost=free, cudaMemcpyAsync=copy, cudaSetDevice=done,
        cudaStreamCreate=lambda: (code.cudaSuccess, STREAM), cudaStreamSynchronize=done,
        cudaStreamDestroy=done, cudaEventCreate=lambda: (code.cudaSuccess, object()),
        cudaEventRecord=done, cudaEventSynchronize=done,
        cudaEventElapsedTime=lambda a, b: (code.cudaSuccess, 0.5),
    )  # fmt: skip
