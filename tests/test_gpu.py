"""The driver's libraries are fakes here: the right questions, and every way to have no GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from deploykit import environment, gpu
from deploykit.gpu import Gpu

BOARDS = (("fake Hopper", 9, 0, 80 << 30), ("fake Blackwell", 12, 0, 96 << 30))


def fake_cuda(*, init: int = 0, count: int = len(BOARDS)) -> Any:
    def get_device(device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def set_(value: Callable[[int], int]) -> Callable[[Any, Any], int]:
        def call(target: Any, device: Any) -> int:
            target._obj.value = value(device.value)
            return 0

        return call

    def get_count(target: Any) -> int:
        target._obj.value = count
        return 0

    def get_name(target: Any, size: int, device: Any) -> int:
        target.value = BOARDS[device.value][0].encode()
        return 0

    def get_attribute(target: Any, attribute: int, device: Any) -> int:
        target._obj.value = BOARDS[device.value][{75: 1, 76: 2}[attribute]]
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: init, cuDeviceGetCount=get_count, cuDeviceGet=get_device,
        cuDeviceGetName=get_name, cuDeviceTotalMem_v2=set_(lambda i: BOARDS[i][3]),
        cuDeviceGetAttribute=get_attribute,
    )  # fmt: skip


def fake_nvml(*, init: int = 0, code: int = 0) -> Any:
    def version(target: Any, size: int) -> int:
        target.value = b"570.133.20"
        return code

    return SimpleNamespace(
        nvmlInit_v2=lambda: init, nvmlSystemGetDriverVersion=version, nvmlShutdown=lambda: 0
    )


def fake_meters(*, boards: int = 2, code: int = 0) -> Any:
    """NVML of boards with 3 and 5 GB in use, that took 7 and 11 mJ."""

    def get_count(target: Any) -> int:
        target._obj.value = boards
        return 0

    def get_handle(index: int, target: Any) -> int:
        target._obj.value = index + 1
        return 0

    def get_memory(handle: Any, target: Any) -> int:
        target._obj.used = (3, 5)[handle.value - 1] * 10**9
        return 0

    def get_energy(handle: Any, target: Any) -> int:
        target._obj.value = (7, 11)[handle.value - 1]
        return code

    return SimpleNamespace(
        nvmlInit_v2=lambda: 0, nvmlDeviceGetCount_v2=get_count,
        nvmlDeviceGetHandleByIndex_v2=get_handle, nvmlDeviceGetMemoryInfo=get_memory,
        nvmlDeviceGetTotalEnergyConsumption=get_energy,
    )  # fmt: skip


def test_memory_and_energy_are_those_of_all_gpus(libraries: dict[str, Any]) -> None:
    libraries[gpu.MANAGEMENT] = fake_meters()
    assert gpu.used_bytes() == 8 * 10**9
    assert gpu.energy_uj() == 18_000


@pytest.mark.parametrize("nvml", [None, fake_nvml(init=9), fake_meters(boards=0)])
def test_no_gpu_tells_no_memory_and_no_energy(libraries: dict[str, Any], nvml: Any) -> None:
    if nvml:
        libraries[gpu.MANAGEMENT] = nvml
    assert (gpu.used_bytes(), gpu.energy_uj()) == (None, None)


def test_a_gpu_without_an_energy_counter_tells_memory_alone(libraries: dict[str, Any]) -> None:
    libraries[gpu.MANAGEMENT] = fake_meters(code=3)
    assert (gpu.used_bytes(), gpu.energy_uj()) == (8 * 10**9, None)


def forget() -> None:
    for asked in (gpu.devices, gpu.driver, gpu._nvml):
        asked.cache_clear()


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What can be loaded, by name; asked anew."""
    known: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in known:
            raise OSError(name)
        return known[name]

    monkeypatch.setattr(ctypes, "CDLL", load)
    forget()
    yield known
    forget()


def test_every_gpu_and_the_driver_are_read(libraries: dict[str, Any]) -> None:
    libraries |= {gpu.DRIVER: fake_cuda(), gpu.MANAGEMENT: fake_nvml()}
    one = Gpu(name="fake Hopper", compute_capability="sm90", memory_bytes=80 << 30)
    other = Gpu(name="fake Blackwell", compute_capability="sm120", memory_bytes=96 << 30)
    assert gpu.devices() == (one, other)
    assert gpu.probe() == one
    assert gpu.unavailable() is None
    found = environment.read()
    assert (found.gpus, found.driver) == ((one, other), "570.133.20")


@pytest.mark.parametrize(
    ("cuda", "told"),
    [
        ({}, "libcuda.so.1 is not there"),
        ({gpu.DRIVER: fake_cuda(init=100)}, "cuInit gives 100"),
        ({gpu.DRIVER: fake_cuda(count=0)}, "finds no GPU"),
    ],
)
def test_why_there_is_no_gpu(libraries: dict[str, Any], cuda: dict[str, Any], told: str) -> None:
    libraries |= cuda
    assert told in str(gpu.probe())
    assert gpu.unavailable() == gpu.probe()
    assert (environment.read().gpus, environment.read().driver) == ((), None)


@pytest.mark.parametrize("nvml", [fake_nvml(init=9), fake_nvml(code=3)])
def test_a_driver_that_does_not_tell_its_version_has_none(
    libraries: dict[str, Any], nvml: Any
) -> None:
    libraries[gpu.MANAGEMENT] = nvml
    assert gpu.driver() is None
