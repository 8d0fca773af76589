"""Choice by measurement, mixed precision, what breaks a model, and the account of it all."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit.backends import open_session
from deploykit.dataset import Dataset, open_dataset
from deploykit.errors import AnswerIsNo, InputError, StageError
from deploykit.formats.onnx_graph import Graph
from deploykit.session import Session
from deploykit.stages.build import BuildOptions, build, unavailable
from deploykit.stages.quantize import (
    Promise,
    QuantizeOptions,
    findings,
    lab,
    quantize,
    sound,
    workshop,
)
from deploykit.stages.quantize.lab import Point, pareto
from deploykit.stages.quantize.prepare import prepare
from deploykit.stages.quantize.search import Damage, _worth, search, speed_claim
from deploykit.stages.quantize.workshop import Correction, Variant
from deploykit.values import Array, Artifact, Feed, Interval, Json, SessionOptions
from tests.formats.test_onnx_graph import CONV, normal, parsed, stored
from tests.stages.quantize.test_qdq import follow

search_module = importlib.import_module("deploykit.stages.quantize.search")
FIXED = QuantizeOptions(
    calibration_method="minmax", scope="compute", processor="vnni", corrections=("none",)
)
"""Leaves no choice, so nothing is searched."""
NOWHERE = Artifact(
    path=Path("q"), format="onnx", precision="int8", inputs=(), outputs=(), sha256=""
)


def point(name: str, time_ratio: float | None, drop: float | None, sqnr_db: float = 30) -> Point:
    lost = None if drop is None else Interval(value=drop, low=drop, high=drop)
    return Point(name, Variant((), "minmax"), NOWHERE, sqnr_db, drop=lost, time_ratio=time_ratio)


# pareto


def test_pareto_keeps_what_nothing_beats_in_both() -> None:
    points = [
        point("slow and good", 0.9, 0.01),
        point("fast and bad", 0.3, 0.2),
        point("beaten in both", 0.95, 0.05),
        point("between", 0.5, 0.1),
        point("as fast as between but worse", 0.5, 0.15),
        point("not scored", 0.1, None),
        point("not timed", None, 0.0),
    ]
    names = [p.name for p in pareto(points)]
    assert names == ["fast and bad", "between", "slow and good", "not timed"]
    assert pareto([]) == []


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1))
def test_pareto_by_its_definition(pairs: list[tuple[int, int]]) -> None:
    best = pareto([point(str(n), float(t), float(d)) for n, (t, d) in enumerate(pairs)])
    kept = [pairs[int(p.name)] for p in best]
    beaten = {(t, d) for t, d in pairs for u, e in pairs if u <= t and e <= d and (u, e) != (t, d)}
    assert kept == sorted(set(pairs) - beaten)


# search, on known times and scores


@dataclass
class fake_lab:  # noqa: N801 - as fakes are named
    """A lab where times and losses are known, by the candidate's nodes and method."""

    times: Mapping[tuple[str, ...], float]
    sqnr: Mapping[str, float]
    drops: Mapping[str, float] = field(default_factory=dict)
    promise: Any = None
    points: list[Point] = field(default_factory=list)
    scored_names: list[str] = field(default_factory=list)

    def talk(self, text: str, done: int, total: int) -> None:
        pass

    def try_out(self, name: str, variant: Variant) -> Point | None:
        if math.isnan(self.sqnr[name]):
            return None
        self.points.append(Point(name, variant, NOWHERE, self.sqnr[name]))
        return self.points[-1]

    def timed(self, points: Sequence[Point]) -> list[Point]:
        return [self.know(replace(p, time_ratio=self.times[p.variant.nodes])) for p in points]

    def scored(self, point: Point) -> Point:
        self.scored_names.append(point.name)
        lost = self.drops[point.name]
        return self.know(replace(point, drop=Interval(value=lost, low=lost, high=lost)))

    def keeps(self, point: Point) -> bool:
        assert point.drop
        return point.drop.value <= 0.01

    def know(self, point: Point) -> Point:
        self.points = [point if p.name == point.name else p for p in self.points]
        return point


FEW, MANY = ("a",), ("a", "b")


def searched(
    times: tuple[float, float], sqnr: tuple[float, ...], drops: tuple[float, ...] = ()
) -> tuple[Point, fake_lab]:
    """Two sets of nodes with two methods each: few-x, few-y, many-x, many-y."""
    names = ["few-x", "few-y", "many-x", "many-y"]
    fake = fake_lab(
        dict(zip((FEW, MANY), times, strict=True)),
        dict(zip(names, sqnr, strict=True)),
        dict(zip(names, drops, strict=False)),
        promise=drops or None,
    )
    nodes = (FEW, FEW, MANY, MANY)
    candidates = {n: Variant(k, "minmax") for n, k in zip(names, nodes, strict=True)}
    return search(fake, candidates), fake  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("times", "sqnr", "best"),
    [
        ((0.7, 0.5), (30, 31, 30.5, 29), "many-x"),  # faster, and within 1 dB of the best
        ((0.7, 0.5), (30, 31, 29, 28), "few-y"),  # faster, but 2 dB off
        ((0.50, 0.51), (30, 30.5, 30.9, 31), "many-y"),  # equal speed: the most faithful
        ((0.50, 0.51), (30, 31, 30.9, 30.8), "few-y"),
        ((0.50, 0.60), (30, 30.2, 31, 31), "few-y"),
        ((0.7, 0.5), (30, math.nan, math.nan, 29.5), "many-y"),  # NaN is no candidate
    ],
)
def test_without_a_promise_the_fastest_of_the_faithful(
    times: tuple[float, float], sqnr: tuple[float, ...], best: str
) -> None:
    assert searched(times, sqnr)[0].name == best


