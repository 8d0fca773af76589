"""From a module to an exported program to ONNX; what the exporter fixed, and which line made it."""

from __future__ import annotations

import gc
import io
import linecache
import logging
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from deploykit._lazy import needs
from deploykit.errors import StageError
from deploykit.formats import onnx_weights, torch_module
from deploykit.values import Dimension, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram
    from torch.onnx import ONNXProgram

Specs = tuple[TensorSpec, ...]
Fixed = dict[str, tuple[str, str]]
"""A symbol of a size, what it was found equal to, and the line that made it so."""

PRIVATE = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")
"""What the exporter tells of a node that holds paths and internals."""
UNKNOWN = "a line that torch does not tell"
_TRACERS = ("sympy", "onnxscript", "onnx_ir")
_PACKAGE = str(Path(__file__).parents[1])


def capture(
    module: nn.Module,
    inputs: Specs,
    dimensions: tuple[Dimension, ...],
    example: Sequence[torch.Tensor],
) -> ExportedProgram:
    """The program of a module that takes and gives flat tensors, traced on an example.

    Raises StageError: it cannot be traced, or it fixes or bounds a dimension that should be
    dynamic; which, and by which line.
    """
    with needs("torch"):
        import torch
    known = {d.name: d for d in dimensions}
    axes = tuple(
        {axis: _auto(known[d]) for axis, d in enumerate(spec.shape) if isinstance(d, str)}
        for spec in inputs
    )
    with torch.no_grad(), _quiet(), _flat(module, inputs, example), _watching() as fixed:
        try:
            program = torch.export.export(module, tuple(example), dynamic_shapes=(axes,))
        except Exception as error:  # the exporter raises many kinds
            raise _failed(error) from error
    _check_dynamic(program, inputs, known, fixed)
    return program


def to_onnx(
    program: ExportedProgram, inputs: Specs, outputs: Specs, opset: int, path: Path
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Write a program as ONNX; the program as it was decomposed for that, and its weights' files.

    Raises StageError: an operator has no counterpart.
    """
    with needs("torch"):
        import torch
    with needs("onnxscript"):
        import onnxscript  # noqa: F401 - the exporter imports it
    names = tuple(
        {axis: d for axis, d in enumerate(spec.shape) if isinstance(d, str)} for spec in inputs
    )
    try:
        with torch.no_grad(), _quiet():
            made = torch.onnx.export(
                program,
                input_names=[spec.name for spec in inputs],
                output_names=[spec.name for spec in outputs],
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=names if any(names) else None,
                verbose=False,
            )
            assert made is not None  # noqa: S101 - of the dynamo exporter it never is
            _strip(made)
            beside = _save(made, path)
            assert made.exported_program is not None  # noqa: S101 - it comes from one
    except Exception as error:  # the exporter raises many kinds
        raise _failed(error) from error
    return made.exported_program, beside


def _save(made: ONNXProgram, path: Path) -> tuple[str, ...]:
    """Write the model; torch puts the weights in a file beside it where one is too small."""
    made.save(str(path))
    _let_go()
    beside = path.with_name(f"{path.name}.data")
    return onnx_weights.adopt(path, beside) if beside.exists() else ()


def _let_go() -> None:
    """Take the weights out of exported graphs: onnxscript's rewriter keeps the last one for ever.

    Its patterns hold nodes that they have matched, also those that are in the graph no more.
    """
    import onnx_ir

    for each in gc.get_objects():
        if isinstance(each, onnx_ir.Value) and _is_of_torch(each.const_value):
            each.const_value = None


def _is_of_torch(value: object) -> bool:
    return type(value).__module__.startswith("torch.onnx.")


def _strip(made: ONNXProgram) -> None:
    """Take out where on this machine the model's source lies: it goes to no server.

    What says which module a node is from stays.
    """
    nodes = (*made.model.graph.all_nodes(), *chain(*made.model.functions.values()))
    for node in nodes:
        for key in PRIVATE:
            node.metadata_props.pop(key, None)


def _auto(dimension: Dimension) -> Any:
    from torch.export import Dim

    return Dim.AUTO(min=dimension.low, max=dimension.high)


@contextmanager
def _flat(module: nn.Module, inputs: Specs, example: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let `forward` take the inputs in their order and give a tuple: what an exporter knows."""
    original = module.forward
    names = list(torch_module.arguments(module, inputs, example)[1])
    had = vars(module).get("forward")

    def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip(names, tensors, strict=False))
        return torch_module.output_tensors(original(**named) if named else original(*tensors))

    module.forward = forward
    try:
        yield
    finally:
        if had is None:
            del module.forward
        else:
            module.forward = had


