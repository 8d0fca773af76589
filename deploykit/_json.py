"""Plain data as JSON: strict where it is written, an object without surprises where it is read."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from deploykit.errors import InputError
from deploykit.values import Json


def text(plain: Any) -> str:
    """Plain data as strict JSON for any reader: null for NaN and infinity, which JSON lacks."""
    return json.dumps(_finite(plain), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> Json:
    """Read a JSON object. Raises InputError: missing, not JSON, not an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}", hint="make it again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a JSON object", hint="make it again")
    return data


def unique_keys(pairs: list[tuple[str, Any]]) -> Json:
    """A JSON object without repeated keys, for `json.loads`. Raises ValueError."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"key {key!r} is given {count} times")
    return dict(pairs)
