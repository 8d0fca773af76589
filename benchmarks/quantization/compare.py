"""How does deploykit's quantization stand beside other quantizers, on real models?

    python benchmarks/quantization/compare.py CACHE [OUT.json] [--case NAME]...

CACHE holds the cases that `cases.py` made. Every quantizer makes its model in a process of its own
(from files to a file; imports are not counted); then all models of a case are scored on the
evaluation data in the runtime that they are for, one sample at a time, and timed there: one thread,
batch 1, each once in every round, in random order. README.md explains the columns.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import metrics
import numpy as np

from deploykit import environment

HERE = Path(__file__).resolve().parent
SCHEMA = "deploykit.quantization-cases/1"
BASELINE = "ort-fp32"
CONTROL = "ort-fp32 again"
"""A second session of the baseline: how far apart equal engines are timed."""
MAX_LOSS = 0.01
"""Share of the float model's score that may be lost."""
SAME_TIME = 0.03
"""Times this near each other are a tie."""
SECONDS, ROUNDS, WARM_UP = 10.0, 30, 3
"""A case is timed for at least so long, in at least so many rounds, after so many calls of each."""
TURN_NS = 2_000_000
"""An engine's turn in a round is as many calls as the baseline makes in so long, at least one: a
single call of a tiny model would time the caches that the engine before it has left."""
RESAMPLES = 999
SEED = 0
LIBRARIES = ("onnxruntime", "openvino", "nncf", "onnx", "numpy", "scipy", "sympy")

Feed = dict[str, np.ndarray]
Run = Callable[[Feed], list[np.ndarray]]
Row = dict[str, Any]


# Quantizers: from the folder of a case to a model at `out`; what there is to tell of it -----------


def samples(file: Path) -> list[Feed]:
    """The samples of an .npz one by one, without their labels."""
    with np.load(file) as data:
        arrays = {name: data[name] for name in data.files if name != "target"}
    count = len(next(iter(arrays.values())))
    return [{name: a[i : i + 1] for name, a in arrays.items()} for i in range(count)]


@dataclass(frozen=True)
class OrtStatic:
    """ONNX Runtime's `quantize_static` as its documentation has it: per channel, MinMax.

    On a CPU without an 8-bit dot product with 7-bit weights.
    """

    activation: Literal["QInt8", "QUInt8"]
    op_types: tuple[str, ...] | None = None
    modules = ("onnx.version_converter", "onnxruntime.quantization.shape_inference")

    def __call__(self, folder: Path, out: Path) -> Row:
        """Lift the opset where per-channel Q/DQ needs it, pre-process, quantize."""
        import onnxruntime.quantization as q

        notes: list[str] = []
        source = lifted(folder / "fp32.onnx", out.with_suffix(".source.onnx"), notes)
        prepared = preprocessed(source, out.with_suffix(".prepared.onnx"), notes)
        data = samples(folder / "calibration.npz")

        class Reader(q.CalibrationDataReader):
            def __init__(self) -> None:
                self.rest = iter(data)

            def get_next(self) -> Feed | None:
                return next(self.rest, None)

        def quantize(model: Path) -> None:
            q.quantize_static(
                str(model), str(out), Reader(), per_channel=True,
                quant_format=q.QuantFormat.QDQ, calibrate_method=q.CalibrationMethod.MinMax,
                activation_type=q.QuantType[self.activation], weight_type=q.QuantType.QInt8,
                op_types_to_quantize=self.op_types and list(self.op_types),
                # As its documentation advises where 8-bit products overflow 16-bit sums.
                reduce_range=not environment.has_int8_dot_product(),
            )  # fmt: skip

        try:
            quantize(prepared)
        except ValueError as error:
            notes.append(f"without pre-processing, with it: {told(error)}")
            quantize(source)
        return {"notes": notes}


def lifted(model: Path, out: Path, notes: list[str]) -> Path:
    """The model at an opset that has Q/DQ per channel (13 or later)."""
    import onnx
    from onnx import version_converter

    source = onnx.load(model)
    if next(o.version for o in source.opset_import if o.domain in ("", "ai.onnx")) < 13:
        source = version_converter.convert_version(source, 17)
        notes.append("opset lifted to 17")
    onnx.save(source, out)
    return out