@pytest.mark.parametrize(
    ("times", "drops", "best"),
    [
        ((0.7, 0.5), (0, 0, 0.005, 0), "many-x"),  # the first of the fastest that keeps it
        ((0.7, 0.5), (0, 0, 0.5, 0.005), "many-y"),
        ((0.5, 0.7), (0.5, 0.005, 0, 0), "few-y"),
    ],
)
def test_with_a_promise_the_fastest_that_keeps_it(
    times: tuple[float, float], drops: tuple[float, ...], best: str
) -> None:
    found, _ = searched(times, (31, 30, 31, 30), drops)
    assert found.name == best
    assert found.drop
    assert found.time_ratio == min(times)


def test_a_hopeless_method_is_not_scored() -> None:
    found, fake = searched((0.5, 0.505), (31, 20.5, 31, 30), (0.5, 0.005, 0, 0))
    assert found.name == "many-x"
    assert fake.scored_names == ["few-x", "many-x"]


def test_all_nan_is_an_honest_no() -> None:
    with pytest.raises(AnswerIsNo, match="every quantized candidate gives NaN"):
        searched((1, 1), (math.nan,) * 4)


@dataclass
class fake_mixed_lab(fake_lab):  # noqa: N801
    """A lab where the promise is kept once all bad nodes are in float, and each node saves time."""

    bad: frozenset[str] = frozenset()
    float_score: Any = field(
        default_factory=lambda: SimpleNamespace(score=Interval(value=1, low=1, high=1))
    )

    def try_out(self, name: str, variant: Variant) -> Point:
        if not variant.nodes:
            raise AnswerIsNo("0 of 1,200 multiply-accumulates could be quantized", hint="")
        self.points.append(Point(name, variant, NOWHERE, 30))
        return self.points[-1]

    def timed(self, points: Sequence[Point]) -> list[Point]:
        ratios = [1 - len(p.variant.nodes) / 100 for p in points]
        return [self.know(replace(p, time_ratio=r)) for p, r in zip(points, ratios, strict=True)]

    def scored(self, point: Point) -> Point:
        self.scored_names.append(point.name)
        lost = float(len(self.bad & set(point.variant.nodes)))
        return self.know(replace(point, drop=Interval(value=lost, low=lost, high=lost)))


TWELVE = tuple(f"n{number}" for number in range(12))
KEPT = Promise(None, "cosine", max_drop=0.01)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 11])
def test_no_more_nodes_than_needed_go_back_to_float(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The damage is known in part only: the bad nodes are the first by noise for work."""
    order = np.random.default_rng(count).permutation(12)
    damages = [Damage(TWELVE[n], 10.0 + 2 * rank, 100, 0.9) for rank, n in enumerate(order)]
    monkeypatch.setattr(search_module, "damage", lambda *_: sorted(damages, key=lambda d: d.node))
    monkeypatch.setattr(search_module, "_saved", lambda *_: {})  # no clock
    bad = frozenset(TWELVE[n] for n in order[:count])
    fake = fake_mixed_lab({}, {}, promise=KEPT, bad=bad)
    found = search(fake, {"all-x": Variant(TWELVE, "minmax")})  # type: ignore[arg-type]
    assert set(found.variant.nodes) == set(TWELVE) - bad
    assert found.name == f"all-x+{count}_float"
    assert found.time_ratio == pytest.approx(1 - (12 - count) / 100)
    assert len(fake.scored_names) <= 8


def test_what_a_node_saves_is_its_time_and_by_its_work_where_it_has_none() -> None:
    rows = [Damage("a", 20, 100, 0.9), Damage("b", 10, 300, 0.9), Damage("c", 5, 200, 0.9)]
    assert [row.noise for row in rows[:2]] == pytest.approx([0.01, 0.1])
    assert _worth(rows, {"a": 6, "b": 10}) == pytest.approx({"a": 6, "b": 10, "c": 8})
    assert _worth(rows, {"a": -2, "b": 12})["a"] == pytest.approx(10 / 2 / 20)
    assert _worth(rows, {"a": -2, "b": 1}) == {"a": 100, "b": 300, "c": 200}
    assert _worth(rows, {}) == {"a": 100, "b": 300, "c": 200}


@pytest.mark.parametrize(("mixed_wins", "share"), [(True, 0.5), (False, 0.89)])
def test_a_mixed_model_must_be_faster_than_the_slower_one_that_keeps_the_promise(
    mixed_wins: bool, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`many` is fastest and fails; `few` keeps the promise in 0.8 of the float model's time."""
    few = TWELVE[:11]
    fake = fake_mixed_lab({}, {}, promise=KEPT, bad=frozenset(TWELVE[11:]))
    damages = [Damage(n, 10.0 if n == "n11" else 40.0, 100, 0.9) for n in TWELVE]
    monkeypatch.setattr(search_module, "damage", lambda *_: damages)
    monkeypatch.setattr(search_module, "_saved", lambda *_: {})  # no clock

    def timed(points: Sequence[Point]) -> list[Point]:
        known = {"many-x": 0.4, "few-x": 0.8, "many-x+1_float": share}
        return [fake.know(replace(p, time_ratio=known[p.name])) for p in points]

    monkeypatch.setattr(fake, "timed", timed)
    candidates = {"many-x": Variant(TWELVE, "minmax"), "few-x": Variant(few, "minmax")}
    found = search(fake, candidates)  # type: ignore[arg-type]
    assert found.name == ("many-x+1_float" if mixed_wins else "few-x")


# corrections


@dataclass
class fake_mending_lab(fake_lab):  # noqa: N801
    """A lab where times are known by name; what is not named takes as long as the float model."""

    slow: Mapping[str, float] = field(default_factory=dict)

    def timed(self, points: Sequence[Point]) -> list[Point]:
        ratios = [self.slow.get(p.name, 1.0) for p in points]
        return [
            self.know(replace(p, time_ratio=r, timed_as=p.name))
            for p, r in zip(points, ratios, strict=True)
        ]


FIRST: Correction = "cross_layer_equalization"
SECOND: Correction = "bias_correction"
SMOOTH: Correction = "smooth_quant"
STRONG: Correction = "smooth_quant_strong"


def mended(
    sqnr: Mapping[str, float],
    *corrections: Correction,
    slow: Mapping[str, float] | None = None,
    drops: Mapping[str, float] | None = None,
) -> tuple[Point, fake_mending_lab]:
    """One candidate `x`; the others are named by what is added to it."""
    known = {"x": 30.0} | {f"x+{name}": value for name, value in sqnr.items()}
    lost = {"x": 0.5} | {f"x+{name}": value for name, value in (drops or {}).items()}
    slower = {f"x+{name}": value for name, value in (slow or {}).items()}
    promise = KEPT if drops else None
    fake = fake_mending_lab({}, known, lost, promise=promise, slow=slower)
    return search(fake, {"x": Variant(FEW, "minmax")}, corrections), fake  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sqnr", "stay"),
    [
        ({FIRST: 30.1, SECOND: 30.1}, ()),  # too little to count
        ({FIRST: 29, SECOND: 31}, (SECOND,)),
        ({FIRST: 31, f"{FIRST}+{SECOND}": 32}, (FIRST, SECOND)),  # one upon the other
        ({FIRST: 31, f"{FIRST}+{SECOND}": 30.5}, (FIRST,)),
        ({FIRST: math.nan, SECOND: 30.3}, (SECOND,)),
    ],
)
def test_a_correction_stays_only_where_it_helps(
    sqnr: Mapping[str, float], stay: tuple[Correction, ...]
) -> None:
    found, fake = mended(sqnr, FIRST, SECOND)
    assert found.variant.corrections == stay
    assert found.name == "+".join(("x", *stay))
    tried = {f"x+{name}" for name, value in sqnr.items() if not math.isnan(value)}
    assert {p.name for p in fake.points} == {"x"} | tried
    assert all(p.time_ratio == 1 and p.timed_as == "x" for p in fake.points)


