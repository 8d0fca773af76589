"""The real Triton of the nvidia-pytriton wheel, on loopback, from an environment of its own.

Its C++ backends are not in the wheel: `onnxruntime` is a Python backend here, under that name.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Server(NamedTuple):
    """A Triton that loads what it is told to."""

    grpc: str
    """Address of its gRPC port."""
    http: str
    repository: Path
    pid: int

    def resident_bytes(self) -> int:
        """Memory of the server and of its backends' processes."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return sum(_resident(pid) for pid in (str(self.pid), *children))


def _resident(pid: str) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:  # it has just ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def running(home: Path, base: Path) -> Iterator[Server]:
    """Start the Triton of the environment `home` in the folder `base`, and end it."""
    grpc, http = free_port(), free_port()
    (site,) = home.absolute().glob("lib/python3.*/site-packages")
    triton, python = site / "pytriton" / "tritonserver", site.parent.name.removeprefix("python")
    shutil.copytree(triton / "backends" / "python", base / "be" / "python")
    stub = triton / "python_backend_stubs" / python / "triton_python_backend_stub"
    shutil.copy(stub, base / "be" / "python")
    (base / "be" / "onnxruntime").mkdir()
    backend = Path(__file__).with_name("onnxruntime_backend.py")
    shutil.copy(backend, base / "be" / "onnxruntime" / "model.py")
    (base / "repository").mkdir()
    libraries = [str(site / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    env = {"PATH": f"{home.absolute() / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(site),
           "LD_LIBRARY_PATH": ":".join(libraries)}  # fmt: skip
    command = [
        str(triton / "bin" / "tritonserver"), f"--model-repository={base / 'repository'}",
        f"--backend-directory={base / 'be'}", "--disable-auto-complete-config",
        "--model-control-mode=explicit", "--http-address=127.0.0.1", "--grpc-address=127.0.0.1",
        f"--http-port={http}", f"--grpc-port={grpc}", "--allow-metrics=false",
    ]  # fmt: skip
    with (base / "log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        for _ in range(600):
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", grpc)) == 0:
                    break
            time.sleep(0.1)
        address = "127.0.0.1"
        yield Server(f"{address}:{grpc}", f"{address}:{http}", base / "repository", process.pid)
    finally:
        process.kill()
        process.wait()
