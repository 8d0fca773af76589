"""Factories of small models, one for each thing that pruning must get right or leave alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def conv(inputs: int, outputs: int, groups: int = 1) -> nn.Sequential:
    """A 3x3 convolution that keeps the size, batch normalization, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Wired(nn.Module):
    """Named layers and the function that connects them."""

    def __init__(self, wiring: Callable[..., object], **layers: nn.Module) -> None:
        super().__init__()
        self.wiring = wiring
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: torch.Tensor) -> object:
        return self.wiring(self, *inputs)


def pooled(images: torch.Tensor) -> torch.Tensor:
    return images.mean((2, 3))


def mlp(hidden: int = 32, classes: int = 10) -> nn.Module:
    """One input of 16 numbers."""
    return nn.Sequential(nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def residual() -> nn.Module:
    def wiring(self: nn.Module, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        return self.head(pooled(torch.relu(x + self.body(x))))

    body = nn.Sequential(conv(20, 32), nn.Conv2d(32, 20, 3, padding=1), nn.BatchNorm2d(20))
    return Wired(wiring, stem=conv(3, 20), body=body, head=nn.Linear(20, 10))


def depthwise() -> nn.Module:
    layers = conv(3, 24), conv(24, 24, groups=24), conv(24, 32)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def grouped() -> nn.Module:
    layers = conv(3, 24), conv(24, 24, groups=4), conv(24, 32)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def flattened() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), nn.Flatten(), nn.Linear(16 * 64, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def concat_flattened(second: int = 16) -> nn.Module:
    """torch-pruning cuts too much off the last layer."""

    def wiring(self: nn.Module, images: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.one(images), self.two(images)], 1)
        return self.head(both.flatten(1))

    two = nn.Sequential(conv(3, 12), conv(12, second))
    return Wired(wiring, one=conv(3, 16), two=two, head=nn.Linear((16 + second) * 64, 10))


def squeeze_excite() -> nn.Module:
    """Hu et al. 2018: channels gated by a small network that reads their means."""

    def wiring(self: nn.Module, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        return self.head(pooled(x * self.gate(pooled(x))[:, :, None, None].expand_as(x)))

    gate = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32), nn.Sigmoid())
    return Wired(wiring, stem=conv(3, 32), gate=gate, head=nn.Linear(32, 10))


def encoder() -> nn.Module:
    """Tokens of 16 numbers; attention and LayerNorm on the residual channels."""

    def wiring(self: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(tokens)).mean(1))

    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return Wired(wiring, embed=nn.Linear(16, 32), layer=layer, head=nn.Linear(32, 10))


def attention() -> nn.Module:
    """Heads of four channels, as many as there are: scattered channels would mix the heads."""

    def wiring(self: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        count, length, _ = tokens.shape
        q, k, v = (
            layer(tokens).view(count, length, -1, 4).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        y = self.out(y.transpose(1, 2).reshape(count, length, -1))
        return self.head(torch.relu(y).mean(1))

    layers = {name: nn.Linear(16, 32) for name in "qkv"}
    return Wired(wiring, **layers, out=nn.Linear(32, 32), head=nn.Linear(32, 10))


def two_inputs() -> nn.Module:
    """16 numbers, and four integers."""

    def wiring(self: nn.Module, x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        y = self.text(self.words(words).mean(1))
        return self.head(torch.cat([self.numbers(x).relu(), y.relu()], 1))

    return Wired(
        wiring, numbers=nn.Linear(16, 32), words=nn.Embedding(10, 8), text=nn.Linear(8, 24),
        head=nn.Linear(56, 10),
    )  # fmt: skip


def shuffled() -> nn.Module:
    """ShuffleNet's interleaving of channels."""

    def wiring(self: nn.Module, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        n, c, h, w = x.shape
        one, two = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).chunk(2, 1)
        return self.head(pooled(self.body(torch.cat([two, one], 1))))

    return Wired(wiring, stem=conv(3, 32), body=conv(32, 32), head=nn.Linear(32, 10))


def scaled() -> nn.Module:
    """A bare parameter multiplies the channels; the stem is frozen."""

    def wiring(self: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return self.head(pooled(self.stem(images) * self.scale))

    model = Wired(wiring, stem=conv(3, 32), head=nn.Linear(32, 10))
    model.scale = nn.Parameter(torch.rand(32, 1, 1))
    model.stem.requires_grad_(False)
    return model


def tied() -> nn.Module:
    def wiring(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(x).relu()).relu())

    model = Wired(wiring, one=nn.Linear(16, 16), two=nn.Linear(16, 16), head=nn.Linear(16, 10))
    model.two.weight = model.one.weight
    return model


def used_twice() -> nn.Module:
    def wiring(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.layer(self.layer(x).relu()).relu()).relu())

    return Wired(wiring, layer=nn.Linear(16, 16), last=nn.Linear(16, 32), head=nn.Linear(32, 10))


def two_outputs() -> nn.Module:
    """Logits, made by a layer named `a`, and the stem's feature map."""

    def wiring(self: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.z(images)
        return self.a(pooled(self.classifier(x))), x

    return Wired(wiring, z=conv(3, 16), classifier=conv(16, 32), a=nn.Linear(32, 10))


def fixed_reshape() -> nn.Module:
    """The number of channels is written in the code."""

    def wiring(self: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(images).reshape(len(images), 32, -1).mean(2))

    return Wired(wiring, stem=conv(3, 32), head=nn.Linear(32, 10))


def picky() -> nn.Module:
    """Three samples at once are refused where channels are missing."""

    def wiring(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 3 and self.one.out_features != 32:
            raise ValueError("three samples need 32 channels")
        return self.head(self.one(x).relu())

    return Wired(wiring, one=nn.Linear(16, 32), head=nn.Linear(32, 10))


def not_differentiable() -> nn.Module:
    def wiring(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.one(x).relu()).argmax(1)

    return Wired(wiring, one=nn.Linear(16, 32), head=nn.Linear(32, 10))


def breaks_in_training() -> nn.Module:
    """Runs only where no gradients are recorded."""

    def wiring(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.from_numpy(self.one(x).numpy()))

    return Wired(wiring, one=nn.Linear(16, 32), head=nn.Linear(32, 10))


def convnet(width: int = 16) -> nn.Module:
    """Images [1, 12, 12]; dropout and batch normalization behave differently in training."""
    return nn.Sequential(
        conv(1, width), nn.MaxPool2d(2), conv(width, width), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(width, 4),
    )  # fmt: skip


class CountedHeads(nn.Module):
    """Four heads of eight channels; `counted` reshapes by their number, else by their size."""

    def __init__(self, counted: bool) -> None:
        super().__init__()
        self.counted, self.num_heads, self.head_dim = counted, 4, 8
        self.q, self.k, self.v = (nn.Linear(16, 32) for _ in range(3))
        self.out = nn.Linear(32, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        count, length, _ = tokens.shape
        heads = self.num_heads if self.counted else -1
        q, k, v = (
            layer(tokens).view(count, length, heads, self.head_dim).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return self.out(y.transpose(1, 2).reshape(count, length, -1))


def counted_heads(counted: bool = True) -> nn.Module:
    def wiring(self: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.block(tokens)).mean(1))

    return Wired(wiring, block=CountedHeads(counted), head=nn.Linear(32, 10))
