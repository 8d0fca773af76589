from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploykit.measure.child import Child, ChildError
from deploykit.measure.protocol import Failed, Open, Time, Timed
from deploykit.values import Json, SessionOptions

LOOP = "import sys, os, json, time\nfor line in sys.stdin:\n request = json.loads(line)\n "


def script(body: str) -> tuple[str, ...]:
    """A worker that does `body` at each request."""
    return (sys.executable, "-c", LOOP + body.replace("\n", "\n "))


def ask(command: tuple[str, ...], folder: Path, seconds: float = 60):
    with Child(command, folder, threads=1) as child:
        return child.ask(Time(start=0, budget_ns=1), Timed, seconds)


def test_an_answer_comes_back(tmp_path):
    command = script("print(json.dumps({'calls_ns': [request['budget_ns'], 2]}), flush=True)")
    assert ask(command, tmp_path).calls_ns == (1, 2)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print(json.dumps({'failed': 'no such model'}), flush=True)", "^no such model$"),
        ("print('hello', flush=True)", "answered with no Timed: b'hello"),
        ("print('[1]', flush=True)", "answered with no Timed"),
        ("print('{}', flush=True)", "answered with no Timed"),
        ("sys.exit('out of luck')", "^the process ended with exit code 1: out of luck$"),
        ("os.kill(os.getpid(), 11)", r"^the process ended with signal 11 \(Segmentation fault\)$"),
    ],
)
def test_no_answer_has_a_reason(body, reason, tmp_path):
    with pytest.raises(ChildError, match=reason):
        ask(script(body), tmp_path)


@pytest.mark.parametrize("body", ["time.sleep(1e6)", "while True: os.write(1, b'x')"])
def test_silence_and_endless_talk_end_in_time(body, tmp_path):
    with pytest.raises(ChildError, match=r"^no answer in 1\.5 s$"):
        ask(script(body), tmp_path, seconds=1.5)


def test_a_worker_that_reads_nothing_does_not_block_a_large_request(tmp_path, fake):
    record: Json = {"ranges": list(range(200_000))}
    artifact = fake("steady").artifact.model_copy(update={"outputs": ()})
    request = Open(
        artifact=artifact, backend=str(record), options=SessionOptions(), affinity=(),
        feeds=tmp_path, outputs=tmp_path,
    )  # fmt: skip
    deaf = (sys.executable, "-c", "import time; time.sleep(1e6)")
    with Child(deaf, tmp_path, threads=1) as child, pytest.raises(ChildError, match="no answer"):
        child.ask(request, Failed, 1.0)
    echo = script("print(json.dumps({'calls_ns': [len(line)]}), flush=True)")
    with Child(echo, tmp_path, threads=1) as child:
        assert child.ask(request, Timed, 60).calls_ns[0] > 1_000_000


def test_leaving_kills_the_process_and_what_it_started(tmp_path):
    command = script(
        "import subprocess\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1e6)'])\n"
        "print(json.dumps({'calls_ns': [inner.pid]}), flush=True)"
    )
    with Child(command, tmp_path, threads=1) as child:
        inner = child.ask(Time(start=0, budget_ns=1), Timed, 60).calls_ns[0]
        assert alive(inner)
    assert_gone(inner)
    assert_gone(child.pid)


def test_threads_and_the_search_path_are_handed_down(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "only_here.py").write_text("THREADS = 3\n")
    command = script(
        "import only_here\n"
        "seen = [int(os.environ['OMP_NUM_THREADS']), only_here.THREADS]\n"
        "print(json.dumps({'calls_ns': seen}), flush=True)"
    )
    with Child(command, tmp_path, threads=3) as child:
        assert child.ask(Time(start=0, budget_ns=1), Timed, 60).calls_ns == (3, 3)


@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_parent_leaves_no_worker(busy, tmp_path, fake):
    """Also one in the middle of a call that never ends."""
    parent = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("fake_parent.py")), str(tmp_path), str(busy)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        worker = int(parent.stdout.readline())
        assert alive(worker)
        parent.send_signal(signal.SIGKILL)
    assert_gone(worker)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)
