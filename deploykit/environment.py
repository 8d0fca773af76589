"""This machine: what a measurement or an engine depends on."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from importlib import metadata
from pathlib import Path

from deploykit import gpu
from deploykit.gpu import Gpu
from deploykit.values import Json, Value

LIBRARIES = (
    "deploykit", "torch", "torch-pruning", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "openvino", "tensorrt", "tensorrt-rtx-cu13", "pycuda", "numpy",
)  # fmt: skip

CPU_FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16",
)  # fmt: skip

INT8_DOT_PRODUCT = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Any one of them sums 8-bit products in 32 bits."""


MOMENTARY = {"load_average", "frequency_mhz", "memory_available_bytes"}
CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")


class Environment(Value):
    """The machine and the versions of what may matter to a result."""

    system: str
    machine: str
    cpu: str
    cpu_features: tuple[str, ...]
    cores: int
    memory_bytes: int
    cpu_quota: float | None
    """Cores that the control group allows, None for no limit."""
    python: str
    libraries: dict[str, str]
    load_average: float
    virtual_machine: bool
    governor: str | None = None
    """Of the first core's frequency; None where the machine does not tell."""
    frequency_mhz: float | None = None
    """Of the first core, now."""
    memory_available_bytes: int | None = None
    memory_limit_bytes: int | None = None
    """Of the control group, None for no limit."""
    container: str | None = None
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    """Version of the NVIDIA driver, None where there is no GPU."""

    def lasting(self) -> Json:
        """What of it stays as it is from one minute to the next: part of keys of kept work."""
        return self.model_dump(mode="json", exclude=MOMENTARY)

    def hardware(self) -> Json:
        """What makes two machines the same experiment: libraries and kernel may differ."""
        return {
            "cpu": self.cpu,
            "cpu features": list(self.cpu_features),
            "cores": self.cores,
            "cpu quota": self.cpu_quota,
            "memory in GiB": round(self.memory_bytes / 2**30),
            "gpus": [gpu.name for gpu in self.gpus],
        }


def read() -> Environment:
    """Describe this machine now."""
    gpus = gpu.devices()
    return Environment(
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        cpu=_cpu_name(),
        cpu_features=cpu_features(),
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        cpu_quota=_cpu_quota(),
        python=platform.python_version(),
        libraries=versions(LIBRARIES),
        load_average=os.getloadavg()[0],
        virtual_machine="hypervisor" in _cpuinfo(),
        governor=_first_line(CPUFREQ / "scaling_governor"),
        frequency_mhz=_megahertz(),
        memory_available_bytes=_memory_available_bytes(),
        memory_limit_bytes=_memory_limit_bytes(),
        container=_container(),
        gpus=() if isinstance(gpus, str) else gpus,
        driver=gpu.driver(),
    )


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions from package metadata; nothing is imported, absent ones are left out."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_features() -> tuple[str, ...]:
    """Those of CPU_FEATURES that this machine has, by their Linux names."""
    flags = set(_cpuinfo().split())
    return tuple(f for f in CPU_FEATURES if f in flags)


def has_int8_dot_product() -> bool:
    """Whether 8-bit products are summed in 32 bits: VNNI, AMX, any Arm.

    Without it ONNX Runtime's x86 kernels add pairs of u8*s8 products in 16 bits and saturate; its
    Arm kernels widen products before they add, with a dot product or without.
    """
    return is_arm() or bool(set(cpu_features()) & set(INT8_DOT_PRODUCT))


def is_arm() -> bool:
    """Whether this is a 64-bit Arm CPU."""
    return platform.machine().lower() in ("aarch64", "arm64")


@cache
def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text().split("\n\n")[0] if path.exists() else ""


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text().split("\n")[0].strip()
    except OSError:
        return None


def _megahertz() -> float | None:
    kilohertz = _first_line(CPUFREQ / "scaling_cur_freq")
    if kilohertz and kilohertz.isdigit():
        return int(kilohertz) / 1e3
    match = re.search(r"cpu MHz\s*:\s*([\d.]+)", _cpuinfo())
    return float(match.group(1)) if match else None


def _memory_available_bytes() -> int | None:
    path = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s*(\d+) kB", path.read_text() if path.exists() else "")
    return int(match.group(1)) << 10 if match else None


def _memory_limit_bytes() -> int | None:
    told = _first_line(Path("/sys/fs/cgroup/memory.max"))
    return int(told) if told and told.isdigit() else None


def _container() -> str | None:
    """What kind of container this is, by the marks that each leaves."""
    if kind := os.environ.get("container"):  # noqa: SIM112 - systemd writes it so
        return kind
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    marks = {"docker": "/.dockerenv", "podman": "/run/.containerenv"}
    return next((name for name, path in marks.items() if Path(path).exists()), None)


def _cpu_name() -> str:
    match = re.search(r"model name\s*:\s*(.+)", _cpuinfo())
    return match.group(1) if match else platform.processor() or platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_quota() -> float | None:
    path = Path("/sys/fs/cgroup/cpu.max")
    if not path.exists():
        return None
    quota, period = path.read_text().split()
    return None if quota == "max" else int(quota) / int(period)
