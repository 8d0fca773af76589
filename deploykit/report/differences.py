"""How outputs differ, as lines of text."""

from __future__ import annotations

from deploykit.values import Artifact, Difference


def difference(found: Difference) -> str:
    """How an output differs, in a line."""
    argmax = "" if found.agreement is None else f", same argmax {found.agreement:.4f}"
    return (
        f"{found.output}: max |difference| {found.max_absolute:.3g} "
        f"({found.max_relative:.3g} of the largest), cosine {found.cosine:.6f}, "
        f"SQNR {found.sqnr_db:.1f} dB{argmax}"
    )


def proof(artifact: Artifact) -> list[str]:
    """What the export proved: each output against PyTorch, and at which sizes on what."""
    facts = artifact.facts
    lines = [
        "  " + difference(Difference(output=name, **found))
        for name, found in facts.get("outputs", {}).items()
    ]
    for name, sizes in facts.get("dynamic", {}).items():
        refused = ", ".join(map(str, sizes["refused_by_the_model"]))
        lines.append(
            f"  {name} {', '.join(map(str, sizes['checked']))} checked on {facts['verified_on']}"
            + (f"; PyTorch itself refuses {refused}" if refused else "")
        )
    return lines
