from __future__ import annotations

import re

import pytest

from deploykit.errors import UsageError
from deploykit.layouts import Member, Serving, kserve
from tests.layouts.test_triton import IMAGES, LOGITS, artifact, feed

MODEL = artifact((IMAGES,), (LOGITS,))


def text(member: Member, serving: Serving) -> str:
    laid = kserve.lay([member], serving, feed((IMAGES,)))
    return laid.files["inferenceservice.yaml"].decode()


def test_it_serves_the_repository_with_the_cores_it_was_tuned_for():
    serving = Serving(name="Net_v2", instances=2, threads=3, storage_uri="s3://models/net")
    found = text(Member(artifact=MODEL, backend="ort-cpu", label=""), serving)
    assert 'name: "net-v2"' in found
    assert 'storageUri: "s3://models/net"' in found
    assert found.count('cpu: "6"') == 2
    assert "affinity" not in found
    assert "nvidia.com/gpu" not in found


@pytest.mark.parametrize(
    ("size_bytes", "asked", "memory"), [(1 << 18, None, "3Gi"), (1 << 30, None, "8Gi"),
                                        (1 << 30, 5, "5Gi")],
)  # fmt: skip
def test_its_memory_is_for_every_copy_of_the_model(size_bytes: int, asked: int | None, memory: str):
    member = Member(artifact=MODEL, backend="ort-cpu", label="", size_bytes=size_bytes)
    serving = Serving(instances=2, memory_gib=asked, storage_uri="s3://models/net")
    assert text(member, serving).count(f"memory: {memory}\n") == 2


def test_what_triton_cannot_ask_of_a_cpu_the_scheduler_does():
    member = Member(
        artifact=MODEL,
        backend="ort-cpu",
        label="",
        machine="x86_64",
        cpu_features_any=("avx512_vnni", "avx_vnni"),
    )
    found = text(member, Serving(storage_uri="pvc://m/net"))
    assert re.findall(r"cpuid\.(\w+)", found) == ["AVX512VNNI", "AVXVNNI"]
    assert found.count("matchExpressions") == found.count('values: ["amd64"]') == 2


@pytest.mark.parametrize("uri", ["", "net", "s3://a b", 's3://a"\nkind: Secret'])
def test_it_must_know_where_the_bundle_lies(uri: str):
    with pytest.raises(UsageError, match="where the bundle will lie"):
        text(Member(artifact=MODEL, backend="ort-cpu", label=""), Serving(storage_uri=uri))
