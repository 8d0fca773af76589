"""KServe: the Triton repository, and an InferenceService that serves it on Kubernetes.

The schema is KServe's `serving.kserve.io/v1beta1`. What Triton cannot ask of a machine, the
scheduler can: an engine's CPU features become a node affinity on the labels that Node Feature
Discovery gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from math import ceil

from deploykit.errors import UsageError
from deploykit.layouts import triton
from deploykit.layouts.interface import Laid, Member, Serving
from deploykit.values import Feed

FILE = "inferenceservice.yaml"
LABELS = {
    "avx512_vnni": "AVX512VNNI", "avx_vnni": "AVXVNNI", "amx_int8": "AMXINT8",
    "asimddp": "ASIMDDP", "i8mm": "I8MM",
}  # fmt: skip
"""Linux names of CPU features to those of Node Feature Discovery."""
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
SERVER_GIB, TIMES_SIZE = 2, 3
"""Memory of the server, and of one copy of a model by its size: room to spare, not measured."""


def lay(members: Sequence[Member], serving: Serving, feed: Feed) -> Laid:
    """The triton layout with an InferenceService. Raises UsageError: no storage URI."""
    if not re.match(r"^[a-z0-9]+://\S+$", serving.storage_uri):
        raise UsageError(
            f"the kserve layout needs to know where the bundle will lie, not "
            f"{serving.storage_uri!r}",
            hint="--storage-uri pvc://CLAIM/PATH, s3://..., gs://..., oci://...",
        )
    laid = triton.lay(members, serving, feed)
    text = render(members, serving)
    return laid.model_copy(update={"files": {**laid.files, FILE: text.encode()}})


def render(members: Sequence[Member], serving: Serving) -> str:
    """The YAML of the InferenceService; strings are written as JSON, which YAML reads."""
    name = re.sub(r"[^a-z0-9-]+", "-", serving.name.lower()).strip("-")[:53]
    cores, memory = serving.instances * serving.threads, f"{_memory_gib(members, serving)}Gi"
    gpu = any(member.gpus for member in members)
    return f"""\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {json.dumps(name or "model")}
  labels:
    deploykit/bundle: {json.dumps(serving.name[:63].strip("_.-") or "model")}
    deploykit/version: {json.dumps(str(serving.version))}
spec:
  predictor:
    minReplicas: 1
{_affinity(members)}    model:
      modelFormat:
        name: triton
      protocolVersion: v2
      runtime: kserve-tritonserver
      storageUri: {json.dumps(serving.storage_uri)}
      args:
        - "--disable-auto-complete-config"
        - "--exit-on-error=true"
      resources:
        requests:
          cpu: {json.dumps(str(cores))}
          memory: {memory}
        limits:
          cpu: {json.dumps(str(cores))}
          memory: {memory}
{"          nvidia.com/gpu: 1" + chr(10) if gpu else ""}"""


def _memory_gib(members: Sequence[Member], serving: Serving) -> int:
    """As asked for, else what the server and every copy of the models should need."""
    copies = serving.instances * sum(member.size_bytes for member in members)
    return serving.memory_gib or SERVER_GIB + ceil(TIMES_SIZE * copies / (1 << 30))


def _affinity(members: Sequence[Member]) -> str:
    """Nodes that every model fits: one term for each CPU feature that will do."""
    common = [
        ("kubernetes.io/arch", ARCHITECTURES.get(machine, machine))
        for machine in sorted({m.machine for m in members if m.machine})
    ]
    wanted = sorted({f for m in members for f in m.cpu_features_any} & set(LABELS))
    prefix = "feature.node.kubernetes.io/cpu-cpuid."
    terms = [[*common, (f"{prefix}{LABELS[f]}", "true")] for f in wanted]
    if not terms and not common:
        return ""
    lines = ["    affinity:", "      nodeAffinity:",
             "        requiredDuringSchedulingIgnoredDuringExecution:",
             "          nodeSelectorTerms:"]  # fmt: skip
    for term in terms or [common]:
        lines.append("            - matchExpressions:")
        for key, value in term:
            lines.append(f"                - key: {json.dumps(key)}")
            lines.append("                  operator: In")
            lines.append(f"                  values: [{json.dumps(value)}]")
    return "\n".join(lines) + "\n"