@pytest.mark.parametrize(
    ("gain_db", "time_ratio", "stays"),
    [(0.1, 1.0, False), (0.5, 1.0, True), (0.5, 1.5, False), (1.5, 1.5, True), (0.5, 1.02, True)],
)
def test_smoothing_that_slows_the_model_has_to_give_more(
    gain_db: float, time_ratio: float, *, stays: bool
) -> None:
    found, _ = mended({SMOOTH: 30 + gain_db}, SMOOTH, slow={SMOOTH: time_ratio})
    assert found.variant.corrections == ((SMOOTH,) if stays else ())
    assert found.time_ratio == (time_ratio if stays else 1)


@pytest.mark.parametrize(("strong_db", "stays"), [(31.1, SMOOTH), (31.5, STRONG)])
def test_the_second_strength_of_smoothing_takes_the_place_of_the_first(
    strong_db: float, stays: Correction
) -> None:
    found, _ = mended({SMOOTH: 31, STRONG: strong_db}, SMOOTH, STRONG)
    assert found.variant.corrections == (stays,)
    assert found.name == f"x+{stays}"


@pytest.mark.parametrize(
    ("drops", "stay", "scored"),
    [
        ({FIRST: 0.005}, (FIRST,), 2),  # the promise is kept: no more is tried
        ({FIRST: 0.6, SECOND: 0.01}, (SECOND,), 3),
        ({FIRST: 0.4, f"{FIRST}+{SECOND}": 0.009}, (FIRST, SECOND), 3),
        ({FIRST: 0.5, SECOND: 0.01}, (SECOND,), 3),  # as much lost is no help
    ],
)
def test_with_a_promise_less_of_the_score_must_be_lost(
    drops: Mapping[str, float], stay: tuple[Correction, ...], scored: int
) -> None:
    sqnr = dict.fromkeys([FIRST, SECOND, f"{FIRST}+{SECOND}"], 10.0)  # not what counts
    found, fake = mended(sqnr, FIRST, SECOND, drops=drops)
    assert found.variant.corrections == stay
    assert len(fake.scored_names) == scored


def test_what_keeps_the_promise_is_not_corrected() -> None:
    fake = fake_mending_lab({}, {"x": 30}, {"x": 0.0}, promise=KEPT)
    found = search(fake, {"x": Variant(FEW, "minmax")}, (FIRST,))  # type: ignore[arg-type]
    assert [p.name for p in fake.points] == [found.name] == ["x"]


# search, on real models

PLANTED = """(float[N,8] x) => (float[N,4] y) {
    [first] h = Gemm(x, w, b)
    g = Relu(h)
    s = Mul(g, loud)
    [bad] t = MatMul(s, deaf)
    r = Relu(t)
    [last] y = Gemm(r, v)
}"""
"""One channel of `s` is a million times louder than the others, and `bad` does not listen to it."""


def planted(folder: Path, count: int = 40) -> tuple[Artifact, Dataset]:
    loud = np.ones(8, np.float32)
    loud[3] = 1e6
    deaf = normal(8, 8, seed=2)
    deaf[3] = 0
    model = parsed(
        PLANTED, w=normal(8, 8), b=normal(8), loud=loud, deaf=deaf, v=normal(8, 4, seed=3)
    )
    return stored(model, folder, x=normal(count, 8, seed=4))


