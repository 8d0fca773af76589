"""What does calibration cost beside plain inference, and beside other tools?

    pip install nncf==3.4.0     # optional: without it its rows are left out
    python benchmarks/quantization/calibration.py [OUT.json]

A ResNet-50 (25.6 M parameters, random weights) at 224 x 224 on random images: the cost does not
depend on what is in them. Each tool quantizes the same ONNX file in a process of its own, twice, on
fewer and on more images; the difference gives seconds and memory for each further image, the rest
is the fixed cost. Plain inference is ONNX Runtime's on the same images, on as many threads as the
calibrators use (all cores), measured before and after.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from deploykit.environment import read

HERE = Path(__file__).resolve().parent
IMAGES = (32, 160)
MANY = 512
"""Images of the run that shows the peak of memory."""
SLOW = (8, 24)
"""Images for the calibrators that keep every activation in memory."""
OURS = ("minmax", "moving_average", "percentile", "entropy", "mse")
THEIRS = {"MinMax": IMAGES, "Entropy": SLOW, "Percentile": SLOW}


def images(count: int) -> np.ndarray:
    """[count, 3, 224, 224] float32."""
    return np.random.default_rng(0).standard_normal((count, 3, 224, 224), dtype=np.float32)


def peak_mb() -> float:
    """Peak resident set size of this process."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def run_deploykit(model: str, data: str, method: str, count: int, out: str) -> float:
    import deploykit

    options = deploykit.QuantizeOptions(
        scope="residual", calibration_method=method, calibration_samples=count
    )
    started = time.perf_counter()
    deploykit.quantize(
        deploykit.open_model(model), options, data=deploykit.open_dataset(data), out=Path(out)
    )
    return time.perf_counter() - started


def run_onnxruntime(model: str, data: str, method: str, count: int, out: str) -> float:
    import onnxruntime.quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with np.load(data) as arrays:
        rows = arrays["images"][:count]

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(rows)

        def get_next(self) -> dict[str, np.ndarray] | None:
            row = next(self.rest, None)
            return None if row is None else {"images": row[None]}

    started = time.perf_counter()
    quant_pre_process(model, f"{out}.prepared")
    q.quantize_static(
        f"{out}.prepared", out, Reader(), per_channel=True, activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8, calibrate_method=q.CalibrationMethod[method],
    )  # fmt: skip
    return time.perf_counter() - started


def run_nncf(model: str, data: str, method: str, count: int, out: str) -> float:
    import nncf
    import openvino

    del method
    with np.load(data) as arrays:
        rows = [{"images": row[None]} for row in arrays["images"][:count]]
    started = time.perf_counter()
    network = openvino.Core().read_model(model)
    network.reshape({"images": (1, 3, 224, 224)})
    made = nncf.quantize(network, nncf.Dataset(rows), subset_size=count)
    openvino.save_model(made, f"{out}.xml")
    return time.perf_counter() - started


RUNNERS = {"deploykit": run_deploykit, "onnxruntime": run_onnxruntime, "nncf": run_nncf}


def isolated(tool: str, model: Path, data: Path, method: str, count: int) -> dict[str, float]:
    """Run one quantization in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = [tool, str(model), str(data), method, str(count), f"{folder}/m.onnx"]
        done = subprocess.run(
            [sys.executable, __file__, "--one", *words], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def plain_seconds(model: Path) -> float:
    """Seconds of plain inference for one image, on all cores, in a process of its own."""
    code = (
        "import sys, time, numpy as np, onnxruntime as ort\n"
        "x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)\n"
        "o = ort.SessionOptions(); o.intra_op_num_threads = int(sys.argv[2])\n"
        "s = ort.InferenceSession(sys.argv[1], o, providers=['CPUExecutionProvider'])\n"
        "[s.run(None, {'images': x}) for _ in range(5)]\n"
        "t = time.perf_counter(); [s.run(None, {'images': x}) for _ in range(60)]\n"
        "print((time.perf_counter() - t) / 60)\n"
    )
    words = [sys.executable, "-c", code, str(model), str(read().cores)]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def row(tool: str, method: str, counts: tuple[int, int], model: Path, data: Path) -> dict:
    """Fixed cost and cost of each further image, in seconds and MB."""
    plain = plain_seconds(model)
    few, many = (isolated(tool, model, data, method, n) for n in counts)
    slope = {key: (many[key] - few[key]) / (counts[1] - counts[0]) for key in few}
    plain = (plain + plain_seconds(model)) / 2
    return {
        "tool": tool,
        "method": method,
        "images": counts,
        "runs": [few, many],
        "plain_seconds_per_image": plain,
        "seconds_per_image": slope["seconds"],
        "times_plain_inference": slope["seconds"] / plain,
        "mb_per_image": slope["peak_mb"],
        "fixed_seconds": few["seconds"] - counts[0] * slope["seconds"],
        "peak_mb": many["peak_mb"],
    }


def main(out: Path | None) -> None:
    """Measure all, print a table, write the JSON."""
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder) / "resnet50.onnx", Path(folder) / "images.npz"
        factory = HERE.parent / "models" / "resnet50.py"
        words = ["-m", "deploykit", "export", f"{factory}:resnet50", "-o", str(model)]
        shape = ["--input-shape", "images:1x3x224x224"]
        subprocess.run([sys.executable, *words, *shape], check=True, capture_output=True)
        np.savez(data, images=images(MANY))
        asked = [("deploykit", method, IMAGES) for method in OURS]
        asked += [("onnxruntime", method, counts) for method, counts in THEIRS.items()]
        if importlib.util.find_spec("nncf"):
            asked.append(("nncf", "default", IMAGES))
        rows = []
        for tool, method, counts in asked:
            made = row(tool, method, counts, model, data)
            if tool == "deploykit":
                made["peak_mb_at_512_images"] = isolated(tool, model, data, method, MANY)["peak_mb"]
            rows.append(made)
            print(
                f"{tool:<12} {method:<15} {made['seconds_per_image'] * 1e3:6.1f} ms an image "
                f"= {made['times_plain_inference']:5.2f}x plain, {made['mb_per_image']:6.1f} MB an "
                f"image, {made['fixed_seconds']:5.1f} s fixed, peak {made['peak_mb']:.0f} MB"
                + (f" ({made['peak_mb_at_512_images']:.0f} at 512)" if tool == "deploykit" else ""),
                flush=True,
            )
    if out:
        document = {
            "schema": "deploykit.calibration-cost/1",
            "rows": rows,
            "environment": read().model_dump(mode="json"),
        }
        out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        name, path, arrays, how, number, target = sys.argv[2:]
        seconds = RUNNERS[name](path, arrays, how, int(number), target)
        print("\n" + json.dumps({"seconds": seconds, "peak_mb": peak_mb()}))
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
