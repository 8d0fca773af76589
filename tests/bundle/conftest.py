"""A model, data for it, and a bundle to damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.bundle import PackageOptions, package
from deploykit.dataset import Dataset
from deploykit.values import Artifact
from tests.bundle.small_models import RNG_SEED, samples, save_linear

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="session")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return save_linear(tmp_path_factory.mktemp("linear") / "linear.onnx")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    rng = np.random.default_rng(RNG_SEED)
    path = tmp_path_factory.mktemp("data") / "data.npz"
    return samples(path, x=rng.standard_normal((20, 3)).astype(np.float32))


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory, linear: Artifact, data: Dataset) -> Path:
    """A bundle in the triton layout, with evidence; not to be changed."""
    out = tmp_path_factory.mktemp("sound") / "bundle"
    options = PackageOptions(name="net", layout="triton", version=3)
    package([(linear, "ort-cpu")], options, out=out, data=data, evidence={"score": {"top1": 0.9}})
    return out


@pytest.fixture
def bundle(tmp_path: Path, sound: Path) -> Path:
    """A copy of the sound bundle, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "bundle"))


@pytest.fixture
def edit(bundle: Path) -> Callable[[Edit], None]:
    """Change the manifest of `bundle` in place."""

    def change(how: Edit) -> None:
        path = bundle / "manifest.json"
        manifest = json.loads(path.read_text())
        how(manifest)
        path.write_text(json.dumps(manifest))

    return change