def promised(folder: Path, max_drop: float) -> Promise:
    """Data of its own, on which the outputs must stay near the float model's."""
    np.savez(folder / "evaluation.npz", x=normal(40, 8, seed=5))
    return Promise(open_dataset(folder / "evaluation.npz"), "cosine", max_drop)


def test_what_is_clearly_out_is_scored_on_a_part_and_what_is_kept_on_all(tmp_path: Path) -> None:
    """The sequential test: half of the samples are far off in the plain candidate."""
    source, data = planted(tmp_path)
    np.savez(tmp_path / "evaluation.npz", x=normal(640, 8, seed=5))
    evaluated = open_dataset(tmp_path / "evaluation.npz")
    for metric, part in (("cosine", 80), (user_metric(tmp_path), 640)):
        made = quantize(
            source, FIXED, data=data, out=tmp_path / "q.onnx", force=True,
            promise=Promise(evaluated, metric, 0.01),
        )  # fmt: skip
        candidates = {c["name"]: c["scored_samples"] for c in made.facts["search"]["candidates"]}
        assert candidates == {"compute-minmax": part, "compute-minmax+1_float": 640}


def user_metric(folder: Path) -> str:
    """One number for all samples: no part of them can say no."""
    path = folder / "metric.py"
    path.write_text(
        "import numpy as np\n"
        "def near(outputs, target, reference):\n"
        "    a, b = outputs['y'], reference['y']\n"
        "    return 1 - float(np.linalg.norm(a - b) / np.linalg.norm(b)) ** 2\n"
    )
    return f"{path}:near"


def float_names(facts: Json) -> dict[str, str]:
    return {n["node"]: n["reason"] for n in facts["float_nodes"]}


def test_mixed_precision_puts_exactly_the_bad_node_back(tmp_path: Path) -> None:
    source, data = planted(tmp_path)
    promise = promised(tmp_path, 0.01)
    plain = quantize(source, FIXED, data=data, out=tmp_path / "plain.onnx")
    assert follow(source, plain, data, "ort-cpu") < 5
    mixed = quantize(source, FIXED, data=data, out=tmp_path / "q.onnx", promise=promise)
    assert float_names(mixed.facts)["bad"] == "in float by measurement"
    assert mixed.facts["quantized_operators"]["Gemm"] == 2
    assert mixed.facts["compute_nodes_quantized"] == mixed.facts["compute_nodes"] - 1
    assert follow(source, mixed, data, "ort-cpu") > 25
    found = mixed.facts["search"]
    assert found["chosen"]["name"] == mixed.facts["candidate"] == "compute-minmax+1_float"
    assert found["chosen"]["drop"] <= 0.01
    assert found["chosen"]["time_ratio"] > 0
    assert found["float_score"] == 1.0
    assert {c["name"]: c["drop"] <= 0.01 for c in found["candidates"]} == {
        "compute-minmax": False,
        "compute-minmax+1_float": True,
    }


def test_a_promise_that_cannot_be_kept_is_a_no_with_what_was_tried(tmp_path: Path) -> None:
    source, data = planted(tmp_path)
    promise = promised(tmp_path, 0.0)
    with pytest.raises(AnswerIsNo) as caught:
        quantize(source, FIXED, data=data, out=tmp_path / "q.onnx", promise=promise)
    told = str(caught.value)
    assert "no INT8 model keeps cosine within 0 of 1" in told
    assert "allow more with --max-drop, or deploy the float model" in caught.value.hint
    assert "the nearest is compute-minmax+" in told
    nearest = told.split("the nearest is ")[1].split(",", maxsplit=1)[0]
    hint = caught.value.hint
    assert "was tried: compute-minmax: loses " in hint
    assert f"{nearest}: loses " in hint
    assert caught.value.facts["nearest"]["name"] == nearest
    tried = {point["name"] for point in caught.value.facts["candidates"]}
    assert {nearest, *caught.value.facts["pareto"]} <= tried
    assert not (tmp_path / "q.onnx").exists()


def test_a_relative_promise_is_a_share_of_the_float_score() -> None:
    score = SimpleNamespace(score=Interval(value=0.5, low=0.4, high=0.6))
    promise = Promise(None, "top1", max_drop=0.02, relative=True)  # type: ignore[arg-type]
    assert promise.limit(score) == pytest.approx(0.01)  # type: ignore[arg-type]
    assert replace(promise, relative=False).limit(score) == 0.02  # type: ignore[arg-type]


def test_too_few_samples_for_a_promise_are_refused(tmp_path: Path) -> None:
    source, data = planted(tmp_path, 7)
    promise = promised(tmp_path, 0.5)
    with pytest.raises(InputError, match="7 samples, too few to choose on"):
        quantize(source, FIXED, data=data, out=tmp_path / "q.onnx", promise=promise)


def test_of_equal_speed_the_most_faithful_method_is_taken(tmp_path: Path) -> None:
    model = parsed("(float[N,64] x) => (float[N,8] y) { y = MatMul(x, w) }", w=normal(64, 8))
    x = np.random.default_rng(0).standard_t(3, (200, 64)).astype(np.float32)
    x[0, 0] = 300  # makes minmax coarse, on one calibration sample
    source, data = stored(model, tmp_path, x=x)
    options = QuantizeOptions(scope="compute", processor="vnni", corrections=("none",))
    made = quantize(source, options, data=data, out=tmp_path / "q.onnx")
    found = made.facts["search"]
    sqnr = {c["name"]: c["sqnr_db"] for c in found["candidates"]}
    assert len(sqnr) == 5
    assert found["chosen"]["sqnr_db"] == max(sqnr.values()) > sqnr["compute-minmax"] + 6
    assert found["held_back_samples"] == 200 // 6
    assert len({c["time_ratio"] for c in found["candidates"]}) == 1  # equal nodes, one timing
    held_db = found["chosen"]["sqnr_db"]
    assert made.facts["calibration_method"] == found["chosen"]["name"].removeprefix("compute-")
    assert abs(follow(source, made, data.split(6)[1], "ort-cpu") - held_db) < 0.5