@contextmanager
def _watching() -> Iterator[Fixed]:
    """Note where a symbol of a size is found equal to another or a number, or is bounded.

    torch keeps the place itself only for some; its methods are put back afterwards.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    found: Fixed = {}
    replace, bound = ShapeEnv._set_replacement, ShapeEnv._update_var_to_range  # noqa: SLF001

    def replaced(self: Any, symbol: Any, target: Any, *rest: Any) -> Any:
        found[str(symbol)] = (str(target), _user_line(sys._getframe(1)))  # noqa: SLF001
        return replace(self, symbol, target, *rest)

    def bounded(self: Any, symbol: Any, *rest: Any, **more: Any) -> Any:
        before = self.var_to_range.get(symbol)
        result = bound(self, symbol, *rest, **more)
        after = self.var_to_range.get(symbol)
        if before is not None and after != before:
            line = _user_line(sys._getframe(1))  # noqa: SLF001
            found.setdefault(f"range of {symbol}: {after}", ("", line))
        return result

    ShapeEnv._set_replacement = replaced  # type: ignore  # noqa: SLF001
    ShapeEnv._update_var_to_range = bounded  # type: ignore  # noqa: SLF001
    try:
        yield found
    finally:
        ShapeEnv._set_replacement = replace  # type: ignore  # noqa: SLF001
        ShapeEnv._update_var_to_range = bound  # type: ignore  # noqa: SLF001


def _user_line(frame: FrameType | None) -> str:
    """The innermost line that is neither torch's nor ours; in torch's layers if there is none."""
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return _line(frames)


def _line(frames: Sequence[tuple[str, int]]) -> str:
    """The file, number and text of the line that is the model's, of frames innermost first."""
    import torch

    library, standard = str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"]
    tracers = (library, _PACKAGE, "<", *(f"{Path(library).parent}/{n}/" for n in _TRACERS))
    layers = [f for f in frames if f[0].startswith(f"{library}/nn/")]
    user = [
        f
        for f in frames
        if not f[0].startswith(tracers) and ("-packages" in f[0] or not f[0].startswith(standard))
    ]
    for place in (*user[:1], *layers[:1]):
        if code := linecache.getline(*place).strip():
            return f"{Path(place[0]).name}:{place[1]}: {code}"
    return UNKNOWN


def _check_dynamic(
    program: ExportedProgram, inputs: Specs, known: dict[str, Dimension], fixed: Fixed
) -> None:
    """Raises StageError: a dimension is a number, is bounded, or is another one."""
    nodes = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    values: list[Any] = [nodes[str(name)] for name in program.graph_signature.user_inputs]
    owners: dict[str, str] = {}
    symbols = _symbols(values)
    for index, (spec, value) in enumerate(zip(inputs, values, strict=True)):
        for axis, name in enumerate(spec.shape):
            if not isinstance(name, str):
                continue
            size, place = value.shape[axis], f"{spec.name}:{axis}={name}"
            if isinstance(size, int) or size.node.expr.is_number:
                line = _made_by(symbols.get((index, axis), ""), fixed)
                raise StageError(
                    f"the model fixes the dynamic dimension {place} at {size}, in {line}",
                    hint="take the size from a tensor's shape there, not from a number; or leave "
                    "that axis fixed",
                )
            _check_range(place, known[name], program.range_constraints.get(size.node.expr), fixed)
            if (owner := owners.setdefault(str(size), name)) != name:
                line = _made_by(symbols.get((index, axis), ""), fixed)
                raise StageError(
                    f"the model takes {owner} and {name} to be equal, in {line}",
                    hint="give both one name, if they are the same",
                )


def _check_range(place: str, dimension: Dimension, bounds: Any, fixed: Fixed) -> None:
    """Torch's lower bound of 2 says only that it has tried no less."""
    if bounds is None:
        return
    high = dimension.high is not None and bounds.upper < dimension.high
    if high or bounds.lower > max(2, dimension.low):
        end = f", {bounds.upper}]" if high else f"[{bounds.lower}, "
        lines = [line for key, (_, line) in fixed.items() if "range of" in key and end in key]
        low = bounds.lower if bounds.lower > 2 else dimension.low
        raise StageError(
            f"the model bounds {place} to {low}..{bounds.upper} where {dimension} was asked for, "
            f"in {(lines or [UNKNOWN])[0]}",
            hint="ask for a smaller range, or change that line",
        )


def _symbols(values: Sequence[Any]) -> dict[tuple[int, int], str]:
    """The symbol that each axis of each input had at first."""
    modes = [v.fake_mode.shape_env for v in values if getattr(v, "fake_mode", None)]
    if not modes:
        return {}
    wanted = {
        f"L['tensors'][{i}].size()[{axis}]": (i, axis)
        for i, value in enumerate(values)
        for axis in range(len(value.shape))
    }
    return {
        wanted[source.name]: str(symbol)
        for symbol, sources in modes[0].var_to_sources.items()
        for source in sources
        if source.name in wanted
    }


def _made_by(symbol: str, fixed: Fixed) -> str:
    """The line that gave a symbol its number, through those that it was found equal to."""
    line = UNKNOWN
    seen: set[str] = set()
    while symbol in fixed and symbol not in seen:
        seen.add(symbol)
        symbol, line = fixed[symbol]
    return line


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's talk: its result is compared with the model instead."""
    nowhere = io.StringIO()
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(nowhere), redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _failed(error: Exception) -> StageError:
    """The exporter's innermost reason, and the line of the model that it stood at."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    frames = [(f.filename, f.lineno or 0) for f in traceback.extract_tb(inner.__traceback__)]
    line = _line(frames[::-1])
    where = f", in {line}" if line != UNKNOWN else ""
    return StageError(
        f"the exporter fails: {type(inner).__name__}: {lines[0] if lines else ''}{where}",
        hint="rewrite what it names, or export a part; --traceback shows all of it",
    )