def preprocessed(model: Path, out: Path, notes: list[str]) -> Path:
    """The model after ONNX Runtime's own pre-processing for quantization."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        quant_pre_process(str(model), str(out))
    except Exception as error:  # noqa: BLE001 - it raises bare ones
        notes.append(f"pre-processed without symbolic shapes, with them: {told(error)}")
        quant_pre_process(str(model), str(out), skip_symbolic_shape=True)
    return out


@dataclass(frozen=True)
class Nncf:
    """NNCF's post-training quantization of an OpenVINO model."""

    transformer: bool = False
    modules = ("nncf", "openvino")

    def __call__(self, folder: Path, out: Path) -> Row:
        """Quantize with the default preset, or the one for transformers."""
        import nncf
        import openvino

        data = samples(folder / "calibration.npz")
        model = static_model(folder / "fp32.onnx", data[0])
        kind = nncf.ModelType.TRANSFORMER if self.transformer else None
        made = nncf.quantize(model, nncf.Dataset(data), subset_size=len(data), model_type=kind)
        openvino.save_model(made, out, compress_to_fp16=False)
        return {}


@dataclass(frozen=True)
class Deploykit:
    """`deploykit.quantize` with its default options under a promise."""

    target: Literal["ort-cpu", "openvino"]
    modules = ("deploykit.stages.quantize", "onnx", "onnxruntime", "openvino")

    def __call__(self, folder: Path, out: Path) -> Row:
        """Quantize so that at most MAX_LOSS is lost. Raises AnswerIsNo: that cannot be."""
        import deploykit
        from deploykit.stages.quantize import Promise

        metric = f"{HERE / 'metrics.py'}:{metric_name(folder)}"
        evaluation = deploykit.open_dataset(folder / "evaluation.npz")
        made = deploykit.quantize(
            deploykit.open_model(folder / "fp32.onnx"),
            deploykit.QuantizeOptions(target=self.target),
            data=deploykit.open_dataset(folder / "calibration.npz"),
            out=out,
            promise=Promise(evaluation, metric, MAX_LOSS, relative=True),
        )
        facts = made.history[-1].facts
        kept = ("candidate", "compute_nodes", "compute_nodes_quantized", "search")
        return {"facts": {name: facts[name] for name in kept if name in facts}}


def metric_name(folder: Path) -> str:
    return json.loads((folder / "case.json").read_text())["metric"]


def told(error: Exception) -> str:
    """The error in one line that names no folder of this machine."""
    text = f"{type(error).__name__}: {error}"
    if hint := getattr(error, "hint", None):
        text += f" ({hint})"
    return one_line(text)


def one_line(text: str) -> str:
    return re.sub(r"/\S*/", "", " ".join(text.split()))[:600]


# Engines ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Engine:
    """A model and the runtime for it."""

    runtime: Literal["onnxruntime", "openvino"]
    maker: OrtStatic | Nncf | Deploykit | None = None
    """None runs the float model."""
    f32: bool = False
    """OpenVINO computes in float32 even where it would choose bfloat16."""
    cases: tuple[str, ...] = ()
    """The cases it is for; none named: all."""

    @property
    def suffix(self) -> str:
        """Of the model file."""
        return ".xml" if isinstance(self.maker, Nncf) else ".onnx"


COMPUTE = ("Conv", "MatMul", "Gemm")
ENGINES: dict[str, Engine] = {
    BASELINE: Engine("onnxruntime"),
    "ort-s8s8-all": Engine("onnxruntime", OrtStatic("QInt8")),
    "ort-u8s8-all": Engine("onnxruntime", OrtStatic("QUInt8")),
    "ort-u8s8-compute": Engine("onnxruntime", OrtStatic("QUInt8", COMPUTE)),
    "openvino": Engine("openvino"),
    "openvino-f32": Engine("openvino", f32=True),
    "nncf": Engine("openvino", Nncf()),
    "nncf-transformer": Engine("openvino", Nncf(transformer=True), cases=("minilm",)),
    "deploykit-ort": Engine("onnxruntime", Deploykit("ort-cpu")),
    "deploykit-openvino": Engine("openvino", Deploykit("openvino")),
}


