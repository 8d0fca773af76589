"""Proof of what ran: provider and precision, as a share of time, held against what was asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from deploykit.values import Kernel, Placement, Precision

LEAST_SHARE = 0.5
"""Of the time on the provider that was asked for: with less the number is another one's."""
CHOSEN_BY_RUNTIME = {"fp32": frozenset({"bf16"})}
"""What a runtime may make of a precision by itself; it is shown, and voids nothing."""
FLOAT_RIGHTLY = frozenset({"int4"})
"""Only weights are that small: arithmetic in float is what such a model asks for."""
REFORMATTING = frozenset(
    {"Reorder", "ReorderInput", "ReorderOutput", "Transpose", "Convert", "Cast", "MemcpyToHost",
     "MemcpyFromHost", "Reformat"}
)  # fmt: skip
ALONE = frozenset({"QuantizeLinear", "DequantizeLinear", "FakeQuantize"})


def shares(kernels: Sequence[Kernel], key: Callable[[Kernel], str]) -> dict[str, float]:
    """Share of the kernels' time by what `key` says of each, largest first; 0..1."""
    totals: Counter[str] = Counter()
    for kernel in kernels:
        totals[key(kernel)] += kernel.microseconds  # type: ignore[assignment]  # typeshed: int
    whole = sum(totals.values()) or 1
    return {name: time / whole for name, time in totals.most_common()}


def share_of(kernels: Sequence[Kernel], operators: Iterable[str]) -> float:
    """Share of the time that these operators take, 0..1."""
    told = shares(kernels, lambda kernel: kernel.operator)
    return sum(told.get(name, 0.0) for name in operators)


def provider_shares(placement: Placement, kernels: Sequence[Kernel]) -> dict[str, float]:
    """Share of the time by provider; of the nodes where the runtime profiles no times, 0..1."""
    if told := shares([k for k in kernels if k.provider], lambda kernel: kernel.provider):
        return told
    whole = sum(placement.providers.values())
    return {name: count / whole for name, count in placement.providers.items()}


def elsewhere(placement: Placement, told: dict[str, float]) -> str | None:
    """Say what ran on another provider than the one asked for, or None."""
    others = [
        f"{share:.0%} on {name}" for name, share in told.items() if name != placement.provider
    ]
    return f"asked for {placement.provider}, ran {', '.join(others)}" if others else None


def other_precision(asked: Precision, placement: Placement) -> str | None:
    """Say that nothing ran in the precision of the file, or None.

    None too where the runtime does not tell, and for what it may choose by itself.
    """
    ran = placement.precisions
    allowed = {asked, "unknown", *CHOSEN_BY_RUNTIME.get(asked, ())}
    if not ran or allowed & set(ran) or asked in FLOAT_RIGHTLY:
        return None
    told = ", ".join(f"{name} {count}" for name, count in ran.items())
    return f"the model is {asked}, but no operator ran in it (ran: {told})"
