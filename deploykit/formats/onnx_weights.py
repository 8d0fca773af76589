"""Weights that lie in files beside an ONNX model (external data): found, checked, read, written.

A model in memory may be a shell: its large tensors say where their values lie, and are read one at
a time. Models beyond protobuf's 2 GiB can be held and written in no other way.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from deploykit.errors import InputError
from deploykit.values import Array

if TYPE_CHECKING:
    import onnx

LARGEST = 1_900_000_000
"""Bytes beyond which a model is written with its weights in another file; protobuf ends at 2^31."""
ALONE = 1024
"""Tensors of fewer bytes stay in the file of the graph, where shape inference reads them."""
PAGE = 4096
KEYS = frozenset({"location", "offset", "length", "checksum"})
BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
"""Types of which several values share a byte."""
MAKE_AGAIN = "export the model again, or give a sound .onnx file with all its files beside it"


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All that hold values: initializers and attributes, of subgraphs and functions too."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _of_node(node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _of_node(node)


def _of_node(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield attribute.t
        yield from attribute.tensors
        if attribute.HasField("g"):
            yield from _of_graph(attribute.g)
        for graph in attribute.graphs:
            yield from _of_graph(graph)


def is_outside(tensor: onnx.TensorProto) -> bool:
    """Whether the values lie in another file."""
    import onnx

    return tensor.data_location == onnx.TensorProto.EXTERNAL


def files(model: onnx.ModelProto) -> tuple[str, ...]:
    """The files that hold weights, relative to the folder of the model."""
    places = (
        _entries(tensor).get("location", "") for tensor in tensors(model) if is_outside(tensor)
    )
    return tuple(sorted(set(places)))


def size_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of the values as raw data. Raises ValueError: they have no size."""
    import onnx

    if any(dim < 0 for dim in tensor.dims):
        raise ValueError(f"its dims are {list(tensor.dims)}")
    count = int(math.prod(tensor.dims))
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    if name in BITS:
        return -(-count * BITS[name] // 8)
    if name in ("STRING", "UNDEFINED"):
        raise ValueError(f"values of type {name} have no place in another file")
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def check(model: onnx.ModelProto, path: Path) -> None:
    """Hold every tensor that lies in another file against that file, which is not read.

    Raises InputError, by the name of the tensor: the file is missing, too short, outside the folder
    of the model, or a link.
    """
    for tensor in tensors(model):
        if not is_outside(tensor):
            continue
        try:
            _check_place(path.parent, tensor)
        except (ValueError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            place = _entries(tensor).get("location", "")
            raise InputError(
                f"{path}: the weights {tensor.name!r} in {place!r}: {reason}", hint=MAKE_AGAIN
            ) from error


def _check_place(folder: Path, tensor: onnx.TensorProto) -> None:
    entries = _entries(tensor)
    if odd := sorted(set(entries) - KEYS):
        raise ValueError(f"unknown key {odd[0]!r}")
    location = entries.get("location", "")
    parts = PurePosixPath(location).parts
    if not parts or location.startswith("/") or ".." in parts or "\\" in location:
        raise ValueError("not a path inside the folder of the model")
    found = [(folder / Path(*parts[: i + 1])).lstat() for i in range(len(parts))]
    if any(stat.S_ISLNK(each.st_mode) for each in found):
        raise ValueError("a symbolic link, which may lead anywhere; copy the file itself there")
    if not stat.S_ISREG(found[-1].st_mode):
        raise ValueError("no regular file")
    if found[-1].st_nlink > 1:
        raise ValueError("a hard link, which another path changes; copy the file itself there")
    offset, length = _span(tensor)
    if length != size_bytes(tensor):
        raise ValueError(f"{length} bytes where {size_bytes(tensor)} are needed")
    if offset + length > found[-1].st_size:
        raise ValueError(f"ends at byte {offset + length}, the file has {found[-1].st_size}")


def _entries(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _span(tensor: onnx.TensorProto) -> tuple[int, int]:
    """Offset and length in bytes. Raises ValueError: no numbers from 0."""
    entries = _entries(tensor)
    for key in ("offset", "length"):
        if not entries.get(key, "0").isdecimal():
            raise ValueError(f"its {key} is {entries[key]!r}")
    length = int(entries["length"]) if "length" in entries else size_bytes(tensor)
    return int(entries.get("offset", "0")), length


def array(tensor: onnx.TensorProto, folder: Path) -> Array:
    """The values of a tensor that `check` found sound; those in another file are mapped, not read.

    bfloat16 and narrower types come as ml_dtypes.
    """
    import onnx

    if not is_outside(tensor):
        return _array_of(tensor)
    raw = _mapped(tensor, folder)
    if onnx.TensorProto.DataType.Name(tensor.data_type) in BITS:
        return _array_of(
            onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=raw.tobytes())
        )
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return raw.view(kind).reshape(tuple(tensor.dims))


def _array_of(tensor: onnx.TensorProto) -> Array:
    import onnx

    values: Array = onnx.numpy_helper.to_array(tensor)
    return values


def _mapped(tensor: onnx.TensorProto, folder: Path) -> Array:
    (offset, length), place = _span(tensor), folder / _entries(tensor)["location"]
    if not length:
        return np.zeros(0, np.uint8)
    return np.memmap(place, np.uint8, mode="r", offset=offset, shape=(length,))


def total_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the graph and all its weights."""
    return int(model.ByteSize()) + sum(size_bytes(t) for t in tensors(model) if is_outside(t))


def load(model: onnx.ModelProto, folder: Path) -> None:
    """Read all weights of a shell into it, in place."""
    for tensor in tensors(model):
        if is_outside(tensor):
            tensor.raw_data = _mapped(tensor, folder).tobytes()
            del tensor.external_data[:]
            tensor.ClearField("data_location")


def write(model: onnx.ModelProto, path: Path, *, folder: Path | None = None) -> tuple[str, ...]:
    """Write a model; where it is too large for one file, its weights beside it.

    `folder` is where the weights of a shell lie. The model that is given is used up: its weights
    are moved in or out. Returns the names of the files beside it: that of weights holds a part of
    their digest, so that a new model never changes the weights of an old one.
    """
    source = folder or path.parent
    if total_bytes(model) <= LARGEST:
        load(model, source)
        path.write_bytes(model.SerializeToString())
        return ()
    places = _move_out(model, source, scratch := path.with_name(f".{path.name}.weights"))
    name = _named_by_content(scratch, path)
    for tensor, offset, length in places:
        _point(tensor, name, offset, length)
    path.write_bytes(model.SerializeToString())
    return (name,)


def adopt(path: Path, scratch: Path) -> tuple[str, ...]:
    """Give a model's one file of weights, which a library wrote at `scratch`, its name as `write`.

    Returns the names of the files beside the model.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    name = _named_by_content(scratch, path)
    for tensor in tensors(model):
        if is_outside(tensor):
            _point(tensor, name, *_span(tensor))
    path.write_bytes(model.SerializeToString())
    return (name,)


def _named_by_content(scratch: Path, path: Path) -> str:
    """Move a file of weights to where the model at `path` finds it; its name."""
    with scratch.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = f"{path.stem}.{digest[:12]}.data"
    scratch.rename(path.with_name(name))
    return name


def lend(names: Iterable[str], source: Path, target: Path) -> None:
    """Have files of weights in another folder too, without a copy where the system can."""
    for name in names:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            continue
        try:
            os.link(source / name, place)
        except OSError:
            shutil.copyfile(source / name, place)


def _move_out(
    model: onnx.ModelProto, folder: Path, target: Path
) -> list[tuple[onnx.TensorProto, int, int]]:
    """Write the values of large tensors to a file, one after the other; with offset and length."""
    places = []
    with target.open("wb") as file:
        for tensor in tensors(model):
            if not _is_large(tensor):
                continue
            if not is_outside(tensor) and not tensor.HasField("raw_data"):
                _make_raw(tensor)
            file.seek(-(-file.tell() // PAGE) * PAGE)
            offset = file.tell()
            file.write(_mapped(tensor, folder).data if is_outside(tensor) else tensor.raw_data)
            tensor.ClearField("raw_data")
            places.append((tensor, offset, file.tell() - offset))
    return places


def _is_large(tensor: onnx.TensorProto) -> bool:
    import onnx

    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    return (kind not in ("STRING", "UNDEFINED") and size_bytes(tensor) >= ALONE) or is_outside(
        tensor
    )


def _make_raw(tensor: onnx.TensorProto) -> None:
    import onnx

    plain = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name)
    tensor.CopyFrom(plain)


def _point(tensor: onnx.TensorProto, name: str, offset: int, length: int) -> None:
    import onnx

    del tensor.external_data[:]
    for key, value in (("location", name), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    tensor.data_location = onnx.TensorProto.EXTERNAL
