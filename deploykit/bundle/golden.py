"""Golden inputs and outputs: what the packaged engine answered, to be answered again elsewhere."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deploykit import _npz, gpu
from deploykit.backends import BACKENDS, open_session
from deploykit.bundle.manifest import GoldenOutputs
from deploykit.dataset import Dataset
from deploykit.errors import InputError, IntegrityError, StageError
from deploykit.session import Session
from deploykit.values import Array, Artifact, Feed, Format, TensorSpec, Value

INPUTS = "golden_inputs.npz"
OUTPUTS = "golden_outputs"
"""Begin of the names of the files of outputs, one file an engine."""

SHARES: dict[str, float] = {
    "fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2, "int8": 1.5e-2, "int4": 1.5e-2, "fp8": 5e-2,
}  # fmt: skip
"""Tolerated share of a float and of the largest one; BUNDLE_FORMAT.md gives the reasons."""

_BROKEN_ARCHIVE = (
    OSError, ValueError, EOFError, RuntimeError, NotImplementedError,
    zipfile.BadZipFile, zlib.error, InputError,
)  # fmt: skip


class Agreement(Value):
    """How the outputs of a run compare with golden outputs."""

    max_error: float
    """Largest |difference|, infinite where a dtype or shape differs."""
    problem: str | None
    """What is out of tolerance; None where nothing is."""


def runners(format_: Format) -> list[str]:
    """The backends of this version that run such models."""
    return [backend.name for backend in BACKENDS if format_ in backend.formats]


def no_runner(format_: Format) -> str | None:
    """Why this version runs no such models at all, or engines not on this machine; or None."""
    takers = [backend for backend in BACKENDS if format_ in backend.formats]
    if not takers:
        return f"this version of deploykit runs no {format_} models"
    reasons = [backend.unavailable() for backend in takers]
    if format_ != "engine" or None in reasons:
        return None
    return f"no engine runs on this machine: {gpu.unavailable() or reasons[0]}"


def take(data: Dataset, models: tuple[Artifact, ...], count: int) -> Feed:
    """The first samples of the data, as the models take them.

    For models of fixed batch the last sample is repeated up to whole batches. Raises InputError:
    the data does not fit the first model.
    """
    bound = data.matching(models[0].inputs).first(count)
    feed, _ = next(bound.batches(count))
    samples = len(bound)
    step = math.lcm(*(_fixed_batch(model.inputs) or 1 for model in models))
    padding = -samples % step
    return {n: np.concatenate([a, np.repeat(a[-1:], padding, 0)]) for n, a in feed.items()}


def record(model: Artifact, backend: str, feed: Feed, path: Path) -> GoldenOutputs:
    """Run the model on the feed in two sessions, and write the outputs of the first at `path`.

    The second session runs twice: a session may draw other random numbers at each run, or each
    session the same ones.

    Raises InputError: an output is not finite or not of numbers. StageError: the two runs differ.
    """
    samples = len(next(iter(feed.values())))
    batch_size = _fixed_batch(model.inputs) or samples
    first, second = (_last_run(model, backend, feed, batch_size, runs=n) for n in (1, 2))
    for name, array in first.items():
        if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
            raise InputError(
                f"{model.path}: output {name!r} is not finite or not of numbers on the golden data",
                hint="the model is broken on this data; evaluate it first",
            )
    share = _share(model, backend, feed, batch_size)
    shares = {n: share * (a.dtype.kind == "f") for n, a in first.items()}
    expected = GoldenOutputs(
        path=path.name,
        batch_size=batch_size,
        atol={n: share * float(np.abs(first[n]).max(initial=0)) for n, share in shares.items()},
        rtol=shares,
        max_error=0.0,
    )
    agreement = compare(first, second, expected)
    if agreement.problem:
        raise StageError(
            f"{model.path} answers the same inputs differently in two runs: {agreement.problem}",
            hint="remove what is random in it; its golden outputs would prove nothing",
        )
    write_arrays(path, first)
    return expected.model_copy(update={"max_error": agreement.max_error})


def _share(model: Artifact, backend: str, feed: Feed, batch_size: int) -> float:
    """The tolerance of the coarsest precision that the file has or the runtime chose by itself."""
    with open_session(model, backend) as session:
        one = {name: array[:batch_size] for name, array in feed.items()}
        ran = session.placement(one).precisions
    return max(SHARES.get(name, 0.0) for name in (model.precision, *ran))


def run(session: Session, feed: Feed, batch_size: int) -> dict[str, Array]:
    """Outputs over the feed, run `batch_size` samples at a time and stacked on the first axis."""
    samples = len(next(iter(feed.values())))
    parts = [
        session.run({name: array[start : start + batch_size] for name, array in feed.items()})
        for start in range(0, samples, batch_size)
    ]
    return {
        name: np.concatenate([np.atleast_1d(part[name]) for part in parts]) for name in parts[0]
    }


def compare(
    golden: Mapping[str, Array], answer: Mapping[str, Array], expected: GoldenOutputs
) -> Agreement:
    """Compare outputs with golden outputs within the tolerances; NaN never agrees."""
    if set(golden) != set(answer):
        problem = f"the outputs are {sorted(answer)}, the golden ones {sorted(golden)}"
        return Agreement(max_error=math.inf, problem=problem)
    found = [
        _compare(f"output {n!r}", golden[n], answer[n], expected.atol[n], expected.rtol[n])
        for n in golden
    ]
    problems = [agreement.problem for agreement in found if agreement.problem]
    return Agreement(
        max_error=max((agreement.max_error for agreement in found), default=0.0),
        problem="; ".join(problems) or None,
    )


def _compare(what: str, golden: Array, answer: Array, atol: float, rtol: float) -> Agreement:
    if golden.shape != answer.shape or golden.dtype != answer.dtype:
        kinds = f"{answer.dtype}{list(answer.shape)}, not {golden.dtype}{list(golden.shape)}"
        return Agreement(max_error=math.inf, problem=f"{what} is {kinds}")
    want = golden.astype(np.float64)
    gaps = np.abs(answer.astype(np.float64) - want)
    off = ~(gaps <= atol + rtol * np.abs(want))
    error = float(np.nan_to_num(gaps, nan=math.inf, posinf=math.inf).max(initial=0.0))
    if not off.any():
        return Agreement(max_error=error, problem=None)
    problem = (
        f"{what} differs in {off.sum()} of {off.size} values, by up to {error:.3g} "
        f"(tolerance {atol:.3g} + {rtol:.3g} of the value)"
    )
    return Agreement(max_error=error, problem=problem)


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write an `.npz`; equal arrays give equal bytes, and an array may have any name."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def read_arrays(path: Path) -> dict[str, Array]:
    """Read an `.npz` of plain arrays. Raises IntegrityError.

    `numpy.load` would take an array called `x.npy` for one called `x`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name, header in _npz.headers(path).items():
                if math.prod(header.shape) * header.dtype.itemsize > path.stat().st_size:
                    raise ValueError(f"{name!r} has no {header.shape} values")
            return {name.removesuffix(".npy"): _entry(archive, name) for name in archive.namelist()}
    except _BROKEN_ARCHIVE as error:
        raise IntegrityError(
            f"{path}: not an .npz of plain arrays: {error}", hint="package the model again"
        ) from error


def _entry(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(name) as file:
        array: Array = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _last_run(
    model: Artifact, backend: str, feed: Feed, batch_size: int, *, runs: int
) -> dict[str, Array]:
    """The outputs of the last of several runs in a session of their own."""
    with open_session(model, backend) as session:
        return [run(session, feed, batch_size) for _ in range(runs)][-1]


def _fixed_batch(inputs: tuple[TensorSpec, ...]) -> int | None:
    first = inputs[0].shape[0] if inputs and inputs[0].shape else None
    return first if isinstance(first, int) else None
