"""The building process: `python -m deploykit.stages.build.worker`.

It reads one request from stdin and answers on a private copy of stdout; fd 1 then points to stderr,
so that what TensorRT prints cannot end up between answers. It stops when stdin ends: the parent
closes it to cancel, and the system does if the parent dies.
"""

from __future__ import annotations

import importlib
import os
from threading import Event, Lock, Thread
from typing import Any, TextIO

from deploykit._tensorrt import logger
from deploykit.errors import DeploykitError, ResourceError, StageError
from deploykit.formats import engine_file, engine_layers
from deploykit.stages.build import account, refusal, timing_cache
from deploykit.stages.build.configure import configure
from deploykit.stages.build.exchange import Answer, Request
from deploykit.values import Json


def main() -> None:
    """Build what stdin asks for."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = Request.model_validate_json(_line())
    stopped = Event()
    Thread(target=_wait_for_end, args=(stopped,), daemon=True).start()
    channel = Channel(out, stopped)
    try:
        answer = Answer(facts=build(request, channel))
    except DeploykitError as error:
        answer = Answer(error=type(error).__name__, fact=str(error), hint=error.hint)
    except MemoryError:
        answer = Answer(
            error=ResourceError.__name__, fact="out of memory", hint=refusal.MORE_MEMORY
        )
    channel.say(answer)


def _wait_for_end(stopped: Event) -> None:
    while os.read(0, 1 << 16):  # not sys.stdin: a thread in its lock breaks the exit of Python
        pass
    stopped.set()


def _line() -> bytes:
    line = b""
    while not line.endswith(b"\n") and (part := os.read(0, 1 << 16)):
        line += part
    return line


class Channel:
    """Says how far the build is; several threads of TensorRT may call it."""

    def __init__(self, out: TextIO, stopped: Event) -> None:
        self._out, self._lock, self.stopped = out, Lock(), stopped

    def say(self, answer: Answer) -> None:
        """Write one line; a parent that is gone stops the build."""
        with self._lock:
            try:
                self._out.write(answer.model_dump_json() + "\n")
                self._out.flush()
            except BrokenPipeError:
                self.stopped.set()


def build(request: Request, channel: Channel) -> Json:
    """Parse, configure, build, write the plan, and account for what it computes in.

    Raises StageError: the parser or the builder refuses. ResourceError: out of memory. AnswerIsNo:
    the work is not in the precision that was asked.
    """
    trt = importlib.import_module(request.module)
    options, log = request.options, logger(trt)
    builder = _builder(trt, request, log)
    plugins = [builder.get_plugin_registry().load_library(path) for path in options.plugins]
    if None in plugins:
        missing = options.plugins[plugins.index(None)]
        raise StageError(f"{missing}: {log.told()}", hint="give a plugin library of this version")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(request.onnx)):
        raise refusal.of_parser(parser, request.onnx)
    config, facts = configure(trt, builder, request)
    config.progress_monitor = _monitor(trt, channel)
    with timing_cache.attached(config, options.timing_cache) as cache_facts:
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise refusal.of_builder(log.told(), request)
    request.plan.write_bytes(plan)
    facts |= {
        "flavour": request.module.replace("_", "-"),
        "flavour_version": trt.__version__,
        "profile": _plain(request.profiles[0]) if request.profiles else {},
        "profiles": [_plain(profile) for profile in request.profiles],
        "timing_cache": cache_facts,
        "warnings": log.warnings,
    }
    facts["sealed"] = engine_file.seal(bytes(plan), facts)
    found = account.of_network(trt, network, request.profiles)
    if engine_file.gpu_misfit(facts) is None:  # one for another GPU does not load on this one
        found |= _inspected(trt, plan, log)
    account.check(found, request)
    return {**facts, **found}


def _inspected(trt: Any, plan: Any, log: Any) -> Json:
    """What the engine's inspector tells, on the GPU that built it.

    Raises StageError: the engine that was just built does not load.
    """
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise StageError(
            f"the engine does not load on the machine that built it: {log.told()}",
            hint="see `deploykit doctor`; with --gpu, name this machine's GPU too",
        )
    inspector = engine.create_engine_inspector()
    return engine_layers.account(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _builder(trt: Any, request: Request, log: Any) -> Any:
    try:
        return trt.Builder(log)
    except TypeError as error:  # what the bindings raise when the library gives nothing
        raise StageError(
            f"{request.module} does not start: {log.told()}", hint="see `deploykit doctor`"
        ) from error


def _plain(profile: dict[str, Any]) -> Json:
    return {name: [list(shape) for shape in shapes] for name, shapes in profile.items()}


def _monitor(trt: Any, channel: Channel) -> Any:
    """TensorRT's own progress, told on; a step that is answered with False ends the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            del parent_phase
            self.totals[phase_name] = num_steps
            channel.say(Answer(phase=phase_name, total=num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self.totals.get(phase_name, 0)
            channel.say(Answer(phase=phase_name, done=step + 1, total=max(total, step + 1)))
            return not channel.stopped.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self.totals.pop(phase_name, None)

    return Monitor()


if __name__ == "__main__":
    main()
