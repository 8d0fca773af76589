"""The programs of SERVING.md for KServe and MLServer, in real servers of environments of their own.

python -m venv kserve && kserve/bin/pip install -r .ci/kserve.txt
python -m venv mlserver && mlserver/bin/pip install -r .ci/mlserver.txt
DEPLOYKIT_KSERVE=kserve DEPLOYKIT_MLSERVER=mlserver pytest tests/bundle/test_python_servers.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import deploykit
from deploykit.bundle import load
from tests.bundle.triton_server import free_port
from tests.conftest import ROOT

TEXT = (Path(deploykit.__file__).parent / "SERVING.md").read_text()
CLIENT = """
import json, sys
import numpy as np
from tritonclient import grpc, http
from tritonclient.utils import InferenceServerException

def ask(kind, port, x, binary, headers):
    client, more = kind.InferenceServerClient(f"127.0.0.1:{port}"), {}
    tensor = kind.InferInput("x", list(x.shape), "FP32")
    if kind is http:
        tensor.set_data_from_numpy(x, binary_data=binary)
        more = {"outputs": [http.InferRequestedOutput("y", binary_data=binary)]}
    else:
        tensor.set_data_from_numpy(x)
    try:
        found = client.infer("net", [tensor], headers=headers, **more)
        return found.as_numpy("y").tolist()
    except InferenceServerException as error:
        return str(error)

ways, ports = json.loads(sys.argv[1]), {"http": sys.argv[2], "grpc": sys.argv[3]}
good, bad = np.load(sys.argv[4]), np.zeros((2, 9), np.float32)
kinds = {"http": http, "grpc": grpc}
asked = [[ask(kinds[k], ports[k], x, b, h) for k, b, h in ways] for x in (good, bad, good)]
print("\\n" + json.dumps(asked))
"""
JSON = {"Content-Type": "application/json"}


def program(word: str) -> str:
    found = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (code,) = [code for code in found if word in code]
    return code


@contextmanager
def running(command: list[str], folder: Path, ports: tuple[int, int]) -> Iterator[None]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    try:
        for _ in range(600):
            text = (folder / "log").read_text()
            if text.count("running on") and "gRPC" in text:
                break
            assert process.poll() is None, text
            time.sleep(0.1)
        time.sleep(1)
        yield
    finally:
        process.terminate()
        process.wait(30)


def answers(
    home: Path, ways: list[tuple[str, bool, dict[str, str] | None]], ports: tuple[int, int],
    x: np.ndarray, folder: Path,
) -> list[list[list[list[float]] | str]]:  # fmt: skip
    """What the server says to right, wrong and again right samples, each way of asking."""
    np.save(folder / "x.npy", x)
    words = [json.dumps(ways), *map(str, ports), folder / "x.npy"]
    done = subprocess.run(
        [home.absolute() / "bin" / "python", "-c", CLIENT, *words], check=True,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found: list[list[list[list[float]] | str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("server", ["kserve", "mlserver"])
def test_a_python_server_gives_what_the_bundle_does(
    server: str, sound: Path, tmp_path: Path
) -> None:
    variable = f"DEPLOYKIT_{server.upper()}"
    home = Path(os.environ.get(variable, "no such folder"))
    if not home.is_dir():
        pytest.skip(f"{variable} names no environment with {server}")
    ports, bin_ = (free_port(), free_port()), home.absolute() / "bin"
    code = program(server).replace(
        '"bundle", public_key="key.pub.pem", min_version=1', repr(str(sound))
    )
    if server == "kserve":
        (tmp_path / "serve.py").write_text(code)
        command = [
            bin_ / "python",
            "serve.py",
            f"--http_port={ports[0]}",
            f"--grpc_port={ports[1]}",
        ]
        ways = [("http", True, None), ("http", False, JSON), ("grpc", True, None)]
    else:
        (tmp_path / "bundle_runtime.py").write_text(code)
        own = {"name": "net", "implementation": "bundle_runtime.Bundle"}
        (tmp_path / "model-settings.json").write_text(json.dumps(own))
        whole = {"host": "127.0.0.1", "http_port": ports[0], "grpc_port": ports[1],
                 "metrics_port": free_port(), "parallel_workers": 0}  # fmt: skip
        (tmp_path / "settings.json").write_text(json.dumps(whole))
        command = [bin_ / "mlserver", "start", "."]
        ways = [("http", False, None), ("grpc", True, None)]
    x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    with load(sound) as loaded:
        want = loaded.run({"x": x})["y"]
    with running([str(word) for word in command], tmp_path, ports):
        right, wrong, again = answers(home, ways, ports, x, tmp_path)
    for each in (*right, *again):
        np.testing.assert_array_equal(np.array(each, np.float32), want)
    assert all("the model wants x: float32[batch, 3]" in str(each) for each in wrong)