def make_here(name: str, folder: Path, out: Path) -> Row:
    """Make an engine's model in this process; what it took, or why there is none."""
    maker = ENGINES[name].maker
    assert maker
    started = time.perf_counter()
    try:
        for module in maker.modules:
            importlib.import_module(module)
        started = time.perf_counter()
        row = maker(folder, out)
    except Exception as error:  # noqa: BLE001 - any failure of a quantizer is a result here
        row = {"error": told(error)}
    return {**row, "seconds": time.perf_counter() - started, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """Peak resident set size of this process."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def make(name: str, folder: Path, out: Path) -> Row:
    """Make an engine's model in a process of its own."""
    words = [sys.executable, str(HERE / "compare.py"), "--one", name, str(folder), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=out.parent)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        return {"error": one_line(f"exit status {done.returncode}: {lines[-1]}")}
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


# Runtimes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runner:
    """A loaded model."""

    run: Run
    outputs: list[str]
    float_precision: str


def open_runner(engine: Engine, model: Path, feed: Feed) -> Runner:
    """Load a model for one thread; `feed` shows the shapes."""
    return (
        open_ort(model) if engine.runtime == "onnxruntime" else open_openvino(engine, model, feed)
    )


def open_ort(model: Path) -> Runner:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return Runner(lambda feed: session.run(None, feed), names, "f32")


def static_model(path: Path, feed: Feed) -> Any:
    """An OpenVINO model with the shapes of a feed."""
    import openvino

    model = openvino.Core().read_model(path)
    model.reshape({i.any_name: feed[i.any_name].shape for i in model.inputs})
    return model


def open_openvino(engine: Engine, path: Path, feed: Feed) -> Runner:
    import openvino

    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    if engine.f32:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    model = static_model(path, feed)
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    return Runner(
        lambda feed: list(request.infer(feed, share_inputs=True).to_tuple()),
        [output.any_name for output in model.outputs],
        compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name(),
    )


# Scores -------------------------------------------------------------------------------------------


def outputs_of(runner: Runner, feeds: Iterable[Feed]) -> dict[str, np.ndarray]:
    """Outputs over all samples, run one by one. Raises ValueError: they are not finite."""
    results = [[np.array(output) for output in runner.run(feed)] for feed in feeds]
    columns = zip(*results, strict=True)
    found = {
        name: np.concatenate(parts) for name, parts in zip(runner.outputs, columns, strict=True)
    }
    if not all(np.isfinite(array).all() for array in found.values()):
        raise ValueError("the outputs hold NaN or infinite values")
    return found


def cosine(outputs: metrics.Outputs, reference: metrics.Outputs) -> float:
    """Mean over the samples of the cosine of the first output with the reference's."""
    a, b = (metrics.first(o).astype(float) for o in (outputs, reference))
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / (lengths + 1e-12)).mean())


def size_mb(model: Path) -> float:
    """Size of a model, with the file of its weights if there is one."""
    files = (model, model.with_suffix(".bin"))
    return sum(file.stat().st_size for file in files if file.exists()) / 1e6


# Times --------------------------------------------------------------------------------------------


def interleaved_ns(runs: Mapping[str, Run], feeds: Sequence[Feed]) -> dict[str, list[float]]:
    """Nanoseconds a call of each engine in every round, in random order, on the same sample."""
    rng = np.random.default_rng(SEED)
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for run in runs.values():
        turn_ns(run, feeds[0], WARM_UP)
    single = turn_ns(runs[BASELINE], feeds[0], WARM_UP)
    calls = max(1, round(TURN_NS / single))
    end = time.perf_counter() + SECONDS
    number = 0
    while number < ROUNDS or time.perf_counter() < end:
        feed = feeds[number % len(feeds)]
        for index in rng.permutation(len(names)):
            times[names[index]].append(turn_ns(runs[names[index]], feed, calls))
        number += 1
    return times


def turn_ns(run: Run, feed: Feed, calls: int) -> float:
    """Nanoseconds a call, over some calls in a row."""
    started = time.perf_counter_ns()
    for _ in range(calls):
        run(feed)
    return round((time.perf_counter_ns() - started) / calls, 1)


