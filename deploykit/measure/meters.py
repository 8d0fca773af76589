"""Energy counters of this machine: of its CPU packages (RAPL), and of its GPUs (NVML).

They have been read from fakes only so far: no machine with real counters was at hand.
"""

from __future__ import annotations

from pathlib import Path

from deploykit import gpu

POWERCAP = Path("/sys/class/powercap")
CPU, GPU = "CPU packages", "GPUs"


class Meters:
    """What the machine takes between `start` and `stop`, other programs' share included."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        """Packages are the zones `intel-rapl:N` of that name; zones within them are not added."""
        zones = [z for z in sorted(powercap.glob("intel-rapl:*")) if z.name.count(":") == 1]
        self._packages = [z for z in zones if _text(z / "name").startswith("package")]
        self._before: tuple[list[int | None], int | None] = ([], None)

    def start(self) -> None:
        """Read the counters."""
        self._before = self._read()

    def stop(self) -> dict[str, int]:
        """Microjoules since `start`, of each of CPU and GPU that the machine tells."""
        (before, gpu_before), (after, gpu_after) = self._before, self._read()
        spent = [
            _spent(zone, *pair)
            for zone, pair in zip(self._packages, zip(before, after, strict=True), strict=True)
        ]
        known = [each for each in spent if each is not None]
        found = {CPU: sum(known)} if known and len(known) == len(spent) else {}
        if gpu_before is not None and gpu_after is not None and gpu_after >= gpu_before:
            found[GPU] = gpu_after - gpu_before
        return found

    def _read(self) -> tuple[list[int | None], int | None]:
        return [_number(zone / "energy_uj") for zone in self._packages], gpu.energy_uj()


def _spent(zone: Path, before: int | None, after: int | None) -> int | None:
    """The difference; a counter that went over its range starts at 0 again."""
    if before is None or after is None:
        return None
    if after >= before:
        return after - before
    whole = _number(zone / "max_energy_range_uj")
    return None if whole is None else after - before + whole


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    """What is in a file; nothing where it may not be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
