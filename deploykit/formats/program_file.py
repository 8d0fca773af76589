"""An exported program (`.pt2`), loaded only where it holds plain tensors and known operators.

`torch.export.load` unpickles, evaluates and loads native code where a file asks for it; what asks
is refused before.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploykit._lazy import needs
from deploykit.errors import InputError
from deploykit.values import BATCH, Dimension, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.export import ExportedProgram

SUFFIX = ".pt2"
_PLAIN = re.compile(
    r"models/\w+\.json|data/(weights|constants)/(weight_\d+|tensor_\d+|\w+_config\.json)"
    r"|data/sample_inputs/\w+\.pt|archive_(format|version)|byteorder|\.data/\w+|extra/.*"
)
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|higher_order)\.(?!from_file)\w+(\.\w+)?"
    r"|torch\.(_?sym_\w+)|math\.\w+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|ge|gt|le|lt|eq|ne|getitem|and_|or_|not_)"
)
_NUMBER_FUNCTION = re.compile(r"(?!S$|Lambda$)[A-Z]\w*")
_SYMBOL = re.compile(r"z?[su]f?\d+|True|False|oo|int_oo")


def load(path: Path) -> nn.Module:
    """The program as a module that takes its inputs in their order, as it was when exported.

    It cannot be trained. Raises InputError as `read`.
    """
    with needs("torch"):
        from torch import nn
        from torch.utils import _pytree
    program = read(path)
    shape = program.call_spec.in_spec
    assert shape is not None  # noqa: S101 - of a program that was saved it never is

    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # checking guards would run code that the file holds
            self.program = program.module(check_guards=False)

        def forward(self, *tensors: torch.Tensor) -> object:
            positional, named = _pytree.tree_unflatten(tensors, shape)
            return self.program(*positional, **named)

        def train(self, mode: bool = True) -> Program:  # noqa: FBT001, FBT002 - as torch has it
            del mode
            return self

    return Program()


def read(path: Path) -> ExportedProgram:
    """Read a program. Raises InputError: none, or one that is more than tensors and operators."""
    with needs("torch"):
        import torch
    _check(path)
    try:
        return torch.export.load(path)
    except Exception as error:  # a file of another version fails in many ways
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{path}: torch does not load it: {line}",
            hint="save it again with torch.export.save, with the torch that is installed here",
        ) from error


def described(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[Dimension, ...]]:
    """Its inputs and their dynamic dimensions. Raises InputError: its inputs are nested."""
    program = read(path)
    user = {name for name in program.graph_signature.user_inputs if isinstance(name, str)}
    ranges = {str(symbol): bounds for symbol, bounds in program.range_constraints.items()}
    specs, names = [], dict[str, Dimension]()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in user or not hasattr(value, "shape"):
            continue
        shape: list[int | str] = []
        for axis, size in enumerate(value.shape):
            symbol = str(size)
            if isinstance(size, int):
                shape.append(size)
                continue
            if symbol not in names:
                name = f"{node.name}_{axis}" if axis else BATCH
                names[symbol] = _dimension(name, ranges.get(symbol))
            shape.append(names[symbol].name)
        dtype = str(value.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name=node.name, dtype=dtype, shape=tuple(shape)))
    if len(specs) != len(program.graph_signature.user_inputs) or not specs:
        raise InputError(
            f"{path}: it takes {len(program.graph_signature.user_inputs)} inputs, "
            f"{len(specs)} of them tensors",
            hint="export a model whose arguments are tensors",
        )
    return tuple(specs), tuple(names.values())


def _dimension(name: str, bounds: Any) -> Dimension:
    """Torch starts at 2 where it has merely tried no less; a bound that is infinite is none."""
    low = int(bounds.lower) if bounds is not None and bounds.lower > 2 else 1
    high = int(bounds.upper) if bounds is not None and bounds.upper < 2**40 else None
    made = Dimension(name=name, low=low, high=high)
    return made.model_copy(update={"usual": made.nearest(2)})


def _check(path: Path) -> None:
    """Refuse what would run code. Raises InputError."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            roots = {name.partition("/")[0] for name in names}
            inner = [name.partition("/")[2] for name in names]
            odd = [name for name in inner if not _PLAIN.fullmatch(name)]
            if len(set(names)) != len(names) or len(roots) != 1 or odd:
                raise _refused(path, f"it holds {odd[0] if odd else 'two files of one name'!r}")
            for name, full in zip(inner, names, strict=True):
                if name.endswith(".json"):
                    _check_json(path, json.loads(archive.read(full)))
                elif name.startswith("data/sample_inputs/"):
                    _check_tensors(path, archive.read(full))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: not an exported program: {error}", hint="save it with torch.export.save"
        ) from error


def _check_json(path: Path, document: object) -> None:
    for key, value in _pairs(document):
        if key == "use_pickle" and value:
            raise _refused(path, "it holds pickled tensors")
        if key == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", str(value)):
            raise _refused(path, f"it holds the object {value!r}")
        if key == "target" and not _OPERATOR.fullmatch(str(value)):
            raise _refused(path, f"it calls {value!r}")
        if key == "expr_str" and not _is_number_formula(str(value)):
            raise _refused(path, f"it computes a size with {value!r}")


def _pairs(document: object) -> Iterator[tuple[str, object]]:
    """All keys and plain values of a JSON document; `target` only where it is a node's."""
    if isinstance(document, list):
        for item in document:
            yield from _pairs(item)
    elif isinstance(document, dict):
        node = "inputs" in document and "outputs" in document
        for key, value in document.items():
            if key != "target" or node:
                yield key, value
            yield from _pairs(value)


def _is_number_formula(text: str) -> bool:
    """Whether it calls functions of sympy on symbols and numbers alone, and so runs nothing."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    called = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    return all(_harmless(node, called=id(node) in called) for node in ast.walk(tree))


def _harmless(node: ast.AST, *, called: bool) -> bool:
    match node:
        case ast.Name(id=name):
            return bool((_NUMBER_FUNCTION if called else _SYMBOL).fullmatch(name))
        case ast.Constant(value=str() as text):
            return text.isidentifier()
        case ast.Constant(value=value):
            return isinstance(value, (bool, int, float))
        case _:
            return isinstance(node, _ARITHMETIC)


_ARITHMETIC = (
    ast.Expression, ast.Call, ast.keyword, ast.Load, ast.BinOp, ast.UnaryOp, ast.Compare,
    ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


def _check_tensors(path: Path, data: bytes) -> None:
    import torch

    try:
        torch.load(io.BytesIO(data), "cpu", weights_only=True)
    except Exception as error:
        raise _refused(path, "its sample inputs are pickled objects") from error


def _refused(path: Path, why: str) -> InputError:
    return InputError(
        f"{path}: refused, {why}",
        hint="export a model of plain tensors and ATen operators; pickles are never run",
    )
