from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from deploykit import environment
from deploykit.environment import Environment
from deploykit.values import parse

CPUINFO = """processor\t: 0
model name\t: Fast CPU @ 3.00GHz
flags\t\t: fpu sse avx2 {flags}

processor\t: 1
model name\t: Slow CPU
flags\t\t: amx_int8"""


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for /proc/cpuinfo, read anew."""
    path = tmp_path / "cpuinfo"
    path.write_text(CPUINFO.format(flags=""))
    real = Path

    def redirected(name: str) -> Path:
        return path if name == "/proc/cpuinfo" else real(name)

    monkeypatch.setattr(environment, "Path", redirected)
    monkeypatch.setattr(environment, "_cpuinfo", environment._cpuinfo.__wrapped__)
    return path


def test_this_machine_is_described() -> None:
    found = environment.read()
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.python == platform.python_version() == sys.version.split()[0]
    assert found.libraries["numpy"] == np.__version__
    assert found.libraries["deploykit"] == metadata.version("deploykit")
    assert found.machine == platform.machine()
    assert found.memory_bytes > 2**28
    assert found.load_average >= 0
    assert found.cpu
    assert found.cpu_quota is None or found.cpu_quota > 0
    assert set(found.cpu_features) <= set(environment.CPU_FEATURES)
    assert parse(Environment, found.model_dump(mode="json"), "here") == found


def test_memory_is_that_of_the_machine() -> None:
    words = Path("/proc/meminfo").read_text().split()
    assert abs(environment.read().memory_bytes - int(words[1]) * 1024) < 2**20


def test_absent_libraries_are_left_out_and_none_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)  # importing it would raise
    assert list(environment.versions(("onnx", "no-such-library"))) == ["onnx"]
    assert environment.versions(()) == {}


def test_the_first_processor_speaks_for_all(cpuinfo: Path) -> None:
    found = environment.read()
    assert found.cpu == "Fast CPU @ 3.00GHz"
    assert found.cpu_features == ("avx2",)
    assert not found.virtual_machine


def test_a_hypervisor_is_noticed(cpuinfo: Path) -> None:
    cpuinfo.write_text(CPUINFO.format(flags="hypervisor"))
    assert environment.read().virtual_machine


@pytest.mark.parametrize(
    ("flags", "wide"),
    [("avx512f avx512_bf16 amx_bf16", False), ("bf16 asimd", False), ("avx512_vnni", True),
     ("avx_vnni", True), ("amx_int8", True), ("asimddp", True), ("i8mm", True),
     ("avx512_vnni_x", False)],
)  # fmt: skip
def test_an_8_bit_dot_product_is_any_of_vnni_amx_and_arms(
    cpuinfo: Path, flags: str, wide: bool
) -> None:
    cpuinfo.write_text(CPUINFO.format(flags=flags))
    assert environment.has_int8_dot_product() is wide


def test_features_come_in_one_order(cpuinfo: Path) -> None:
    cpuinfo.write_text(CPUINFO.format(flags="amx_int8 avx512_vnni avx512f"))
    assert environment.cpu_features() == ("avx2", "avx512f", "avx512_vnni", "amx_int8")


def test_a_machine_without_cpuinfo_has_a_name_and_no_features(cpuinfo: Path) -> None:
    cpuinfo.unlink()
    found = environment.read()
    assert found.cpu == (platform.processor() or platform.machine())
    assert found.cpu_features == ()


@pytest.mark.parametrize(
    ("text", "quota"), [("max 100000\n", None), ("150000 100000\n", 1.5), (None, None)]
)
def test_the_quota_is_in_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, quota: float | None
) -> None:
    path = tmp_path / "cpu.max"
    if text:
        path.write_text(text)
    monkeypatch.setattr(environment, "Path", lambda name: path)
    assert environment._cpu_quota() == quota


@pytest.mark.parametrize(
    ("machine", "wide"), [("aarch64", True), ("arm64", True), ("x86_64", False)]
)
def test_arm_kernels_widen_products_before_they_add(
    cpuinfo: Path, monkeypatch: pytest.MonkeyPatch, machine: str, wide: bool
) -> None:
    cpuinfo.unlink()
    monkeypatch.setattr(environment.platform, "machine", lambda: machine)
    assert environment.has_int8_dot_product() is environment.is_arm() is wide


def test_what_lasts_is_the_same_a_moment_later() -> None:
    one, other = environment.read(), environment.read()
    assert one.lasting() == other.lasting()
    assert not {"load_average", "frequency_mhz", "memory_available_bytes"} & set(one.lasting())