def test_few_samples_leave_no_choice_and_take_the_standard(tmp_path: Path) -> None:
    source, data = planted(tmp_path, 7)
    made = quantize(source, QuantizeOptions(), data=data, out=tmp_path / "q.onnx")
    assert made.facts["candidate"] == "residual-minmax"
    assert "search" not in made.facts


def test_a_fixed_batch_larger_than_what_is_held_back(tmp_path: Path) -> None:
    model = parsed("(float[8,6] x) => (float[8,5] y) { y = MatMul(x, w) }", w=normal(6, 5))
    source, data = stored(model, tmp_path, x=normal(24, 6))
    made = quantize(source, QuantizeOptions(), data=data, out=tmp_path / "q.onnx")
    assert follow(source, made, data, "ort-cpu") > 20


# sound

CHAIN = """(float[N,6] x) => (float[N,6] y) {
    [one] a = MatMul(x, u) b = Relu(a)
    [two] c = MatMul(b, v) d = Relu(c)
    [three] y = MatMul(d, w)
}"""


def chain(folder: Path) -> tuple[Artifact, Dataset]:
    weights = {name: normal(6, 6, seed=n) for n, name in enumerate("uvw")}
    return stored(parsed(CHAIN, **weights), folder, x=normal(12, 6))


def integer_nodes(artifact: Artifact) -> set[str]:
    """Nodes that read integers."""
    nodes = onnx.load(artifact.path).graph.node
    return {n.name for n in nodes if any(i.endswith("_dequantized") for i in n.input)}


def fake_refusal(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[set[str]], bool], *where: Any
) -> None:
    """A runtime that does not load a model in which these nodes compute on integers."""

    def fake_open(artifact: Artifact, name: str, options: SessionOptions | None = None) -> Session:
        if broken(integer_nodes(artifact)):
            raise InputError(f"{artifact.path}: ONNX Runtime does not load it", hint="none")
        return open_session(artifact, name, options)

    for module in where:
        monkeypatch.setattr(module, "open_session", fake_open)


