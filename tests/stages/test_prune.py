from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from deploykit import store
from deploykit.errors import InputError, StageError, UsageError
from deploykit.formats import torch_folder, torch_module
from deploykit.stages.prune import PruneOptions, kept_channels, prune
from deploykit.stages.take import TakeOptions, take
from deploykit.values import Artifact, TensorSpec, parse
from tests.stages import small_models

FACTORIES = Path(small_models.__file__)
IMAGES = (("images", "float32", (3, 8, 8)),)
NUMBERS = (("x", "float32", (16,)),)
TOKENS = (("tokens", "float32", ("length", 16)),)
BOTH = (*NUMBERS, ("words", "int64", (4,)))

INPUTS = {
    "mlp": NUMBERS, "residual": IMAGES, "depthwise": IMAGES, "grouped": IMAGES, "flattened": IMAGES,
    "concat_flattened": IMAGES, "squeeze_excite": IMAGES, "encoder": TOKENS, "attention": TOKENS,
    "counted_heads": TOKENS, "two_inputs": BOTH, "shuffled": IMAGES, "scaled": IMAGES,
    "used_twice": NUMBERS, "two_outputs": IMAGES, "tied": NUMBERS, "fixed_reshape": IMAGES,
    "picky": NUMBERS, "not_differentiable": NUMBERS, "breaks_in_training": NUMBERS,
}  # fmt: skip
PRUNABLE = [name for name in INPUTS if name != "counted_heads"][:14]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts that several tests look at and none changes."""
    return tmp_path_factory.mktemp("shelf")


def taken(name: str, folder: Path, **arguments: object) -> Artifact:
    """The artifact of a small model, with weights and statistics as of a trained one."""
    if found := store.read(folder / name):
        return found
    torch.manual_seed(0)
    model = getattr(small_models, name)(**arguments)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    weights = folder / f"{name}.pt"
    torch.save(model.state_dict(), weights)
    options = TakeOptions(
        factory=f"{FACTORIES}:{name}",
        arguments=arguments,
        weights=weights,
        inputs=tuple(TensorSpec(name=n, dtype=d, shape=("batch", *s)) for n, d, s in INPUTS[name]),
    )
    return take(options, out=folder / name)


def pruned(name: str, folder: Path, **options: object) -> Artifact:
    out = folder / f"{name}-pruned"
    if not options and (found := store.read(out)):
        return found
    chosen = PruneOptions(**{"ratio": 0.4, "round_to": 4, **options})
    return prune(taken(name, folder), chosen, out=out)


def outputs(artifact: Artifact, seed: int = 5) -> tuple[torch.Tensor, ...]:
    sized = tuple(
        spec.model_copy(update={"shape": tuple(6 if d == "length" else d for d in spec.shape)})
        for spec in artifact.inputs
    )
    with torch.inference_mode():
        probe = torch_module.examples(sized, batch=4, seed=seed)
        return torch_module.output_tensors(torch_folder.load(artifact)(*probe))


def widths(artifact: Artifact) -> dict[str, int]:
    return {
        layer: group["channels_after"]
        for group in artifact.facts["pruned"]
        for layer in group["layers"]
    }


def reasons(artifact: Artifact) -> dict[str, str]:
    return {
        layer: group["reason"]
        for group in artifact.facts["left_alone"]
        for layer in group["layers"]
    }


@given(
    channels=st.integers(1, 4096),
    ratio=st.floats(0.01, 0.99),
    round_to=st.sampled_from([1, 2, 4, 8, 16, 32, 7]),
)
def test_kept_is_the_nearest_multiple_in_both_directions(
    channels: int, ratio: float, round_to: int
) -> None:
    kept = kept_channels(channels, ratio, round_to)
    target = channels * (1 - ratio)
    multiples = range(round_to, channels + round_to + 1, round_to)
    nearest = min(abs(n - target) for n in multiples)
    best = {min(n, channels) for n in multiples if abs(n - target) <= nearest + 1e-9}
    assert kept in best


@given(channels=st.integers(1, 512), a=st.floats(0.01, 0.99), b=st.floats(0.01, 0.99))
def test_a_higher_ratio_never_keeps_more(channels: int, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert kept_channels(channels, high, 8) <= kept_channels(channels, low, 8)


@pytest.mark.parametrize(
    ("channels", "ratio", "kept"),
    [
        (24, 0.05, 24),  # torch-pruning rounds down to 16
        (24, 0.17, 16), (48, 0.17, 40), (64, 0.17, 56),
        (24, 0.3, 16), (48, 0.3, 32), (64, 0.3, 48),
        (24, 0.95, 8),  # torch-pruning leaves all 24
        (4, 0.5, 4), (20, 0.1, 16), (23, 0.01, 23),
    ],
)  # fmt: skip
def test_kept_channels_of_known_cases(channels: int, ratio: float, kept: int) -> None:
    assert kept_channels(channels, ratio, 8) == kept


@pytest.mark.parametrize("name", PRUNABLE)
def test_outputs_and_source_stay(name: str, shelf: Path) -> None:
    source = taken(name, shelf)
    made = pruned(name, shelf)
    assert store.digest(source.path) == source.sha256
    assert made.outputs == source.outputs
    assert [t.shape for t in outputs(made)] == [t.shape for t in outputs(source)]
    facts = made.facts
    assert facts["parameters_after"] < facts["parameters_before"]
    assert facts["macs_after"] < facts["macs_before"]
    assert 0 < facts["ratio_reached"] < 1
    for group in facts["pruned"]:
        assert group["channels_after"] == kept_channels(group["channels_before"], 0.4, 4)


@pytest.mark.parametrize("name", PRUNABLE)
def test_layers_that_make_outputs_are_left_alone(name: str, shelf: Path) -> None:
    made = pruned(name, shelf)
    last = {"mlp": "2", "two_outputs": "a", "depthwise": "5", "grouped": "5", "flattened": "4"}
    head = last.get(name, "head")
    assert "makes an output" in reasons(made)[head]
    assert torch_folder.load(made).get_submodule(head).weight.shape[0] == 10


@pytest.mark.parametrize("name", PRUNABLE)
def test_pruned_twice_comes_back_from_its_folder_alone(
    name: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[nn.Module] = []
    write = torch_folder.write
    monkeypatch.setattr(
        torch_folder, "write", lambda m, *rest: (written.append(m), write(m, *rest))
    )
    first = pruned(name, shelf)
    second = prune(first, PruneOptions(ratio=0.3, round_to=4), out=tmp_path / "second")
    again = store.read(Path(shutil.move(second.path, tmp_path / "moved")))

    assert again is not None
    assert [record.stage for record in again.history] == ["take", "prune", "prune"]
    edits = torch_folder.describe(again.path).edits
    assert edits[: len(first.facts["pruned"])] == torch_folder.describe(first.path).edits
    assert len(edits) == len(first.facts["pruned"]) + len(again.facts["pruned"])
    loaded, in_memory = torch_folder.load(again), written[-1].eval()
    want = in_memory.state_dict()
    assert all(torch.equal(tensor, want[key]) for key, tensor in loaded.state_dict().items())
    probe = torch_module.examples(again.inputs, batch=3)
    with torch.inference_mode():
        pair = [torch_module.output_tensors(model(*probe)) for model in (loaded, in_memory)]
    assert all(map(torch.equal, *pair))


def test_residual_layers_lose_the_same_weakest_channels(shelf: Path) -> None:
    source = taken("residual", shelf)
    made = pruned("residual", shelf)
    assert widths(made) == {"stem.0": 12, "body.1": 12, "body.0.0": 20}
    old, new = torch_folder.load(source), torch_folder.load(made)
    gone = {root: set(channels) for root, _, channels in torch_folder.describe(made.path).edits}
    outer = [i for i in range(20) if i not in (gone.get("stem.0") or gone["body.1"])]
    inner = [i for i in range(32) if i not in gone["body.0.0"]]
    assert torch.equal(new.stem[0].weight, old.stem[0].weight[outer])
    assert torch.equal(new.body[0][0].weight, old.body[0][0].weight[inner][:, outer])
    assert torch.equal(new.body[1].weight, old.body[1].weight[outer][:, inner])
    assert torch.equal(new.body[2].running_var, old.body[2].running_var[outer])
    assert torch.equal(new.head.weight, old.head.weight[:, outer])


@pytest.mark.parametrize(("norm", "power"), [("l1", 1), ("l2", 2)])
def test_the_weakest_channels_by_an_independent_sum(norm: str, power: int, tmp_path: Path) -> None:
    source = taken("mlp", tmp_path)
    made = prune(source, PruneOptions(ratio=0.5, importance=norm), out=tmp_path / "out")
    layers = torch_folder.load(source)
    writes = np.abs(layers[0].weight.detach().numpy()) ** power
    reads = np.abs(layers[2].weight.detach().numpy()) ** power
    weakest = np.argsort(writes.sum(1) + reads.sum(0))[:16]
    ((root, is_output, channels),) = torch_folder.describe(made.path).edits
    assert (root, is_output, channels) == ("0", True, tuple(sorted(weakest.tolist())))
    assert made.facts["macs_before"] == 16 * 32 + 32 * 10
    assert made.facts["macs_after"] == 16 * 16 + 16 * 10
    assert made.facts["parameters_after"] == 16 * 16 + 16 + 16 * 10 + 10


def test_a_layer_whose_features_go_out_is_left_alone(shelf: Path) -> None:
    made = pruned("two_outputs", shelf)
    assert "makes an output" in reasons(made)["z.0"]
    assert widths(made) == {"classifier.0": 20}


@pytest.mark.parametrize(
    ("name", "layer", "reason", "pruned_layers"),
    [
        ("grouped", "0.0", "convolution of 4 groups", {"2.0"}),
        ("concat_flattened", "one.0", "raises RuntimeError: mat1 and mat2", {"two.0.0"}),
        ("encoder", "layer.linear2", "normalization over all channels", {"layer.linear1"}),
        ("attention", "v", "heads of attention", {"out"}),
        ("shuffled", "stem.0", "cannot be followed", {"body.0"}),
        ("used_twice", "layer", "runs 2 times", {"last"}),
    ],
)
def test_what_cannot_be_cut_is_left_alone_with_the_reason(
    name: str, layer: str, reason: str, pruned_layers: set[str], shelf: Path
) -> None:
    made = pruned(name, shelf)
    assert reason in reasons(made)[layer]
    assert set(widths(made)) == pruned_layers


def test_concatenated_layers_of_different_width_are_left_alone(tmp_path: Path) -> None:
    source = taken("concat_flattened", tmp_path, second=24)
    made = prune(source, PruneOptions(ratio=0.4, round_to=4), out=tmp_path / "out")
    assert "cannot be followed" in reasons(made)["one.0"]
    assert widths(made) == {"two.0.0": 8}


def test_depthwise_convolutions_follow_their_input(shelf: Path) -> None:
    made = pruned("depthwise", shelf)
    layer = torch_folder.load(made).get_submodule("1.0")
    assert (layer.in_channels, layer.out_channels, layer.groups) == (16, 16, 16)


def test_a_frozen_layer_stays_frozen(shelf: Path) -> None:
    model = torch_folder.load(pruned("scaled", shelf))
    assert not model.stem[0].weight.requires_grad
    assert model.head.weight.requires_grad
    assert model.scale.requires_grad
    assert model.scale.shape == (20, 1, 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tied", "'one' shares its weights"),
        ("fixed_reshape", "without some of its channels the model raises RuntimeError"),
        ("not_differentiable", "gradients lead from the outputs to no layer"),
    ],
)
def test_nothing_to_prune_is_an_error_with_reasons(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="nothing could be pruned") as caught:
        pruned(name, tmp_path)
    assert reason in str(caught.value)
    assert not (tmp_path / f"{name}-pruned").exists()


def test_too_little_to_round_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="nearest multiple of 8 is all 32 channels"):
        pruned("mlp", tmp_path, ratio=0.05, round_to=8)


def test_a_model_that_cannot_be_traced(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="cannot be traced") as caught:
        pruned("breaks_in_training", tmp_path)
    assert "detach()" in caught.value.hint


def test_a_result_that_fails_later_names_keep(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="three samples need 32 channels") as caught:
        pruned("picky", tmp_path)
    assert "--keep" in caught.value.hint
    assert not (tmp_path / "picky-pruned").exists()


def test_keep_and_ratios_by_pattern(tmp_path: Path) -> None:
    source = taken("residual", tmp_path)
    options = PruneOptions(ratio=0.4, round_to=4, keep=("stem",), ratios={"body.*": 0.75})
    made = prune(source, options, out=tmp_path / "out")
    assert widths(made) == {"body.0.0": 8}
    assert reasons(made)["body.1"] == "kept by the pattern 'stem'"


def test_a_ratio_of_zero_leaves_a_layer(tmp_path: Path) -> None:
    source = taken("residual", tmp_path)
    options = PruneOptions(ratio=0.4, round_to=4, ratios={"body.0": 0.0})
    made = prune(source, options, out=tmp_path / "out")
    assert widths(made) == {"stem.0": 12, "body.1": 12}


@pytest.mark.parametrize("field", ["keep", "ratios"])
def test_an_unknown_pattern_is_a_usage_error(field: str, tmp_path: Path) -> None:
    value = ("bodyy",) if field == "keep" else {"bodyy": 0.5}
    with pytest.raises(UsageError, match=r"'bodyy' matches no module") as caught:
        pruned("residual", tmp_path, **{field: value})
    assert "did you mean 'body'?" in caught.value.hint


@pytest.mark.parametrize("ratio", [0, 1, -0.5, 1.5, float("nan")])
def test_bad_ratios(ratio: float) -> None:
    with pytest.raises(ValidationError, match="ratio"):
        PruneOptions(ratio=ratio)
    with pytest.raises(InputError, match="ratio"):
        parse(PruneOptions, {"ratio": ratio}, "recipe.toml")


def test_only_pytorch_models_are_pruned(tmp_path: Path) -> None:
    source = taken("mlp", tmp_path).model_copy(update={"format": "onnx"})
    with pytest.raises(InputError, match="this one is onnx"):
        prune(source, PruneOptions(ratio=0.5), out=tmp_path / "out")
