from __future__ import annotations

import numpy as np
import pytest

from deploykit.backends import backend, open_session
from deploykit.errors import InputError
from deploykit.stages.take import TakeOptions, take
from deploykit.values import SessionOptions, TensorSpec

MODELS = """
from torch import nn

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        y = self.linear(x)
        return y.tanh() if y.sum().item() > 0 else y

def branching():
    return Branching()

def plain():
    return nn.Sequential(nn.Linear(8, 4), nn.Tanh())
"""


@pytest.fixture
def made(tmp_path):
    """Makes a torch artifact of one of MODELS."""
    if reason := backend("pytorch-compile").unavailable():
        pytest.skip(reason)
    (tmp_path / "models.py").write_text(MODELS)
    spec = TensorSpec(name="x", dtype="float32", shape=("batch", 8))

    def make(name: str):
        options = TakeOptions(factory=f"{tmp_path / 'models.py'}:{name}", inputs=(spec,))
        return take(options, out=tmp_path / name)

    return make


def test_a_compiled_model_agrees_with_the_eager_one_at_every_batch(made):
    artifact = made("plain")
    with (
        open_session(artifact, "pytorch") as eager,
        open_session(artifact, "pytorch-compile", SessionOptions(threads=1)) as compiled,
    ):
        for size in (1, 3):
            feed = {"x": np.random.default_rng(size).standard_normal((size, 8)).astype("f4")}
            want, have = eager.run(feed)["output"], compiled.run(feed)["output"]
            np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)
        compiled.prepare(feed)()
        assert compiled.placement(feed).precisions == {"fp32": 1}
        assert compiled.kernels(feed, 3) == ()


def test_what_cannot_be_compiled_whole_is_no_silent_eager_run(made):
    artifact = made("branching")
    feed = {"x": np.ones((1, 8), np.float32)}
    with (
        open_session(artifact, "pytorch-compile") as session,
        pytest.raises(InputError, match="does not compile it as one graph"),
    ):
        session.run(feed)


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("deploykit.backends.pytorch.which", lambda name: None)
    assert "install g++" in backend("pytorch-compile").unavailable()


def test_modules_are_timed_and_the_hooks_are_gone(made):
    with open_session(made("plain"), "pytorch") as session:
        feed = {"x": np.ones((1, 8), np.float32)}
        told = session.kernels(feed, 4)
        assert [(k.names, k.operator) for k in told] == [
            (("0",), "Linear"), (("1",), "Tanh"), ((), "between modules"),
        ]  # fmt: skip
        assert all(k.microseconds > 0 for k in told)
        assert not any(m._forward_hooks for m in session._module.modules())
