"""How much memory do export, quantize, package and verify take for a model of 2.5 GB?

    python benchmarks/large/peak_memory.py FOLDER [OUT.json]

A model of random weights goes the whole way in FOLDER, which must have 15 GB free. The peak is that
of the resident memory of the command and all its children together, mapped files counted, looked at
every 50 ms; the ratio is to the bytes of the model. Times are of a machine that may be busy.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from deploykit.environment import read

MODEL, STEPS, SAMPLES = Path(__file__).with_name("model.py"), 8, 16
LIMIT = 1.5
"""The ratio that is promised."""


def resident_bytes(pid: int) -> int:
    """Of a process and all below it; 0 for one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)
    return own * 1024 + sum(resident_bytes(int(child)) for child in below)


def measured(words: list[str]) -> tuple[int, float]:
    """Peak bytes and seconds of a command of deploykit."""
    started, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-m", "deploykit", *words])
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0, words
    return peak, time.monotonic() - started


def main(folder: Path, out: Path | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data, model, int8 = (folder / name for name in ("data.npz", "net.onnx", "net.int8.onnx"))
    rng = np.random.default_rng(0)
    np.savez(data, ids=rng.integers(0, 10_000, (SAMPLES, STEPS)))
    bundle = folder / "bundle"
    commands = {
        "export": ["export", f"{MODEL}:make", "--data", str(data), "-o", str(model), "--force"],
        "quantize": ["quantize", str(model), "--calibration-data", str(data),
                     "--calibration-method", "minmax", "--scope", "compute",
                     "-o", str(int8), "--force"],
        "package": ["package", str(model), "--data", str(data), "-o", str(bundle), "--force"],
        "verify": ["verify", str(bundle)],
        "inspect": ["inspect", str(model)],
    }  # fmt: skip
    rows = {}
    for name, words in commands.items():
        peak, seconds = measured(words)
        size = model.stat().st_size + sum(p.stat().st_size for p in folder.glob("net.*.data"))
        rows[name] = {
            "peak_resident_bytes": peak, "model_bytes": size, "ratio": round(peak / size, 3),
            "seconds": round(seconds, 1),
        }  # fmt: skip
        print(f"{name:<10} {peak / 1e9:.2f} GB, {peak / size:.2f} x the model, {seconds:.0f} s")
    if out:
        result = {
            "schema": "deploykit.peak-memory/1", "limit": LIMIT, "commands": rows,
            "environment": read().model_dump(mode="json"),
        }  # fmt: skip
        out.write_text(json.dumps(result, indent=1) + "\n")
    over = [name for name, row in rows.items() if row["ratio"] > LIMIT]
    sys.exit(f"beyond {LIMIT} x the model: {', '.join(over)}" if over else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
