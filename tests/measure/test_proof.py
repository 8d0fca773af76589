from __future__ import annotations

import pytest

from deploykit.measure import proof
from deploykit.values import Kernel, Placement


def kernel(operator: str, time: float, provider: str = "gpu") -> Kernel:
    return Kernel(names=(), operator=operator, microseconds=time, provider=provider)


def test_shares_are_of_the_time_not_of_the_number():
    told = proof.shares(
        [kernel("Conv", 80), kernel("Transpose", 5), kernel("Transpose", 15)], lambda k: k.operator
    )
    assert told == {"Conv": 0.8, "Transpose": 0.2}
    assert proof.shares([], lambda k: k.operator) == {}


def test_providers_are_weighed_by_time_and_by_nodes_where_there_is_none():
    placement = Placement(provider="gpu", precisions={}, providers={"gpu": 1, "cpu": 3})
    kernels = [kernel("Conv", 90), *[kernel("Shape", 10 / 3, "cpu")] * 3]
    assert proof.provider_shares(placement, kernels) == pytest.approx({"gpu": 0.9, "cpu": 0.1})
    assert proof.provider_shares(placement, []) == {"gpu": 0.25, "cpu": 0.75}
    told = proof.elsewhere(placement, {"gpu": 0.25, "cpu": 0.75})
    assert told == "asked for gpu, ran 75% on cpu"
    assert proof.elsewhere(placement, {"gpu": 1.0}) is None


@pytest.mark.parametrize(
    ("asked", "ran", "void"),
    [
        ("fp32", {"fp32": 3}, False),
        ("fp32", {"bf16": 3}, False),  # the runtime's own choice, shown as such
        ("fp32", {"fp16": 3}, True),
        ("int8", {"int8": 1, "fp32": 9}, False),
        ("int8", {"fp32": 9}, True),
        ("fp8", {"fp32": 9}, True),
        ("fp16", {"fp32": 9}, True),
        ("int4", {"fp32": 9}, False),  # small weights, arithmetic in float
        ("fp16", {"unknown": 1}, False),
        ("int8", {}, False),
    ],
)
def test_another_precision_than_the_file_s_voids(asked, ran, void):
    found = proof.other_precision(asked, Placement(provider="p", precisions=ran))
    assert (found is not None) is void
