"""Energy counters: the folder and the library are fakes."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploykit import gpu
from deploykit.measure.lane import told_by_all
from deploykit.measure.meters import CPU, GPU, Meters


@pytest.fixture
def powercap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages, a zone within one of them, and the platform; GPUs tell nothing."""
    for zone, name, energy in (
        ("intel-rapl:0", "package-0", 1000), ("intel-rapl:0:0", "core", 7),
        ("intel-rapl:1", "package-1", 900), ("intel-rapl:2", "psys", 5),
    ):  # fmt: skip
        folder = tmp_path / zone
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text("1000\n")
        (folder / "energy_uj").write_text(f"{energy}\n")
    monkeypatch.setattr(gpu, "energy_uj", lambda: None)
    return tmp_path


def spend(powercap: Path, meters: Meters) -> dict[str, int]:
    """What is told of 500 uJ by the first package, 300 uJ by the second, 90 by the others."""
    meters.start()
    for zone, energy in (("0", 1500), ("1", 200), ("0:0", 97), ("2", 95)):  # `1` began anew
        (powercap / f"intel-rapl:{zone}" / "energy_uj").write_text(f"{energy}\n")
    return meters.stop()


def test_packages_are_added_and_a_counter_that_begins_anew_goes_on(powercap: Path) -> None:
    assert spend(powercap, Meters(powercap)) == {CPU: 800}


def test_a_package_that_may_not_be_read_leaves_the_cpu_untold(powercap: Path) -> None:
    (powercap / "intel-rapl:1" / "max_energy_range_uj").unlink()
    assert spend(powercap, Meters(powercap)) == {}


def test_gpus_are_told_apart(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter((5000, 12_000))
    monkeypatch.setattr(gpu, "energy_uj", lambda: next(readings))
    assert spend(powercap, Meters(powercap)) == {CPU: 800, GPU: 7000}


def test_a_machine_without_counters_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "energy_uj", lambda: None)
    meters = Meters(tmp_path / "none")
    meters.start()
    assert meters.stop() == {}


def test_a_meter_counts_where_it_told_every_block() -> None:
    assert told_by_all([{CPU: 1, GPU: 2}, {CPU: 3}]) == {CPU: (1, 3)}
    assert told_by_all([]) == {}
