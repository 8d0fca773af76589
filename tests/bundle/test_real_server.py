"""The real Triton of the nvidia-pytriton wheel, on loopback, in an environment of its own.

python -m venv triton && triton/bin/pip install nvidia-pytriton==0.7.0 onnxruntime
triton/bin/pip install "tritonclient[http]"        # the versions that CI takes: .ci/triton.txt
DEPLOYKIT_TRITON=triton pytest tests/bundle/test_real_server.py
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit import environment
from deploykit.bundle import PackageOptions, PublishOptions, load, package, publish, rollback
from deploykit.dataset import Dataset
from deploykit.errors import IntegrityError
from deploykit.values import Artifact
from tests.bundle.test_verification import relist
from tests.bundle.triton_server import Server, running

HOME = Path(os.environ.get("DEPLOYKIT_TRITON", "no such folder"))
pytestmark = pytest.mark.skipif(
    not HOME.is_dir(), reason="DEPLOYKIT_TRITON names no environment with nvidia-pytriton"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(HOME, tmp_path_factory.mktemp("triton")) as started:
        yield started


def make(linear: Artifact, data: Dataset, out: Path, version: int) -> Path:
    options = PackageOptions(name="net", layout="triton", version=version, queue_delay_us=5000)
    package([(linear, "ort-cpu")], options, out=out, data=data)
    return out


def ask(url: str, x: np.ndarray[Any, Any], name: str = "net") -> np.ndarray[Any, Any]:
    from tritonclient.grpc import InferenceServerClient, InferInput
    from tritonclient.utils import np_to_triton_dtype

    tensor = InferInput("x", list(x.shape), np_to_triton_dtype(x.dtype))
    tensor.set_data_from_numpy(x)
    client = InferenceServerClient(url)
    try:
        return np.array(client.infer(name, [tensor], client_timeout=20).as_numpy("y"))
    finally:
        client.close()


def test_it_serves_what_is_published_and_nothing_worse(
    server: Server, linear: Artifact, data: Dataset, tmp_path: Path
):
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    url, repository = server.grpc, server.repository
    first = make(linear, data, tmp_path / "1", 1)
    made = publish(first, repository, PublishOptions(url=url))
    assert made.ready
    assert made.golden_max_error is not None
    x = np.random.default_rng(3).standard_normal((5, 3)).astype(np.float32)
    with load(first) as here:
        want = here.run({"x": x})["y"]
    np.testing.assert_allclose(ask(url, x), want, rtol=1e-5, atol=1e-6)

    client = InferenceServerClient(url)
    for bad in (x[:, :2], x.astype(np.float64), np.zeros((33, 3), np.float32)):
        with pytest.raises(InferenceServerException) as refused:
            ask(url, np.ascontiguousarray(bad))
        assert "INVALID_ARGUMENT" in str(refused.value.status())
    assert client.is_model_ready("net", "1")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(url, x[:1]), range(80)))
    (told,) = client.get_inference_statistics("net").model_stats
    assert told.execution_count < told.inference_count
    client.close()

    failed: list[BaseException] = []
    answered, stop = [0], threading.Event()

    def load_it() -> None:
        while not stop.is_set():
            try:
                np.testing.assert_allclose(ask(url, x), want, rtol=1e-5, atol=1e-6)
                answered[0] += 1
            except BaseException as error:  # noqa: BLE001 - told below
                failed.append(error)

    under_load = threading.Thread(target=load_it)
    under_load.start()
    try:
        broken = make(linear, data, tmp_path / "2", 2)
        model = broken / "net/2/model.onnx"
        model.write_bytes(model.read_bytes()[:-40])
        relist(broken, "net/2/model.onnx")
        machine = environment.read()
        with pytest.raises(IntegrityError):
            publish(broken, repository, PublishOptions(url=url), target=machine)
        assert sorted(p.name for p in (repository / "net" / ".bundles").iterdir()) == ["1"]
        publish(make(linear, data, tmp_path / "3", 3), repository, PublishOptions(url=url))
        assert rollback(repository, "net", PublishOptions(url=url)).version == 1
    finally:
        stop.set()
        under_load.join()
    assert not failed
    assert answered[0] > 10


def http(server: Server, body: bytes, name: str = "web", timeout_s: float = 20) -> tuple[int, Any]:
    """Status and document of the answer to a request in the v2 protocol."""
    url = f"http://{server.http}/v2/models/{name}/infer"
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def body(x: np.ndarray[Any, Any], **changes: Any) -> bytes:
    told = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "data": x.ravel().tolist()}
    return json.dumps({"inputs": [{**told, **changes}]}).encode()


FOREIGN = """
import sys
import numpy as np
from tritonclient.http import InferenceServerClient, InferInput
x = np.load(sys.argv[2])
tensor = InferInput("x", list(x.shape), "FP32")
tensor.set_data_from_numpy(x)
np.save(sys.argv[3], InferenceServerClient(sys.argv[1]).infer("web", [tensor]).as_numpy("y"))
"""


def foreign(server: Server, x: np.ndarray[Any, Any], folder: Path) -> np.ndarray[Any, Any]:
    """What Triton's own client is answered over HTTP, in binary: that of the server's wheel."""
    np.save(folder / "x.npy", x)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [HOME.absolute() / "bin" / "python", "-c", FOREIGN, server.http, "x.npy", "y.npy"]
    done = subprocess.run(
        words, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return np.array(np.load(folder / "y.npy"))


def test_bad_requests_over_http_leave_it_ready(
    server: Server, linear: Artifact, data: Dataset, tmp_path: Path
):
    options = PackageOptions(name="web", layout="triton", version=1)
    package([(linear, "ort-cpu")], options, out=tmp_path / "web", data=data)
    publish(tmp_path / "web", server.repository, PublishOptions(url=server.grpc))
    x = np.random.default_rng(3).standard_normal((5, 3)).astype(np.float32)
    with load(tmp_path / "web") as here:
        want = here.run({"x": x})["y"]
    status, document = http(server, body(x))
    assert status == 200
    np.testing.assert_allclose(document["outputs"][0]["data"], want.ravel(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(foreign(server, x, tmp_path), want, rtol=1e-5, atol=1e-6)
    bad = [
        body(x, name="z"), body(x, datatype="FP64"), body(x, shape=[5, 4]), body(x, shape=[0, 3]),
        body(x, shape=[-5, 3]), body(np.zeros((33, 3), np.float32)), body(x)[:40], b"", b"[]",
        b"{" * 5000, body(x, data=["a"] * 15), body(np.zeros((60_000, 3), np.float32)),
    ]  # fmt: skip
    for each in bad:
        assert 400 <= http(server, each)[0] <= 500, each[:80]  # 500 is for data of another size
    assert http(server, body(x), name="nobody")[0] in (400, 404)
    assert http(server, body(x))[0] == 200


SOAK_S = float(os.environ.get("DEPLOYKIT_SOAK_S", "10"))
"""How long it is loaded; the nightly run takes 120 and more."""


def test_it_serves_through_publish_and_rollback_with_flat_memory(
    server: Server, linear: Artifact, data: Dataset, tmp_path: Path
):
    options = PublishOptions(url=server.grpc, keep=0)
    made = {}
    for version in range(1, 4 + int(SOAK_S / 2)):
        chosen = PackageOptions(name="soak", layout="triton", version=version)
        made[version] = tmp_path / str(version)
        package([(linear, "ort-cpu")], chosen, out=made[version], data=data)
    publish(made[1], server.repository, options)
    failed, answered, stop = [], [0], threading.Event()
    x = np.ones((2, 3), np.float32)
    want = ask(server.grpc, x, "soak")

    def load_it() -> None:
        while not stop.is_set():
            try:
                np.testing.assert_allclose(ask(server.grpc, x, "soak"), want, rtol=1e-5)
                answered[0] += 1
            except BaseException as error:  # noqa: BLE001 - told below
                failed.append(error)

    threads = [threading.Thread(target=load_it) for _ in range(2)]
    for thread in threads:
        thread.start()
    began, memory, version = time.monotonic(), [], 1
    try:
        while time.monotonic() - began < SOAK_S:
            version += 1
            publish(made[version], server.repository, options)
            if version % 3 == 0:
                rollback(server.repository, "soak", options)
            time.sleep(2)
            memory.append(server.resident_bytes())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed
    assert answered[0] > 100
    assert memory[-1] < 1.25 * memory[len(memory) // 3]
