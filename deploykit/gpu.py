"""The NVIDIA GPUs and driver of this machine, asked through the driver's own libraries."""

from __future__ import annotations

import ctypes
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
