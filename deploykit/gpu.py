"""The NVIDIA GPUs and driver of this machine, asked through the driver's own libraries."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from deploykit.values import Value

DRIVER, MANAGEMENT = "libcuda.so.1", "libnvidia-ml.so.1"
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, from the CUDA driver API."""
_VERSION_BYTES = 80
"""NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE."""


class Gpu(Value):
    """An NVIDIA GPU."""

    name: str
    compute_capability: str
    """As in `sm89`."""
    memory_bytes: int


def probe() -> Gpu | str:
    """The first GPU, or one sentence that says why there is none."""
    found = devices()
    return found if isinstance(found, str) else found[0]


@cache
def devices() -> tuple[Gpu, ...] | str:
    """The GPUs that programs may use, or one sentence that says why there are none.

    Makes no CUDA context, so that a child process may still make its own.
    """
    try:
        cuda = ctypes.CDLL(DRIVER)
    except OSError:
        return f"no NVIDIA driver on this machine ({DRIVER} is not there)"
    if code := cuda.cuInit(0):
        return f"the NVIDIA driver does not start (cuInit gives {code})"
    count = ctypes.c_int()
    if cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the NVIDIA driver finds no GPU"
    return tuple(_device(cuda, index) for index in range(count.value))


@cache
def driver() -> str | None:
    """Version of the NVIDIA driver, as in `570.133.20`; None where it cannot be asked."""
    try:
        nvml = ctypes.CDLL(MANAGEMENT)
    except OSError:
        return None
    if nvml.nvmlInit_v2():
        return None
    version = ctypes.create_string_buffer(_VERSION_BYTES)
    code = nvml.nvmlSystemGetDriverVersion(version, len(version))
    nvml.nvmlShutdown()
    return None if code else version.value.decode(errors="replace")


def used_bytes() -> int | None:
    """Memory in use on all GPUs, by all programs; None where NVML does not tell."""

    class Memory(ctypes.Structure):
        """nvmlMemory_t."""

        _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]

    def ask(nvml: ctypes.CDLL, device: ctypes.c_void_p) -> int | None:
        memory = Memory()
        failed = nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
        return None if failed else int(memory.used)

    return _sum(ask)


def energy_uj() -> int | None:
    """What all GPUs took since the driver was loaded, in microjoules; None where it is not told."""

    def ask(nvml: ctypes.CDLL, device: ctypes.c_void_p) -> int | None:
        millijoules = ctypes.c_ulonglong()
        failed = nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules))
        return None if failed else millijoules.value * 1000

    return _sum(ask)


def _sum(ask: Callable[[ctypes.CDLL, ctypes.c_void_p], int | None]) -> int | None:
    """Over all GPUs; None where there is none, or one does not tell."""
    nvml, count = _nvml(), ctypes.c_uint()
    if nvml is None or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) or not count.value:
        return None
    total = 0
    for index in range(count.value):
        device = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)):
            return None
        told = ask(nvml, device)
        if told is None:
            return None
        total += told
    return total


@cache
def _nvml() -> ctypes.CDLL | None:
    """NVML, ready until this process ends; None where there is none."""
    try:
        nvml = ctypes.CDLL(MANAGEMENT)
    except OSError:
        return None
    return None if nvml.nvmlInit_v2() else nvml


def unavailable() -> str | None:
    """Why nothing runs on a GPU here, or None."""
    found = devices()
    return found if isinstance(found, str) else None


def _device(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, total = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    numbers = [ctypes.c_int(), ctypes.c_int()]
    for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"sm{numbers[0].value}{numbers[1].value}",
        memory_bytes=total.value,
    )
