"""The real Triton of the nvidia-pytriton wheel, on loopback, in an environment of its own.

    python -m venv triton && triton/bin/pip install nvidia-pytriton==0.7.0 onnxruntime
    DEPLOYKIT_TRITON=triton pytest tests/bundle/test_real_server.py

Its C++ backends are not in the wheel: `onnxruntime` is a Python backend here, under that name.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit import environment
from deploykit.bundle import PackageOptions, PublishOptions, load, package, publish, rollback
from deploykit.dataset import Dataset
from deploykit.errors import InputError
from deploykit.values import Artifact
from tests.bundle.test_verification import relist

HOME = Path(os.environ.get("DEPLOYKIT_TRITON", "no such folder"))
pytestmark = pytest.mark.skipif(
    not HOME.is_dir(), reason="DEPLOYKIT_TRITON names no environment with nvidia-pytriton"
)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """gRPC address and repository of a Triton that loads what it is told to."""
    base, ports = tmp_path_factory.mktemp("triton"), [free_port(), free_port()]
    (site,) = HOME.absolute().glob("lib/python3.*/site-packages")
    triton, python = site / "pytriton" / "tritonserver", site.parent.name.removeprefix("python")
    shutil.copytree(triton / "backends" / "python", base / "be" / "python")
    stub = triton / "python_backend_stubs" / python / "triton_python_backend_stub"
    shutil.copy(stub, base / "be" / "python")
    (base / "be" / "onnxruntime").mkdir()
    backend = Path(__file__).with_name("onnxruntime_backend.py")
    shutil.copy(backend, base / "be" / "onnxruntime" / "model.py")
    (base / "repository").mkdir()
    libraries = [str(site / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    env = {"PATH": f"{HOME.absolute() / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(site),
           "LD_LIBRARY_PATH": ":".join(libraries)}  # fmt: skip
    command = [
        str(triton / "bin" / "tritonserver"), f"--model-repository={base / 'repository'}",
        f"--backend-directory={base / 'be'}", "--disable-auto-complete-config",
        "--model-control-mode=explicit", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1",
        f"--http-port={ports[0]}", f"--grpc-port={ports[1]}", "--allow-metrics=false",
    ]  # fmt: skip
    with (base / "log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        for _ in range(300):
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", ports[1])) == 0:
                    break
            time.sleep(0.1)
        yield f"127.0.0.1:{ports[1]}", base / "repository"
    finally:
        process.kill()
        process.wait()


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
    server: tuple[str, Path], linear: Artifact, data: Dataset, tmp_path: Path
):
    from tritonclient.grpc import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    url, repository = server
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
        with pytest.raises(InputError):
            publish(broken, repository, PublishOptions(url=url), target=machine)
        assert sorted(p.name for p in (repository / "net" / ".bundles").iterdir()) == ["1"]
        publish(make(linear, data, tmp_path / "3", 3), repository, PublishOptions(url=url))
        assert rollback(repository, "net", PublishOptions(url=url)).version == 1
    finally:
        stop.set()
        under_load.join()
    assert not failed
    assert answered[0] > 10
