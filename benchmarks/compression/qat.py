"""What does quantization-aware training give back, and does the engine compute what was trained?

    python benchmarks/compression/qat.py OUT.json [--epochs 12]

The Fashion-MNIST teacher is quantized in several ways, some of them bad on purpose, and trained on
the 512 calibration images to give what the float model gives. Scores are top-1 on all 10,000 test
images: of the engine in ONNX Runtime before and after, and of what was trained, in PyTorch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from deploykit import environment, evaluation
from deploykit.backends import open_session
from deploykit.dataset import Dataset, open_dataset
from deploykit.environment import has_int8_dot_product
from deploykit.formats import onnx_module
from deploykit.stages.distill import DistillOptions, distill
from deploykit.stages.export import ExportOptions, export
from deploykit.stages.quantize import QuantizeOptions, quantize
from deploykit.stages.take import TakeOptions, take
from deploykit.values import Artifact, SessionOptions, TensorSpec

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "calibration_data" / "fashion_mnist"
NARROW = {"calibration_method": "percentile", "percentile": 97.0, "corrections": ("none",)}
WAYS = {
    "full": {"scope": "all"},
    "full, ranges too narrow": {"scope": "all", **NARROW},
    "partial, ranges too narrow": {"op_types_to_quantize": ("Conv",), **NARROW},
    "mixed, ranges too narrow": {"scope": "all", "keep_float": ("layers.1*",), **NARROW},
    "7-bit weights, ranges too narrow": {"processor": "any", "scope": "all", **NARROW},
    "for TensorRT, ranges too narrow": {"target": "tensorrt", **NARROW},
}


def score(artifact: Artifact, data: Dataset) -> float:
    options = SessionOptions(simulate=not has_int8_dot_product())  # where 8-bit sums overflow
    with open_session(artifact, "ort-cpu", options) as session:
        return evaluation.evaluate(session, data, "top1").score.value


def trained_score(artifact: Artifact, data: Dataset) -> float:
    """Of the fake-quantized network in PyTorch."""
    module, right = onnx_module.load(artifact.path), 0
    with torch.no_grad():
        for feed, target in data.batches(500):
            logits = module(torch.from_numpy(feed["images"]))[0].numpy()
            right += int(np.sum(logits.argmax(1) == target))
    return right / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    given = parser.parse_args()
    few, test = (open_dataset(DATA / f"{name}.npz") for name in ("calibration", "evaluation"))
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = TensorSpec(name="images", dtype="float32", shape=("batch", 1, 28, 28))
        models = ROOT / "benchmarks" / "models"
        asked = TakeOptions(
            factory=f"{models / 'fashion_mnist.py'}:resnet", inputs=(images,), outputs=("logits",),
            weights=models / "fashion_mnist_teacher.safetensors",
        )  # fmt: skip
        teacher = take(asked, out=folder / "teacher")
        floats = export(teacher, ExportOptions(), out=folder / "teacher.onnx", data=test.first(100))
        options = DistillOptions(
            loss="mse", alpha=1, epochs=given.epochs, learning_rate=0.002, batch_size=64, clip=1.0,
            weight_decay=0,
        )  # fmt: skip
        float_score = score(floats, test)
        for way, how in WAYS.items():
            model = quantize(
                floats, QuantizeOptions.model_validate(how), data=few, out=folder / "q.onnx",
                force=True,
            )  # fmt: skip
            made = distill(
                model, options, teacher=floats, data=few, out=folder / "t.onnx", force=True
            )
            rows[way] = {
                "before": score(model, test),
                "after": score(made, test),
                "after_in_pytorch": trained_score(made, test),
                "engine_agreement_db": made.facts["engine_agreement_db"],
                "seconds": sum(made.facts["seconds_per_epoch"]),
            }
            print(way, rows[way], flush=True)
    document = {
        "schema": "deploykit.qat/1",
        "environment": environment.read().model_dump(mode="json"),
        "epochs": given.epochs,
        "images": len(few),
        "float": float_score,
        "ways": rows,
    }
    given.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
