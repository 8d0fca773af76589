"""Whether an ONNX file from anywhere is sound: read, checked and loaded in a process of its own.

A hostile or broken model may crash, hang or exhaust the library that reads it. So the first reading
happens in a child process with limits of memory and time, and only what passes is read here.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from deploykit._lazy import needs
from deploykit.errors import RESOURCE, InputError, ResourceError

MAKE_AGAIN = "export the model again, or give a sound .onnx file"
TOO_MUCH = "a model should not take so much; do not load it if you do not trust where it is from"
SECONDS = 900.0
"""After so long the child is killed; its limit of CPU time, which follows the size, ends it before
that unless it sleeps."""
BASE_BYTES, TIMES_SIZE = 3 << 30, 6
"""Address space: what the libraries take, and so many times the model."""
BASE_SECONDS, BYTES_A_SECOND = 60, 10_000_000
"""CPU time."""
COMMAND = (sys.executable, "-P", "-B", "-m", "deploykit.formats.onnx_child")
KINDS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer, not the model", "get it: git lfs pull"),
    (0, b"PK\x03\x04", "a zip archive, such as a PyTorch checkpoint, .npz or .keras", MAKE_AGAIN),
    (0, b"\x80\x02", "a Python pickle", MAKE_AGAIN),
    (0, b"\x80\x04", "a Python pickle", MAKE_AGAIN),
    (0, b"\x80\x05", "a Python pickle", MAKE_AGAIN),
    (0, b"\x89HDF", "an HDF5 file, such as a Keras model", MAKE_AGAIN),
    (0, b"\x1f\x8b", "a gzip archive", f"unpack it, {MAKE_AGAIN}"),
    (0, b"<", "text that begins like a web page", "download the file itself"),
    (0, b"GGUF", "a GGUF file", MAKE_AGAIN),
    (4, b"TFL3", "a TensorFlow Lite model", MAKE_AGAIN),
    (4, b"ORTM", "a model in ONNX Runtime's own format", MAKE_AGAIN),
    (8, b'{"', "a safetensors file", MAKE_AGAIN),
)  # fmt: skip
"""Where in a file which bytes are, what it then is, and the way out."""


def look(path: Path) -> None:
    """Refuse what plainly is something else. Raises InputError: it names what it looks like."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise InputError(f"{path}: not an ONNX file: {error.strerror}", hint=MAKE_AGAIN) from error
    if not head:
        raise InputError(f"{path}: not an ONNX file: it is empty", hint=MAKE_AGAIN)
    for offset, magic, what, hint in KINDS:
        if head[offset:].startswith(magic):
            raise InputError(f"{path}: not an ONNX file: {what}", hint=hint)


def check(path: Path, *, native: bool = False, command: Sequence[str] = COMMAND) -> None:
    """Read, check and load a file in a process of its own.

    With `native` the file may hold what only the code of others can run, and is then not loaded.
    Raises InputError: it is not sound. ResourceError: it takes more memory or time than a model of
    its size may.
    """
    look(path)
    with needs("onnx"):
        import onnx  # noqa: F401 - the child needs it
    words = [*command, str(path), *(["--native"] if native else [])]
    try:
        done = subprocess.run(
            words, capture_output=True, timeout=SECONDS, env=environment(), check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ResourceError(
            f"{path}: reading it does not end within {SECONDS:.0f} s", hint=TOO_MUCH
        ) from error
    answer = _answer(done.stdout)
    if answer is None:
        raise _ended(path, done)
    if answer:
        kind = ResourceError if answer["exit_code"] == RESOURCE else InputError
        raise kind(str(answer["fact"]), hint=str(answer["hint"]))


def _answer(text: bytes) -> dict[str, object] | None:
    """What the child found wrong, {} for nothing; None where it gave no answer."""
    try:
        answer = json.loads(text.splitlines()[-1])
    except (ValueError, IndexError):
        return None
    return answer if isinstance(answer, dict) else None


def _ended(path: Path, done: subprocess.CompletedProcess[bytes]) -> InputError | ResourceError:
    """The error for a child that died."""
    code, words = done.returncode, done.stderr.decode(errors="replace").strip().splitlines()
    if code in (-signal.SIGKILL, -signal.SIGXCPU):
        return ResourceError(f"{path}: reading it ran out of time or memory", hint=TOO_MUCH)
    how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
    last = f": {words[-1][:200]}" if words else ""
    return InputError(f"{path}: reading it ended with {how}{last}", hint=MAKE_AGAIN)


def environment() -> dict[str, str]:
    """This process's, with its search path, one thread, and no session options out of a model."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    rest = {k: v for k, v in os.environ.items() if k != "ORT_LOAD_CONFIG_FROM_MODEL"}
    return {**rest, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def limit(size: int) -> None:
    """Set this process's limits for a model of so many bytes."""
    for kind, most in (
        (resource.RLIMIT_AS, BASE_BYTES + TIMES_SIZE * size),
        (resource.RLIMIT_CPU, BASE_SECONDS + size // BYTES_A_SECOND),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard < 0 else min(most, hard), hard))
