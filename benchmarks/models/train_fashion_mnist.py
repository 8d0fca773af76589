"""Train the teacher of the Fashion-MNIST recipe on all 60,000 training images.

    python benchmarks/models/train_fashion_mnist.py FOLDER_OF_IDX_FILES [OUT.safetensors]

Eight epochs of SGD with one-cycle learning rate, horizontal flips and shifts of up to two pixels;
the 10,000 test images are scored once, at the end (0.9307 for the committed weights). About 25
minutes on two busy cores.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

HERE = Path(__file__).parent
MEAN, STD = 0.286, 0.353  # of the training pixels in [0, 1]
EPOCHS, BATCH, PEAK_LR = 8, 128, 0.15


def load(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.float() / 255 - MEAN) / STD


def augment(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Flip half of the images, then shift the batch by up to two pixels (zero pixels come in)."""
    flip = torch.rand(len(images), 1, 1, 1, generator=rng) < 0.5
    images = torch.where(flip, images.flip(3), images)
    padded = F.pad(images, (2, 2, 2, 2), value=-MEAN / STD)
    shifts = torch.randint(0, 5, (len(images), 2), generator=rng)
    rows = shifts[:, 0, None] + torch.arange(28)
    columns = shifts[:, 1, None] + torch.arange(28)
    index = torch.arange(len(images))[:, None, None]
    return padded[index, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def train(model: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(
        model.parameters(), PEAK_LR, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = EPOCHS * (len(pixels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=steps, pct_start=0.15
    )
    for epoch in range(EPOCHS):
        order = torch.randperm(len(pixels), generator=rng)
        total = 0.0
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            images = augment(normalize(pixels[batch]), rng).contiguous(
                memory_format=torch.channels_last
            )
            loss = F.cross_entropy(model(images), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {total / (len(order) // BATCH):.4f}", flush=True)


@torch.no_grad()
def top1(model: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    hits = sum(
        int((model(normalize(p)).argmax(1) == y).sum())
        for p, y in zip(pixels.split(500), labels.split(500), strict=True)
    )
    return hits / len(labels)


def main(source: Path, out: Path) -> None:
    read_idx = load(HERE.parents[1] / "calibration_data/fashion_mnist/make.py").read_idx
    data = {
        split: (
            torch.from_numpy(read_idx(source, f"{split}-images-idx3-ubyte").copy())[:, None],
            torch.from_numpy(read_idx(source, f"{split}-labels-idx1-ubyte").copy()).long(),
        )
        for split in ("train", "t10k")
    }
    torch.manual_seed(0)
    model = load(HERE / "fashion_mnist.py").resnet().to(memory_format=torch.channels_last)
    train(model, *data["train"])
    print(f"top-1 on the 10,000 test images: {top1(model, *data['t10k']):.4f}")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    default = HERE / "fashion_mnist_teacher.safetensors"
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else default)
