"""Runs commands in forks of one process that has everything imported: `python -m ...forks`.

A line of stdin is a JSON list: seconds until the kill, -1 for none, then the words. The answer is
the exit code, or `killed`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import onnx  # noqa: F401
import onnxruntime  # noqa: F401
import onnxscript  # noqa: F401
import onnxslim  # noqa: F401
import torch
import torch._dynamo
import torch.onnx._internal.exporter._core
import torch_pruning  # noqa: F401

import deploykit.backends.ort
import deploykit.bundle.publishing
import deploykit.cli.bench
import deploykit.cli.onnx_stages
import deploykit.cli.run
import deploykit.cli.ship
import deploykit.cli.torch_stages
import deploykit.pipeline
import deploykit.stages.build
import deploykit.stages.convert
import deploykit.stages.distill
import deploykit.stages.export
import deploykit.stages.prune
import deploykit.stages.quantize  # noqa: F401
from deploykit import store
from deploykit.cli import _errors, group


def run(words: list[str]) -> None:
    """Run one command, silent, and end."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os._exit(_errors.call(group, words))


def main() -> None:
    """Answer line by line."""
    torch.set_num_threads(1)
    store.code_digest()
    for line in sys.stdin:
        delay_s, *words = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if not child:
            run(words)
        status = 0
        if delay_s >= 0:
            while time.monotonic() - began < delay_s:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    break
                time.sleep(0.0005)
            else:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
        else:
            status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status)
        sys.stdout.write("killed\n" if killed else f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
