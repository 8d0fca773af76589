"""Build engines of real models with TensorRT for RTX, on a machine without a GPU.

    python benchmarks/gpu/ahead_of_time.py CACHE -o benchmarks/gpu/results/ahead_of_time.json

CACHE is what `benchmarks/quantization/cases.py` made: a folder a model, with its calibration data.
Each model is built in FP32, FP16, INT8 and FP8 for sm86, sm89 and sm120 (FP8 for those that have
it). INT8 and FP8 are from `deploykit quantize --target tensorrt`, FP16 is ONNX Runtime's converter.
Nothing is run: the table says what was built, and what share of the work is in the precision.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from deploykit import (
    BuildOptions,
    QuantizeOptions,
    _json,
    build,
    environment,
    open_dataset,
    open_model,
)
from deploykit import quantize as quantize_stage
from deploykit.dataset import Dataset
from deploykit.errors import DeploykitError
from deploykit.values import Artifact

GPUS = {"fp8": ("sm89", "sm120")}
ALL_GPUS = ("sm86", "sm89", "sm120")
PRECISIONS = ("fp32", "fp16", "int8", "fp8")
SAMPLES = 16
"""Samples to calibrate on; shapes and placement do not depend on how many."""


def half(source: Artifact, out: Path) -> Artifact:
    """The model in FP16; inputs and outputs stay as they are."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    halved = OnnxModel(convert_float_to_float16(onnx.load(source.path), keep_io_types=True))
    halved.topological_sort()  # the converter puts its casts anywhere
    onnx.save(halved.model, out)
    return open_model(out)


def made(source: Artifact, precision: str, data: Dataset, folder: Path) -> Artifact:
    """The ONNX file to build."""
    if precision == "fp32":
        return source
    out = folder / f"{precision}.onnx"
    if precision == "fp16":
        return half(source, out)
    options = QuantizeOptions.model_validate(
        {
            "target": "tensorrt", "precision": precision, "calibration_samples": SAMPLES,
            "scope": "residual", "calibration_method": "minmax", "corrections": ("none",),
        }
    )  # fmt: skip
    return quantize_stage(source, options, data=data, out=out)


def row(name: str, precision: str, source: Artifact, data: Dataset) -> dict[str, Any]:
    """One engine, or why there is none."""
    told: dict[str, Any] = {"model": name, "precision": precision}
    gpus = GPUS.get(precision, ALL_GPUS)
    with tempfile.TemporaryDirectory() as folder:
        try:
            onnx = made(source, precision, data, Path(folder))
            began = time.monotonic()
            options = BuildOptions(flavour="tensorrt-rtx", gpu=gpus, batch_sizes=(1, 1, 8))
            dynamic = any(isinstance(d, str) for spec in onnx.inputs for d in spec.shape)
            shapes = data if dynamic else None
            engine = build(onnx, options, out=Path(folder) / "m.engine", data=shapes)
        except DeploykitError as error:
            fault = str(error).replace(f"{folder}/", "")
            return {**told, "error": type(error).__name__, "fact": fault, "hint": error.hint}
        facts = engine.facts
        work = facts["multiply_accumulates_by_precision"]
        return {
            **told,
            "gpus": gpus,
            "onnx_bytes": onnx.path.stat().st_size,
            "engine_bytes": engine.path.stat().st_size,
            "build_seconds": round(time.monotonic() - began, 1),
            "layers": sum(facts["network_layers"].values()),
            "compute_layers_by_precision": facts["compute_layers_by_precision"],
            "work_share": {kind: round(n / sum(work.values()), 4) for kind, n in work.items()},
            "pairs_unfused": facts["pairs_unfused"],
            "floats_left": facts["floats_left"],
            "profile": facts["profile"],
        }


def main() -> None:
    """Build all of them."""
    parser = argparse.ArgumentParser(description="Build engines without a GPU.")
    parser.add_argument("cache", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--precision", action="append", choices=PRECISIONS)
    given = parser.parse_args()
    rows = []
    for folder in sorted(p.parent for p in given.cache.glob("*/fp32.onnx")):
        source = open_model(folder / "fp32.onnx")
        data = open_dataset(folder / "calibration.npz")
        for precision in given.precision or PRECISIONS:
            rows.append(row(folder.name, precision, source, data))
            print(json.dumps(rows[-1])[:400], flush=True)
    document = {
        "schema": "deploykit.benchmark.ahead_of_time/1",
        "ran_on_gpu": False,
        "environment": environment.read().model_dump(mode="json"),
        "engines": rows,
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(_json.text(document))


if __name__ == "__main__":
    main()
