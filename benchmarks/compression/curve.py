"""Top-1 against measured latency on Fashion-MNIST: deploykit, and torch-pruning used plainly.

    python benchmarks/compression/curve.py FOLDER_OF_IDX_FILES OUT [--seeds N] [--small]

The same teacher, the same 20,000 training images, the same epochs and seeds for all; the 10,000
test images are scored once a model. Every engine is timed in one interleaved run of deploykit's
bench. OUT keeps all models: what is there is not made again. `--small` is a trial of minutes whose
scores mean nothing.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from deploykit import backends, environment, evaluation
from deploykit.dataset import Dataset, open_dataset
from deploykit.errors import AnswerIsNo
from deploykit.faster import prune_until_faster
from deploykit.formats import torch_folder
from deploykit.measure import BenchOptions, BenchResult, Candidate, bench, statistics
from deploykit.stages.distill import DistillOptions, distill
from deploykit.stages.export import ExportOptions, export
from deploykit.stages.prune import PruneOptions
from deploykit.stages.quantize import QuantizeOptions, quantize
from deploykit.stages.take import TakeOptions, take
from deploykit.values import Artifact, TensorSpec

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import augment  # noqa: E402
import peers  # noqa: E402

MODEL = HERE.parent / "models" / "fashion_mnist.py"
IMAGES = TensorSpec(name="images", dtype="float32", shape=("batch", 1, 28, 28))
AIMS = (1.5, 2.0, 2.5, 3.0, 3.5)
WIDTHS = ((16, 40, 56), (16, 32, 48), (16, 24, 40), (16, 16, 32))
"""Of the peers: `round_to=8`, and one 16-aligned shape."""


@dataclass(frozen=True)
class Setting:
    """The data, and how much of everything is made."""

    out: Path
    train: Dataset
    test: Dataset
    calibration: Dataset
    epochs: int
    seeds: range
    aims: tuple[float, ...]
    widths: tuple[tuple[int, ...], ...]

    def tensors(self) -> peers.Batch:
        feed, target = next(self.train.batches(len(self.train)))
        return torch.from_numpy(feed["images"]), torch.from_numpy(target.astype(np.int64))


def read_idx(folder: Path, name: str) -> np.ndarray:
    path = next(p for p in (folder / name, folder / f"{name}.gz") if p.exists())
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    axes = raw[3]
    shape = np.frombuffer(raw, ">u4", axes, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


def setting(idx: Path, out: Path, *, seeds: int, small: bool) -> Setting:
    out.mkdir(parents=True, exist_ok=True)
    made: dict[str, Dataset] = {}
    order = np.asarray(torch.randperm(60_000, generator=torch.Generator().manual_seed(7)))
    parts = {
        "train": ("train", order[: 1280 if small else 20_000]),
        "calibration": ("train", order[20_000:20_512]),
        "test": ("t10k", np.arange(500 if small else 10_000)),
    }
    for name, (part, rows) in parts.items():
        path = out / f"{name}.npz"
        if not path.exists():
            pixels = read_idx(idx, f"{part}-images-idx3-ubyte")[rows][:, None]
            images = ((pixels / 255 - 0.286) / 0.353).astype(np.float32)
            np.savez(path, images=images, target=read_idx(idx, f"{part}-labels-idx1-ubyte")[rows])
        made[name] = open_dataset(path)
    shorter = {"aims": AIMS[1:2], "widths": WIDTHS[1:2]} if small else {}
    return Setting(
        out=out,
        **made,
        epochs=1 if small else 2,
        seeds=range(seeds),
        **{"aims": AIMS, "widths": WIDTHS, **shorter},
    )


def taken(out: Path, weights: Path, widths: tuple[int, ...] = (24, 48, 64)) -> Artifact:
    options = TakeOptions(
        factory=f"{MODEL}:resnet",
        arguments={"widths": list(widths)},
        weights=weights,
        inputs=(IMAGES,),
        outputs=("logits",),
    )
    return take(options, out=out, force=True)


def ours(teacher: Artifact, given: Setting) -> Iterator[tuple[str, Artifact]]:
    """Widths by measured latency, for either precision; then distilled."""
    for precision in ("fp32", "int8"):
        for aim in given.aims:
            name = f"deploykit_{precision}_{aim}x"
            options = PruneOptions(speedup=aim, precision=precision, importance="taylor")
            try:
                pruned = prune_until_faster(
                    teacher, options, out=given.out / name, data=given.calibration, force=True
                )
            except AnswerIsNo as answer:
                print(name, answer, flush=True)
                continue
            for seed in given.seeds:
                yield (
                    f"{name}_s{seed}",
                    distilled(pruned, teacher, given, f"{name}_s{seed}", seed),
                )


def distilled(
    student: Artifact, teacher: Artifact, given: Setting, name: str, seed: int
) -> Artifact:
    options = DistillOptions(
        epochs=given.epochs,
        seed=seed,
        precision="bf16",
        augment=f"{HERE / 'augment.py'}:flip_and_shift",
        threads=torch.get_num_threads(),
    )
    out = given.out / f"{name}.distilled"
    return distill(student, options, teacher=teacher, data=given.train, out=out, force=True)


def theirs(teacher: Artifact, given: Setting) -> Iterator[tuple[str, Artifact]]:
    """torch-pruning by each importance, fine-tuned with and without KD; students from scratch.

    The last row of a width is the same pruned network in deploykit's loop: its score and its time
    tell what the loop costs.
    """
    guide, data = torch_folder.load(teacher), given.tensors()
    sample = tuple(t[:2000] for t in data)
    for widths in given.widths:
        shape = "-".join(map(str, widths))
        for importance in ("l1", "l2", "taylor", "scratch"):
            for seed in given.seeds:
                for kd in (False, True):
                    name = f"tp_{importance}_{shape}_{'kd' if kd else 'ft'}_s{seed}"
                    weights = given.out / f"{name}.safetensors"
                    if not weights.exists():
                        model = start(guide, widths, importance, sample, seed)
                        seconds = peers.train(
                            model, guide if kd else None, data, augment.flip_and_shift,
                            epochs=given.epochs, seed=seed,
                        )  # fmt: skip
                        state = {k: v.contiguous() for k, v in model.state_dict().items()}
                        save_file(state, weights, {"seconds": f"{seconds:.1f}"})
                        print(name, f"{seconds:.1f} s", flush=True)
                    yield name, taken(given.out / name, weights, widths)
        pruned = given.out / f"tp_l2_{shape}.safetensors"
        model = start(guide, widths, "l2", sample, 0)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, pruned)
        source = taken(given.out / f"tp_l2_{shape}", pruned, widths)
        name = f"tp_l2_{shape}_deploykit-loop_s0"
        yield name, distilled(source, teacher, given, name, 0)


def start(
    guide: torch.nn.Module, widths: tuple[int, ...], importance: str, sample: peers.Batch, seed: int
) -> torch.nn.Module:
    if importance != "scratch":
        return peers.prune(guide, widths, importance, sample)
    torch.manual_seed(seed)
    return type(guide)(widths, (1, 2, 2), 10)


def engines(name: str, model: Artifact, given: Setting) -> list[Candidate]:
    path = given.out / name
    plain = export(model, ExportOptions(), out=path.with_name(f"{name}.fp32.onnx"), force=True)
    how = QuantizeOptions(scope="residual", calibration_method="minmax", corrections=("none",))
    small = quantize(
        plain, how, data=given.calibration, out=path.with_name(f"{name}.int8.onnx"), force=True
    )
    return [
        Candidate(name=f"{name}.{kind}", artifact=a, backend="ort-cpu", family=name)
        for kind, a in (("fp32", plain), ("int8", small))
    ]


def row(candidate: Candidate, model: Artifact, given: Setting, result: BenchResult) -> dict:
    with backends.open_session(candidate.artifact, "ort-cpu") as session:
        score = evaluation.evaluate(session, given.test, "top1")
    times = {
        f"b{m.batch_size}_ms": statistics.percentile_interval_ms(m, 50).model_dump()
        for m in result.measurements
        if m.name == candidate.name and not m.invalid
    }
    last = model.history[-1].facts
    return {
        "name": candidate.name,
        "top1": score.score.model_dump(),
        "right": [int(v) for v in score.per_sample or ()],
        "seconds_per_epoch": last.facts.get("seconds_per_epoch")
        if last.stage == "distill"
        else None,
        **times,
    }


def table(rows: list[dict]) -> str:
    """Markdown; p is that of the paired McNemar test against the best peer that is as fast."""
    lines = ["| engine | top-1 | b1 ms | best peer as fast | p |", "|---|---|---|---|---|"]
    for one in sorted(rows, key=lambda r: r["b1_ms"]["value"]):
        ms = one["b1_ms"]["value"]
        rivals = [
            r for r in rows
            if not r["name"].startswith("deploykit") and r["b1_ms"]["value"] <= ms * 1.01
        ]  # fmt: skip
        best = max(rivals, key=lambda r: r["top1"]["value"], default=None)
        told = ("", "")
        if best and one["name"].startswith("deploykit"):
            told = (
                f"{best['name']} {best['top1']['value']:.4f}",
                f"{peers.mcnemar(one['right'], best['right']):.3f}",
            )
        lines.append(
            f"| {one['name']} | {one['top1']['value']:.4f} | {ms:.4f} | {' | '.join(told)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("idx", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    asked = parser.parse_args()
    given = setting(asked.idx, asked.out, seeds=asked.seeds, small=asked.small)
    weights = MODEL.with_name("fashion_mnist_teacher.safetensors")
    assert load_file(weights)
    teacher = taken(given.out / "teacher", weights)
    models = dict([("teacher", teacher), *ours(teacher, given), *theirs(teacher, given)])
    made = {name: engines(name, model, given) for name, model in models.items()}
    candidates = [c for each in made.values() for c in each]
    how = BenchOptions(preset="quick" if asked.small else "standard", batch_sizes=(1,))
    result = bench(candidates, how, data=given.test)
    rows = [row(c, models[name], given, result) for name, each in made.items() for c in each]
    found = {
        "environment": environment.read().model_dump(mode="json"),
        "images": len(given.train),
        "epochs": given.epochs,
        "rows": [{k: v for k, v in r.items() if k != "right"} for r in rows],
    }
    (given.out / "curve.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "curve.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