def ratio(times: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Median of the per-round ratios, and its 95 % interval (percentile bootstrap over rounds)."""
    ratios = np.array(times) / np.array(baseline)
    rng = np.random.default_rng(SEED)
    medians = [np.median(rng.choice(ratios, len(ratios))) for _ in range(RESAMPLES)]
    low, high = np.quantile(medians, [0.025, 0.975])
    return [float(np.median(ratios)), float(low), float(high)]


# A case -------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The engines of one case: made, scored, timed."""

    folder: Path
    made: Path
    rows: dict[str, Row]
    times_ns: dict[str, list[float]] = field(default_factory=dict)
    noise: list[float] = field(default_factory=list)
    """Time ratio of the baseline's second session to the first."""

    @classmethod
    def of(cls, folder: Path, made: Path) -> Bench:
        """All engines that are for the case, with nothing known of them."""
        rows = {n: {} for n, e in ENGINES.items() if not e.cases or folder.name in e.cases}
        return cls(folder, made, rows)

    def model(self, name: str) -> Path:
        """Where an engine's model lies."""
        engine = ENGINES[name]
        return self.made / f"{name}{engine.suffix}" if engine.maker else self.folder / "fp32.onnx"

    def quantize(self) -> None:
        """Make all models, one after the other."""
        for name, row in self.rows.items():
            if ENGINES[name].maker:
                print(f"{self.folder.name}: {name}", file=sys.stderr, flush=True)
                row.update(make(name, self.folder, self.model(name)))

    def measure(self) -> None:
        """Score all models that were made, and time those that run."""
        feeds = samples(self.folder / "evaluation.npz")
        ready = self._scored(feeds)
        runs = {name: runner.run for name, runner in ready.items()}
        runs[CONTROL] = open_runner(ENGINES[BASELINE], self.model(BASELINE), feeds[0]).run
        self.times_ns = interleaved_ns(runs, feeds)
        for name in ready:
            times, baseline = self.times_ns[name], self.times_ns[BASELINE]
            self.rows[name] |= {
                "median_ms": float(np.median(times)) / 1e6,
                "time_ratio": ratio(times, baseline),
            }
        self.noise = ratio(self.times_ns[CONTROL], self.times_ns[BASELINE])

    def _scored(self, feeds: Sequence[Feed]) -> dict[str, Runner]:
        metric = getattr(metrics, metric_name(self.folder))
        with np.load(self.folder / "evaluation.npz") as data:
            targets = data["target"] if "target" in data.files else None
        ready: dict[str, Runner] = {}
        reference: dict[str, np.ndarray] | None = None
        for name, row in self.rows.items():
            if "error" in row:
                continue
            try:
                runner = open_runner(ENGINES[name], self.model(name), feeds[0])
                outputs = outputs_of(runner, feeds)
                reference = reference or outputs
                score = float(metric(outputs, targets, reference))
            except Exception as error:  # runtimes' errors share no base
                if name == BASELINE:
                    raise
                row["error"] = f"does not run: {told(error)}"
                continue
            ready[name] = runner
            row |= {
                "score": score,
                "loss_percent": 100 * self._lost(score),
                "cosine": cosine(outputs, reference),
                "mb": size_mb(self.model(name)),
                "float_precision": runner.float_precision,
            }
        return ready

    def _lost(self, score: float) -> float:
        """Share of the baseline's score that is lost."""
        base = self.rows[BASELINE].get("score", score)
        return (base - score) / abs(base)

    def verdict(self) -> Row:
        """The fastest engines that keep the score, and how deploykit's stands to the others'."""
        allowed = [n for n, row in self.rows.items() if "time_ratio" in row and self._keeps(row)]
        ranked = sorted(allowed, key=lambda name: self.rows[name]["time_ratio"][0])
        ours = [n for n in ranked if isinstance(ENGINES[n].maker, Deploykit)]
        peers = [n for n in ranked if n not in ours]
        found: Row = {"fastest": ranked[0], "best_peer": peers[0], "best_deploykit": None}
        if not ours:
            return {**found, "outcome": "loses"}
        beside = ratio(self.times_ns[ours[0]], self.times_ns[peers[0]])
        if abs(beside[0] - 1) <= SAME_TIME:
            outcome = "ties"
        else:
            outcome = "wins" if beside[0] < 1 else "loses"
        return {**found, "best_deploykit": ours[0], "beside_peer": beside, "outcome": outcome}

    def _keeps(self, row: Row) -> bool:
        base = self.rows[BASELINE]["score"]
        return bool(base - row["score"] <= MAX_LOSS * abs(base))

    def document(self) -> Row:
        """All that was measured."""
        return {
            "case": self.folder.name,
            "metric": metric_name(self.folder),
            "rows": [{"engine": name, **row} for name, row in self.rows.items()],
            "verdict": self.verdict(),
            "noise": self.noise,
            "times_ns": self.times_ns,
        }


# What is told -------------------------------------------------------------------------------------

COLUMNS = ("case", "engine", "score", "loss %", "cosine", "time ratio [95 %]", "MB", "s", "peak MB")
WIDTHS = (10, 19, 8, 8, 8, 20, 8, 8, 8)
COSTS = (("mb", 3), ("seconds", 1), ("peak_mb", 0))
"""Keys and decimals of the last three columns."""


def line(cells: Sequence[str]) -> str:
    left, right = zip(cells[:2], WIDTHS[:2], strict=True), zip(cells[2:], WIDTHS[2:], strict=True)
    return " ".join([*(f"{c:<{w}}" for c, w in left), *(f"{c:>{w}}" for c, w in right)])


def row_text(case: str, row: Row) -> str:
    """One row of the table; an engine that failed has its message in place of numbers."""
    cost = [f"{row[key]:.{digits}f}" if key in row else "-" for key, digits in COSTS]
    if "time_ratio" not in row:
        return f"{case:<10} {row['engine']:<19} fails ({cost[1]} s, {cost[2]} MB): {row['error']}"
    numbers = [
        f"{row['score']:.4f}",
        f"{row['loss_percent']:+.2f}",
        f"{row['cosine']:.4f}",
        interval(row["time_ratio"]),
    ]
    return line([case, row["engine"], *numbers, *cost])


def interval(values: Sequence[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*values)


def verdict_text(case: Row) -> str:
    """Who is fastest at the score allowed."""
    ratios = {row["engine"]: row["time_ratio"][0] for row in case["rows"] if "time_ratio" in row}

    def named(name: str | None) -> str:
        return f"{name} {ratios[name]:.2f}x" if name else "none"

    found = case["verdict"]
    text = (
        f"{case['case']}: fastest at {MAX_LOSS:.0%} loss {named(found['fastest'])}; "
        f"best peer {named(found['best_peer'])}; "
        f"best of deploykit {named(found['best_deploykit'])}: it {found['outcome']}"
    )
    if "beside_peer" in found:
        text += f", {interval(found['beside_peer'])} of the peer's time"
    return f"{text}; the baseline beside itself {interval(case['noise'])}"


def as_json(document: Row) -> str:
    """JSON with every list of numbers on one line; what is no number is null."""
    plain = json.loads(json.dumps(document), parse_constant=lambda _: None)
    text = json.dumps(plain, indent=1, allow_nan=False)
    return re.sub(r"\[[\s\d.e+,-]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def main() -> None:
    """Measure the cases that were asked for, by default all that there are."""
    parser = argparse.ArgumentParser(description="Quantizers side by side on the model cases.")
    parser.add_argument("cache", type=Path)
    parser.add_argument("out", type=Path, nargs="?", help="JSON with all that was measured")
    parser.add_argument("--case", action="append", help="only this one")
    asked = parser.parse_args()
    names = asked.case or sorted(file.parent.name for file in asked.cache.glob("*/case.json"))
    document: Row = {
        "schema": SCHEMA,
        "versions": environment.versions(LIBRARIES),
        "environment": environment.read().model_dump(mode="json"),
        "cases": [],
    }
    print(line(COLUMNS))
    for name in names:
        with tempfile.TemporaryDirectory() as made:
            bench = Bench.of((asked.cache / name).resolve(), Path(made))
            bench.quantize()
            bench.measure()
            case = bench.document()
        print("\n".join(row_text(name, row) for row in case["rows"]), flush=True)
        document["cases"].append(case)
        if asked.out:
            asked.out.write_text(as_json(document))
    print("\n" + "\n".join(verdict_text(case) for case in document["cases"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print("\n" + json.dumps(make_here(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
    else:
        main()
