"""How the models of a bundle lie in it, one module a layout."""

from __future__ import annotations

from deploykit.layouts import kserve, plain, triton
from deploykit.layouts.interface import Laid, Layout, Member, Serving, batched

__all__ = ["LAYOUTS", "Laid", "Layout", "Member", "Serving", "batched"]

LAYOUTS: dict[str, Layout] = {
    "plain": plain.lay,
    "triton": triton.lay,
    "kserve": kserve.lay,
    "oci": triton.lay,
}
"""`oci` holds a Triton repository, its files as blobs (see `layouts/oci.py`)."""
