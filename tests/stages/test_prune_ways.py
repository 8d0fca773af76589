"""Ways of choosing what to prune: importance, scope, steps, masks, heads, the table of times."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deploykit.backends.openvino import OpenVino
from deploykit.dataset import Dataset
from deploykit.errors import InputError, MissingError, UsageError
from deploykit.formats import torch_folder
from deploykit.formats.onnx_layer import LayerShape
from deploykit.stages.prune import PruneOptions, prune
from deploykit.stages.prune.masks import weakest_of_four
from deploykit.stages.prune.options import OBSERVED
from deploykit.stages.prune.search import _narrowed
from deploykit.stages.prune.surgeon import Surgeon
from deploykit.stages.prune.table import Table, fastest_block, shapes
from deploykit.stages.prune.widths import shares
from deploykit.values import Artifact
from tests.stages.test_prune import outputs, reasons, taken, widths


@pytest.fixture(scope="module")
def few(calibration: Dataset) -> Dataset:
    return calibration.first(64)


@pytest.mark.parametrize("importance", [*OBSERVED, "batch-norm"])
def test_each_importance_gives_a_model_that_comes_back(
    importance: str, teacher: Artifact, few: Dataset, tmp_path: Path
) -> None:
    options = PruneOptions(ratio=0.4, importance=importance)
    made = prune(teacher, options, data=few, out=tmp_path / "p")
    assert set(widths(made).values()) == {16, 32, 40}
    assert outputs(made)[0].shape == (4, 10)


@pytest.mark.parametrize("importance", OBSERVED)
def test_dead_channels_go_first(
    importance: str, teacher: Artifact, few: Dataset, tmp_path: Path
) -> None:
    """Channels that are zero on all data are found by whatever looks at data."""
    dead = [1, 4, 7, 8, 12, 17, 20, 23]
    module = torch_folder.load(teacher)
    norm = module.get_submodule("layers.0.bn1")
    with torch.no_grad():
        norm.weight[dead], norm.bias[dead] = 0.0, 0.0
    torch_folder.write(
        module,
        torch_folder.describe(teacher.path),
        torch_folder.factory_file(teacher.path, torch_folder.describe(teacher.path)),
        tmp_path / "dead",
    )
    source = teacher.model_copy(update={"path": tmp_path / "dead", "sha256": importance})
    options = PruneOptions(ratio=0.01, importance=importance, ratios={"layers.0.conv1": 1 / 3})
    made = prune(source, options, data=few, out=tmp_path / "p")
    gone = {root: channels for root, _, channels in torch_folder.describe(made.path).edits}
    assert gone == {"layers.0.conv1": tuple(dead)}
    assert torch.allclose(outputs(made)[0], outputs(source)[0], atol=1e-4)


def test_importance_on_data_without_data(teacher: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="taylor is seen on data"):
        prune(teacher, PruneOptions(ratio=0.3, importance="taylor"), out=tmp_path / "p")


def test_labels_that_are_no_classes(teacher: Artifact, few: Dataset, tmp_path: Path) -> None:
    feed, target = next(few.batches(64))
    np.savez(tmp_path / "bad.npz", **feed, target=np.asarray(target) + 9)
    from deploykit.dataset import open_dataset

    bad = open_dataset(tmp_path / "bad.npz")
    with pytest.raises(InputError, match="no classes of a model with 10 outputs"):
        prune(teacher, PruneOptions(ratio=0.3, importance="taylor"), data=bad, out=tmp_path / "p")


def test_over_all_layers_the_share_is_that_of_all_channels(
    teacher: Artifact, tmp_path: Path
) -> None:
    made = prune(teacher, PruneOptions(ratio=0.3, scope="global", round_to=1), out=tmp_path / "p")
    assert made.facts["ratio_reached"] == pytest.approx(0.3, abs=0.02)
    kept = [g["channels_after"] / g["channels_before"] for g in made.facts["pruned"]]
    assert max(kept) - min(kept) > 0.1


@given(steps=st.integers(1, 50), schedule=st.sampled_from(["linear", "cubic"]))
def test_a_schedule_rises_to_the_whole(steps: int, schedule: str) -> None:
    found = shares(PruneOptions(ratio=0.5, steps=steps, schedule=schedule))
    assert len(found) == steps
    assert found[-1] == 1
    assert all(a < b for a, b in itertools.pairwise((0.0, *found)))


def test_steps_reach_the_widths_of_one_step(teacher: Artifact, tmp_path: Path) -> None:
    one = prune(teacher, PruneOptions(ratio=0.5), out=tmp_path / "one")
    many = prune(teacher, PruneOptions(ratio=0.5, steps=3), out=tmp_path / "many")
    assert widths(many) == widths(one)
    edits = [len(torch_folder.describe(made.path).edits) for made in (one, many)]
    assert edits[1] > edits[0]


# Single weights


def test_the_share_of_weights_that_is_zero(teacher: Artifact, tmp_path: Path) -> None:
    options = PruneOptions(ratio=0.6, method="weights", scope="global", keep=("classifier",))
    made = prune(teacher, options, out=tmp_path / "p")
    module = torch_folder.load(made)
    names = torch_folder.describe(made.path).sparse
    weights = torch.cat([module.get_parameter(name).flatten() for name in names])
    assert float((weights == 0).float().mean()) == pytest.approx(0.6, abs=1e-3)
    assert "classifier.weight" not in names
    old = torch_folder.load(teacher)
    before = torch.cat([old.get_parameter(name).flatten() for name in names]).abs()
    assert before[weights == 0].max() <= before[weights != 0].min()
    assert "no dense engine faster" in made.facts["speed"]


def test_two_of_four_along_the_input_channels(teacher: Artifact, tmp_path: Path) -> None:
    made = prune(teacher, PruneOptions(method="2:4"), out=tmp_path / "p")
    module = torch_folder.load(made)
    names = torch_folder.describe(made.path).sparse
    for name in names:
        rows = module.get_parameter(name).movedim(1, -1)
        assert ((rows.reshape(*rows.shape[:-1], -1, 4) != 0).sum(-1) <= 2).all()
    assert reasons(made) == {"stem.0": "1 input channels are no multiple of 4"}
    assert made.facts["sparsity_reached"] == 0.5


@given(seed=st.integers(0, 999), rows=st.integers(1, 5), fours=st.integers(1, 4))
def test_the_two_weakest_of_four(seed: int, rows: int, fours: int) -> None:
    weight = torch.randn(rows, 4 * fours, 3, generator=torch.Generator().manual_seed(seed))
    gone = weakest_of_four(weight)
    for n, k, i in itertools.product(range(rows), range(fours), range(3)):
        four = weight[n, 4 * k : 4 * k + 4, i].abs()
        assert set(gone[n, 4 * k : 4 * k + 4, i].nonzero().flatten().tolist()) == set(
            four.argsort()[:2].tolist()
        )


# Heads


@pytest.mark.parametrize("counted", [True, False])
def test_heads_stay_whole_and_their_number_comes_back(counted: bool, tmp_path: Path) -> None:
    source = taken("counted_heads", tmp_path, counted=counted)
    made = prune(source, PruneOptions(ratio=0.5, keep=("block.out",)), out=tmp_path / "p")
    assert {widths(made)[f"block.{name}"] for name in "qkv"} == {16}
    gone = torch_folder.describe(made.path).edits[0][2]
    assert len(gone) == 16
    assert {i // 8 for i in gone} == {i // 8 for i in gone if set(range(i, i + 8)) & set(gone)}
    assert all(sum(j // 8 == head for j in gone) == 8 for head in {i // 8 for i in gone})
    block = torch_folder.load(made).block
    assert (block.num_heads, block.head_dim) == (2, 8)
    assert torch_folder.describe(made.path).attributes == {"block.num_heads": 2}
    again = prune(made, PruneOptions(ratio=0.5, keep=("block.out",)), out=tmp_path / "again")
    assert torch_folder.load(again).block.num_heads == 1


# For a speed-up


def test_the_damage_of_channels_is_the_change_that_their_removal_makes(
    teacher: Artifact, few: Dataset
) -> None:
    probe = few.matching(teacher.inputs)
    surgeon = Surgeon(torch_folder.load(teacher), teacher.inputs)
    group = next(g for g in surgeon.groups() if g.root == "layers.1.conv1")
    before = {k: v.clone() for k, v in surgeon.module.state_dict().items()}
    removals = [[], [0, 3], list(range(0, 40, 2))]
    damage = surgeon.damage(group, removals, probe)
    assert all(torch.equal(before[k], v) for k, v in surgeon.module.state_dict().items())
    assert damage[0] == 0 < damage[1] < damage[2]
    want = surgeon._collect(probe)
    assert surgeon.remove(group, removals[2]) is None
    change = (surgeon._collect(probe) - want).square().sum() / want.square().sum()
    assert damage[2] == pytest.approx(float(change), rel=1e-4)


def test_the_table_times_what_the_network_runs(teacher: Artifact) -> None:
    layers = shapes(torch_folder.load(teacher), teacher.inputs)
    assert layers["layers.1.conv1"] == LayerShape(
        operator="Conv", inputs=24, outputs=48, around=(28, 28), kernel=(3, 3), stride=(2, 2),
        padding=(1, 1), dilation=(1, 1),
    )  # fmt: skip
    assert layers["classifier"] == LayerShape(operator="MatMul", inputs=64, outputs=10, around=())


def test_a_layer_narrows_by_what_it_reads_and_writes() -> None:
    plain = LayerShape(operator="Conv", inputs=24, outputs=48, around=(8, 8), kernel=(3, 3))
    assert (_narrowed(plain, 8, 16).inputs, _narrowed(plain, 8, 16).outputs) == (16, 32)
    depthwise = plain.model_copy(update={"inputs": 48, "groups": 48})
    found = _narrowed(depthwise, 0, 16)
    assert (found.inputs, found.outputs, found.groups) == (32, 32, 32)


def test_a_table_knows_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenVino, "unavailable", lambda _: "openvino is not installed")
    with pytest.raises(MissingError, match="openvino cannot run here: openvino is not installed"):
        Table(PruneOptions(speedup=2, target="openvino"))


def test_the_fastest_block_is_taken() -> None:
    ticks = iter([0, 500_000, *itertools.chain(*((0, 3 * t) for t in (9, 7, 8, 5, 6, 9, 9)))])
    assert fastest_block(lambda: None, lambda: next(ticks)) == 5


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_widths_for_a_speedup(
    precision: str, teacher: Artifact, few: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a known latency, one for each multiply-accumulate, the widths reach the time."""
    from deploykit.stages.prune import table

    def fake_measured(layer: LayerShape, *_: object) -> float:
        return layer.inputs * layer.outputs * np.prod(layer.kernel) * np.prod(layer.around) / 1e3

    monkeypatch.setattr(table, "_measured", fake_measured)
    options = PruneOptions(speedup="2x", precision=precision)
    made = prune(teacher, options, data=few, out=tmp_path / "p")
    assert options.speedup == 2
    assert made.facts["layers_us_before"] / made.facts["layers_us_after"] >= 2
    grain = {"fp32": 8, "int8": 4}[precision]
    assert all(width % grain == 0 for width in widths(made).values())


@pytest.mark.parametrize(
    "options",
    [
        {}, {"ratio": 0.5, "speedup": 2}, {"method": "2:4", "ratio": 0.5},
        {"method": "weights", "speedup": 2}, {"speedup": 1}, {"speedup": "fast"},
        {"ratio": 0.5, "method": "weights", "importance": "taylor"},
        {"speedup": 2, "steps": 3},
    ],
)  # fmt: skip
def test_options_that_do_not_fit(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PruneOptions(**options)
