"""The NVIDIA GPU and driver of this machine, asked through the driver's own library."""

from __future__ import annotations

import ctypes
from functools import cache

from deploykit.values import Value

DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, from the CUDA driver API."""


class Gpu(Value):
    """The first device."""

    name: str
    compute_capability: str
    """As in `sm89`."""
    memory_bytes: int
    driver: str
    """Newest CUDA version that the driver serves, as in `13.0`."""


@cache
def probe() -> Gpu | str:
    """The first GPU, or one sentence that says why there is none.

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
    return _first(cuda)


def unavailable() -> str | None:
    """Why nothing runs on a GPU here, or None."""
    found = probe()
    return found if isinstance(found, str) else None


def _first(cuda: ctypes.CDLL) -> Gpu:
    device, version, total = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    numbers = [ctypes.c_int(), ctypes.c_int()]
    for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"sm{numbers[0].value}{numbers[1].value}",
        memory_bytes=total.value,
        driver=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )
