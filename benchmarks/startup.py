"""How much CPU time does `deploykit --help` take, beside a bare interpreter and `import click`?

    python benchmarks/startup.py [OUT.json]

Each command runs 15 times in a fresh interpreter, interleaved; user + system CPU seconds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from deploykit.environment import read

RUNS = 15
COMMANDS = {
    "deploykit --help": [sys.executable, "-m", "deploykit", "--help"],
    "python -c 'import click'": [sys.executable, "-c", "import click"],
    "python -c pass": [sys.executable, "-c", "pass"],
}


def cpu_seconds(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )


def main(out: Path | None) -> None:
    samples: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, command in COMMANDS.items():
            samples[name].append(cpu_seconds(command))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    for name, seconds in medians.items():
        print(f"{name:<28} {seconds:.3f} s")
    if out:
        result = {
            "schema": "deploykit.startup/1",
            "median_cpu_seconds": medians,
            "samples_cpu_seconds": samples,
            "environment": read().model_dump(mode="json"),
        }
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