@pytest.mark.parametrize("guilty", [{"two"}, {"one", "three"}], ids=["one", "two"])
def test_nodes_that_break_the_model_stay_in_float_and_are_named(
    guilty: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = chain(tmp_path)
    fake_refusal(monkeypatch, lambda nodes: bool(nodes & guilty), sound)
    here = FIXED.model_copy(update={"processor": "this"})
    made = quantize(source, here, data=data, out=tmp_path / "q.onnx")
    assert integer_nodes(made) == {"one", "two", "three"} - guilty
    told = float_names(made.facts)
    assert {n for n in told if "breaks" in told[n]} == guilty
    assert {told[n] for n in guilty} == {"breaks the model: ONNX Runtime does not load it"}
    assert made.facts["compute_nodes_quantized"] == 3 - len(guilty)
    assert follow(source, made, data, "ort-cpu") > 20


def test_infinite_outputs_are_a_fault_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, data = chain(tmp_path)

    class FakeSession:
        """A session whose output is infinite for the last sample."""

        def __init__(self, artifact: Artifact, name: str) -> None:
            self.real = open_session(artifact, name)
            self.inputs, self.outputs = self.real.inputs, self.real.outputs
            self.bad = "two" in integer_nodes(artifact)
            self.calls = 0

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def run(self, feed: Feed) -> dict[str, Array]:
            self.calls += 1
            factor = np.inf if self.bad and self.calls == 12 else 1
            return {"y": self.real.run(feed)["y"] * np.float32(factor)}

    monkeypatch.setattr(sound, "open_session", FakeSession)
    made = quantize(source, FIXED, data=data, out=tmp_path / "q.onnx")
    assert float_names(made.facts)["two"] == (
        "breaks the model: output 'y' has NaN or infinite values"
    )


def test_where_no_node_alone_is_to_blame_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = chain(tmp_path)
    fake_refusal(monkeypatch, lambda nodes: len(nodes) == 3, sound)
    with pytest.raises(StageError, match="the quantized model is broken: ONNX Runtime does not"):
        quantize(source, FIXED, data=data, out=tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def test_where_each_node_breaks_the_model_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = chain(tmp_path)
    fake_refusal(monkeypatch, bool, sound)
    with pytest.raises((StageError, AnswerIsNo), match="does not load"):
        quantize(source, FIXED, data=data, out=tmp_path / "q.onnx")


def test_a_node_that_breaks_the_model_is_left_out_of_a_search_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = chain(tmp_path)
    fake_refusal(monkeypatch, lambda nodes: "two" in nodes, sound, lab)
    options = QuantizeOptions(scope="compute", processor="vnni")
    made = quantize(source, options, data=data, out=tmp_path / "q.onnx")
    assert integer_nodes(made) == {"one", "three"}
    assert "does not load" in float_names(made.facts)["two"]


def test_what_was_judged_is_what_is_written(tmp_path: Path) -> None:
    source, data = chain(tmp_path)
    made = quantize(source, QuantizeOptions(), data=data, out=tmp_path / "q.onnx")
    chosen = made.facts["search"]["chosen"]
    assert chosen["size_bytes"] == made.path.stat().st_size
    assert chosen["name"] == made.facts["candidate"]


def test_with_too_few_samples_it_says_that_nothing_was_chosen(tmp_path: Path) -> None:
    source, data = chain(tmp_path)
    made = quantize(source, QuantizeOptions(), data=data.first(6), out=tmp_path / "q.onnx")
    assert any("6 samples are too few to choose on" in w for w in made.facts["warnings"])
    assert "search" not in made.facts


# the account

SMALL = f"""(float[N,3,8,8] x) => (float[N,5] y) {{
    [conv] h = {CONV}(x, w, b)
    r = Relu(h)
    f = Flatten(r)
    e = Elu(f)
    [gemm] y = Gemm(e, v, c)
}}"""
SMALL_WEIGHTS = {"w": normal(4, 3, 3, 3), "b": normal(4), "v": normal(256, 5), "c": normal(5)}


def test_the_facts_count_multiply_accumulates_and_name_every_node(tmp_path: Path) -> None:
    source, data = stored(parsed(SMALL, **SMALL_WEIGHTS), tmp_path, x=normal(12, 3, 8, 8))
    made = quantize(source, FIXED, data=data, out=tmp_path / "q.onnx")
    facts = made.facts
    assert facts["multiply_accumulates"] == 8 * 8 * 4 * 3 * 9 + 256 * 5 == 8192
    assert facts["multiply_accumulates_quantized"] == 8192
    assert facts["quantized_operators"] == {"Conv": 1, "Relu": 1, "Gemm": 1}
    assert [(n["operator"], n["reason"]) for n in facts["float_nodes"]] == [
        ("Flatten", "not among the operators"),
        ("Elu", "not among the operators"),
    ]
    assert set(facts["ranges"]) == {"x", "r", "e"} | set(facts["ranges"]) & {"y"}
    only = FIXED.model_copy(update={"keep_float": ("gemm",)})
    part = quantize(source, only, data=data, out=tmp_path / "part.onnx").facts
    assert part["multiply_accumulates_quantized"] == 6912
    assert float_names(part)["gemm"] == "left out by request"


@pytest.mark.parametrize("target", ["ort-cpu", "openvino", "tensorrt"])
@pytest.mark.parametrize("text", [PLANTED, SMALL, CHAIN], ids=["planted", "small", "chain"])
def test_float_nodes_and_quantized_operators_are_all_nodes(
    target: str, text: str, tmp_path: Path
) -> None:
    shapes = {"w": (8, 8), "b": (8,), "loud": (8,), "deaf": (8, 8), "v": (8, 4)}
    constants: dict[str, Array] = {n: normal(*s) for n, s in shapes.items() if n in text}
    samples = normal(12, 8)
    if text is SMALL:
        constants, samples = SMALL_WEIGHTS, normal(12, 3, 8, 8)
    elif text is CHAIN:
        constants, samples = {n: normal(6, 6) for n in "uvw"}, normal(12, 6)
    source, data = stored(parsed(text, **constants), tmp_path, x=samples)
    options = QuantizeOptions(target=target, calibration_method="minmax", scope="residual")
    facts = quantize(source, options, data=data, out=tmp_path / "q.onnx").facts
    left = Counter(n["operator"] for n in facts["float_nodes"])
    have = Counter(n.op_type for n in prepare(source.path)[0].graph.node)
    assert left + Counter(facts["quantized_operators"]) == have


ATTENTION = """(float[N,4,4] x, float[N,4,4] gone) => (float[N,4,4] y) {
    mask = Mul(gone, lowest)
    s = MatMul(x, w) [masked] t = Add(s, mask) p = Softmax(t) y = MatMul(p, x)
}"""
LARGEST = np.finfo(np.float32).max


def test_masks_are_the_reason_of_a_node_in_float(tmp_path: Path) -> None:
    gone = np.zeros((12, 4, 4), np.float32)
    gone[:, :, 3] = 1
    model = parsed(ATTENTION, w=normal(4, 4), lowest=np.array([-LARGEST]))
    source, data = stored(model, tmp_path, x=normal(12, 4, 4), gone=gone)
    options = FIXED.model_copy(update={"scope": "residual"})
    made = quantize(source, options, data=data, out=tmp_path / "q.onnx")
    assert float_names(made.facts)["masked"] == "'mask' holds masks or infinite values"
    assert made.facts["quantized_operators"] == {"MatMul": 2}
    assert "mask" not in made.facts["ranges"]
    assert follow(source, made, data, "ort-cpu") > 20


def test_an_input_of_masks_and_zeros(tmp_path: Path) -> None:
    text = """(float[N,4,4] x, float[N,4,4] mask) => (float[N,4,4] y) {
        s = MatMul(x, w) t = Add(s, mask) p = Softmax(t) y = MatMul(p, x)
    }"""
    mask = np.zeros((12, 4, 4), np.float32)
    mask[:6, :, 3] = -LARGEST
    source, data = stored(parsed(text, w=normal(4, 4)), tmp_path, x=normal(12, 4, 4), mask=mask)
    options = FIXED.model_copy(update={"scope": "residual"})
    made = quantize(source, options, data=data, out=tmp_path / "q.onnx")
    assert follow(source, made, data, "ort-cpu") > 20


BRANCHES = """y = If(c) <
    then_branch = t () => (float[N,2] p) { p = MatMul(x, w) },
    else_branch = e () => (float[N,2] q) { q = MatMul(x, v) }
>"""
BRANCH_WEIGHTS = {"w": normal(3, 2), "v": normal(3, 2), "zero": np.array(0, np.float32)}
CONDITION = "s = ReduceMax<keepdims=0>(x) c = Greater(s, zero)"


def test_compute_nodes_in_branches_are_told(tmp_path: Path) -> None:
    text = f"""(float[N,3] x) => (float[N,2] y, float[N,3] z) {{
        {CONDITION} {BRANCHES} z = MatMul(x, u)
    }}"""
    model = parsed(text, u=normal(3, 3), **BRANCH_WEIGHTS)
    source, data = stored(model, tmp_path, x=normal(12, 3))
    facts = quantize(source, FIXED, data=data, out=tmp_path / "q.onnx").facts
    assert facts["compute_nodes_in_subgraphs"] == 2
    assert facts["compute_nodes"] == 3
    assert facts["compute_nodes_quantized"] == 1
    assert facts["multiply_accumulates_quantized"] == 9


def test_where_all_lies_in_branches_the_answer_is_no(tmp_path: Path) -> None:
    text = f"(float[N,3] x) => (float[N,2] y) {{ {CONDITION} {BRANCHES} }}"
    source, data = stored(parsed(text, **BRANCH_WEIGHTS), tmp_path, x=normal(12, 3))
    with pytest.raises(AnswerIsNo) as caught:
        quantize(source, FIXED, data=data, out=tmp_path / "q.onnx")
    assert "0 of 0 multiply-accumulates" in str(caught.value)
    assert "0 of 2 compute nodes, 2 of them in branches or loops" in str(caught.value)


# TensorRT


@pytest.mark.skipif(
    unavailable("tensorrt-rtx") is not None, reason=str(unavailable("tensorrt-rtx"))
)
def test_tensorrt_builds_a_residual_network_whose_convolutions_read_int8(tmp_path: Path) -> None:
    text = f"""(float[N,3,8,8] x) => (float[N,5] y) {{
        a = {CONV}(x, w, b) s = Relu(a)
        c = {CONV}(s, v) d = Add(c, s) r = Relu(d)
        p = GlobalAveragePool(r) f = Flatten(p) y = Gemm(f, u)
    }}"""
    weights = {"w": normal(4, 3, 3, 3), "b": normal(4), "v": normal(4, 4, 3, 3), "u": normal(4, 5)}
    source, data = stored(parsed(text, **weights), tmp_path, x=normal(12, 3, 8, 8))
    options = QuantizeOptions(target="tensorrt", calibration_method="minmax")
    int8 = quantize(source, options, data=data, out=tmp_path / "q.onnx")
    shapes = BuildOptions(flavour="tensorrt-rtx", opt_shapes=("x:1x3x8x8",))
    made = build(int8, shapes, out=tmp_path / "q.engine")
    layers = made.facts["network_layers"]
    assert layers["convolution"] == 2
    graph = Graph(onnx.load(int8.path))
    pairs = Counter(n.op_type for n in graph.nodes.values())
    assert layers["quantize"] == pairs["QuantizeLinear"]
    assert layers["dequantize"] == pairs["DequantizeLinear"]
    assert _made_by_dequantize(int8.path) == {"Conv": [True, True]}


def _made_by_dequantize(path: Path) -> dict[str, list[bool]]:
    """Whether both operands of each convolution of TensorRT's network come from int8."""
    trt = importlib.import_module("tensorrt_rtx")
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, log).parse_from_file(str(path))
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    makers = {one.get_output(i).name: one for one in layers for i in range(one.num_outputs)}

    def from_int8(tensor: Any) -> bool:
        maker = makers.get(tensor.name)
        return (
            maker is not None
            and maker.type == trt.LayerType.DEQUANTIZE
            and maker.get_input(0).dtype == trt.int8
        )

    convolutions = [one for one in layers if one.type == trt.LayerType.CONVOLUTION]
    return {
        "Conv": [all(from_int8(one.get_input(i)) for i in (0, 1)) for one in convolutions],
    }


def test_a_no_tells_too_that_the_data_looks_unlike(tmp_path: Path) -> None:
    source, data = planted(tmp_path)
    np.savez(tmp_path / "evaluation.npz", x=255 * normal(40, 8, seed=5))
    promise = Promise(open_dataset(tmp_path / "evaluation.npz"), "cosine", 0.0)
    with pytest.raises(AnswerIsNo) as caught:
        quantize(source, FIXED, data=data, out=tmp_path / "q.onnx", promise=promise)
    assert "preprocessed alike?" in "".join(caught.value.notes)


LSTM_TEXT = """(float[N,12,16] x) => (float[N,2] y) {
    s = Transpose<perm=[1,0,2]>(x)
    o, h = LSTM<hidden_size=64>(s, w, r)
    t = Squeeze(h, axes)
    y = Gemm(t, v, c)
}"""
LSTM_CONSTANTS = {
    "w": normal(1, 256, 16), "r": normal(1, 256, 64), "axes": np.array([0]), "v": normal(64, 2),
    "c": normal(2),
}  # fmt: skip


def test_a_model_of_which_one_product_beside_an_lstm_is_quantized_is_a_no(tmp_path: Path) -> None:
    source, data = stored(parsed(LSTM_TEXT, **LSTM_CONSTANTS), tmp_path, x=normal(12, 12, 16))
    with pytest.raises(AnswerIsNo) as caught:
        quantize(source, FIXED, data=data, out=tmp_path / "q.onnx")
    work = 12 * 256 * (16 + 64) + 128
    assert f"128 of {work:,} multiply-accumulates could be quantized" in str(caught.value)
    assert not (tmp_path / "q.onnx").exists()
    asked = FIXED.model_copy(update={"op_types_to_quantize": ("Gemm",)})  # a part was asked for
    made = quantize(source, asked, data=data, out=tmp_path / "q.onnx")
    assert made.facts["multiply_accumulates_quantized"] == 128
    assert not any("quantized alone" in warning for warning in made.facts["warnings"])


@pytest.mark.parametrize("bad", [-3.4e38, -np.inf])
def test_masks_in_constants_ruin_no_range(bad: float, tmp_path: Path) -> None:
    text = f"""(float[N,3,8,8] x) => (float[N,4,8,8] y) {{
        h = {CONV}(x, w, b) a = Add(h, m) r = Relu(a) y = {CONV}(r, v)
    }}"""
    mask = np.zeros((1, 4, 8, 8), np.float32)
    mask[..., 0] = bad
    model = parsed(text, w=normal(4, 3, 3, 3), b=normal(4), m=mask, v=normal(4, 4, 3, 3))
    source, data = stored(model, tmp_path, x=normal(12, 3, 8, 8))
    here = FIXED.model_copy(update={"scope": "residual", "processor": "this"})
    made = quantize(source, here, data=data, out=tmp_path / "q.onnx")
    assert "masks or infinite" in " ".join(float_names(made.facts).values())
    assert follow(source, made, data, "ort-cpu") > 20


def test_a_name_that_is_taken_is_not_given_to_a_turned_constant(tmp_path: Path) -> None:
    text = f"""(float[N,3,8,8] x) => (float[N,4,8,8] y) {{
        h = {CONV}(x, w) s = Sub(h, c) y = Mul(s, s_sub)
    }}"""
    model = parsed(text, w=normal(4, 3, 3, 3), c=normal(4, 1, 1), s_sub=normal(4, 1, 1, seed=9))
    source, data = stored(model, tmp_path, x=normal(12, 3, 8, 8))
    here = FIXED.model_copy(update={"processor": "this"})
    made = quantize(source, here, data=data, out=tmp_path / "q.onnx")
    assert follow(source, made, data, "ort-cpu") > 20


@pytest.mark.parametrize("simulate", [False, True])
def test_scores_may_be_simulated_times_never(
    simulate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = chain(tmp_path)
    opened: list[SessionOptions] = []

    def noted(artifact: Artifact, name: str, options: SessionOptions) -> Session:
        opened.append(options)
        return open_session(artifact, name, options)

    monkeypatch.setattr(lab, "open_session", noted)
    shop = workshop.Workshop.open(
        source, FIXED.preset, data, op_types=["Gemm", "MatMul"], binned=False
    )
    here = lab.Lab(shop, "ort-cpu", data, None, tmp_path, lambda *_: None, simulate)
    made = here.try_out("x", Variant(("one", "two", "three"), "minmax"))
    assert made
    assert {options.simulate for options in opened} == {simulate}
    opened.clear()
    (timed,) = here.timed([made])
    assert timed.time_ratio
    assert {options.simulate for options in opened} == {False}


# what may be said of the chosen one


@pytest.mark.parametrize(
    ("ratio", "bounds", "claim"),
    [
        (0.8, (0.7, 0.9), "faster"),
        (0.8, (0.5, 1.1), "no difference"),
        (0.98, (0.97, 0.99), "no difference"),  # as another process may differ
        (1.02, (1.01, 1.03), "no difference"),
        (1.2, (1.1, 1.3), "slower"),
        (1.2, (0.9, 1.3), "no difference"),
    ],
)
def test_a_claim_of_speed_needs_its_interval_and_more_than_noise(
    ratio: float, bounds: tuple[float, float], claim: str
) -> None:
    timed = Point("x", Variant((), "minmax"), NOWHERE, 30, time_ratio=ratio, time_bounds=bounds)
    assert speed_claim(timed) == claim


@pytest.mark.parametrize(
    ("high", "told"),
    [
        (0.009, []),
        (0.02, ["about 9e+02 samples"]),  # 100 * (0.015 / 0.005) ** 2
        (math.inf, ["no number of them"]),
    ],
)
def test_a_promise_whose_interval_reaches_over_the_limit_is_doubted(
    high: float, told: list[str]
) -> None:
    at_limit = high == math.inf
    value = 0.01 if at_limit else 0.005
    drop = Interval(value=value, low=0, high=0.02 if at_limit else high)
    made = Point("x", Variant((), "minmax"), NOWHERE, 30, drop=drop, scored_samples=100)
    fake = SimpleNamespace(promise=KEPT, float_score=object(), backend="ort-cpu")
    doubts = findings.doubts(fake, made, "faster")  # type: ignore[arg-type]
    assert [next(t for t in told if t in doubt) for doubt in doubts] == told


SLOWER = (
    "NOT FASTER than the float model on ort-cpu: deploy that one there (of this one's time go "
    "70% QLinearConv, 20% Conv)"
)


@pytest.mark.parametrize(
    ("speed", "told"),
    [
        (None, ""),
        ("faster", ""),
        ("no difference", "no difference in speed from the float model on ort-cpu was measured"),
        ("slower", SLOWER),
    ],
)  # fmt: skip
def test_what_is_not_faster_is_warned_of_with_where_its_time_goes(
    speed: str | None, told: str
) -> None:
    fake = SimpleNamespace(
        promise=None,
        backend="ort-cpu",
        where_time_goes=lambda _: {"QLinearConv": 0.7, "Conv": 0.2},
    )
    made = Point("x", Variant((), "minmax"), NOWHERE, 30)
    assert findings.doubts(fake, made, speed) == [told] * bool(told)  # type: ignore[arg-type]
