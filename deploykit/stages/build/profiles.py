"""Optimization profiles: the shapes that an engine is made for."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from deploykit._shapes import Shape, parse_shape
from deploykit.dataset import TARGET, Dataset
from deploykit.errors import InputError, UsageError, did_you_mean
from deploykit.stages.build.options import BuildOptions
from deploykit.values import TensorSpec

Profile = dict[str, tuple[Shape, Shape, Shape]]
"""Input name to its smallest, optimal and largest shape."""


def shape_profiles(
    inputs: tuple[TensorSpec, ...], options: BuildOptions, data: Dataset | None = None
) -> tuple[Profile, ...]:
    """The optimization profiles of the dynamic inputs; none for a model without any.

    A missing smallest or largest shape is the optimal one; a shape that is given once holds for all
    profiles. With `data`, one profile spans its real shapes. Raises UsageError: an unknown name, a
    dynamic input without shapes, shapes that do not fit it, or shapes both given and derived.
    InputError: the data does not fit the model.
    """
    dynamic = tuple(s for s in inputs if any(isinstance(d, str) for d in s.shape))
    given = options.min_shapes + options.opt_shapes + options.max_shapes
    if data is not None:
        if given:
            raise UsageError(
                "shapes are given and to be taken from data", hint="do one or the other"
            )
        profile = _from_data(dynamic, data, options.batch_sizes)
        _check(dynamic, profile)
        return (profile,) if profile else ()
    low, best, high = (
        _by_name(texts, inputs)
        for texts in (options.min_shapes, options.opt_shapes, options.max_shapes)
    )
    count = max((len(s) for kind in (low, best, high) for s in kind.values()), default=1)
    profiles = tuple(
        {spec.name: _bounds(spec, *(_nth(kind, spec.name, n, count) for kind in (low, best, high)))
         for spec in dynamic}
        for n in range(count)
    )  # fmt: skip
    for profile in profiles:
        _check(dynamic, profile)
    return profiles if dynamic else ()


def _by_name(texts: Iterable[str], inputs: tuple[TensorSpec, ...]) -> dict[str, list[Shape]]:
    found: dict[str, list[Shape]] = defaultdict(list)
    names = [spec.name for spec in inputs]
    for name, shape in map(parse_shape, texts):
        if name not in names:
            raise UsageError(f"no input is called {name!r}", hint=did_you_mean(name, names))
        found[name].append(shape)
    return found


def _nth(kind: dict[str, list[Shape]], name: str, index: int, count: int) -> Shape | None:
    shapes = kind.get(name, [])
    if len(shapes) <= 1:
        return shapes[0] if shapes else None
    if len(shapes) != count:
        raise UsageError(
            f"{name!r} has {len(shapes)} shapes of a kind, there are {count} profiles",
            hint="give one shape for all profiles, or one for each",
        )
    return shapes[index]


def _bounds(
    spec: TensorSpec, low: Shape | None, best: Shape | None, high: Shape | None
) -> tuple[Shape, Shape, Shape]:
    opt = best or high or low
    if opt is None:
        raise UsageError(
            f"the input {spec} has dynamic dimensions and no shapes",
            hint=f"give --opt-shapes {spec.name}:{'x'.join(map(str, spec.fixed({})))} "
            "(and --min-shapes, --max-shapes), or --shapes-from DATA",
        )
    return low or opt, opt, high or opt


def _check(dynamic: tuple[TensorSpec, ...], profile: Profile) -> None:
    for spec in dynamic:
        shapes = profile[spec.name]
        fits = all(
            len(shape) == len(spec.shape)
            and all(isinstance(d, str) or d == n for d, n in zip(spec.shape, shape, strict=False))
            for shape in shapes
        )
        if not fits or not all(a <= b <= c for a, b, c in zip(*shapes, strict=True)):
            text = ", ".join("x".join(map(str, shape)) for shape in shapes)
            raise UsageError(
                f"the shapes {text} (min, opt, max) do not fit the input {spec}",
                hint="same rank, equal fixed dimensions, and min <= opt <= max",
            )


def _from_data(
    dynamic: tuple[TensorSpec, ...], data: Dataset, batch_sizes: Sequence[int]
) -> Profile:
    """Smallest and largest size of each dimension in the data; the most frequent shape is optimal.

    The first axis is the batch: `batch_sizes`, unless the model fixes it.
    """
    if len(batch_sizes) not in (1, 3):
        raise UsageError(
            f"--batch-sizes has {len(batch_sizes)} numbers",
            hint="give smallest, optimal and largest, or one",
        )
    batches = tuple(batch_sizes) * (3 // len(batch_sizes))
    profile: Profile = {}
    for spec in dynamic:
        shapes = _sample_shapes(spec, data)
        opt = shapes.most_common(1)[0][0]
        sizes = list(zip(*shapes, strict=True))  # of each dimension, in all shapes
        spans = tuple(map(min, sizes)), opt, tuple(map(max, sizes))
        first = spec.shape[0]
        low, best, high = (
            (batch if isinstance(first, str) else first, *span)
            for batch, span in zip(batches, spans, strict=True)
        )
        profile[spec.name] = (low, best, high)
    return profile


def _sample_shapes(spec: TensorSpec, data: Dataset) -> Counter[Shape]:
    """Shapes of one sample, with how many samples have it."""
    shapes: Counter[Shape] = Counter()
    for chunk in data.chunks():
        if spec.name not in chunk:
            known = sorted(set(chunk) - {TARGET})
            raise InputError(
                f"{data.reference}: no array for the model input {spec.name!r}; it has {known}",
                hint="name the arrays as the model names its inputs",
            )
        array = chunk[spec.name]
        shapes[array.shape[1:]] += len(array)
    if len({len(shape) for shape in shapes}) != 1:
        raise InputError(
            f"{data.reference}: {spec.name!r} has samples of different rank",
            hint="give samples of one rank",
        )
    return shapes
