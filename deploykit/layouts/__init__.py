"""How the models of a bundle lie in it, one module a layout."""

from __future__ import annotations

from deploykit.layouts import plain, triton
from deploykit.layouts.interface import Layout, Placed, Serving, batched

__all__ = ["LAYOUTS", "Layout", "Placed", "Serving", "batched"]

LAYOUTS: dict[str, Layout] = {"plain": plain.place, "triton": triton.place}
