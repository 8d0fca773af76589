from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib is not installed")

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator


def test_the_bom_is_strict_cyclonedx_and_has_every_file(sound: Path):
    text = (sound / "bom.cdx.json").read_text()
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"modelCard"', '"modelCrad"'))
    bom = json.loads(text)
    hashed = {c["bom-ref"]: c["hashes"][0]["content"] for c in bom["components"] if "hashes" in c}
    listed = json.loads((sound / "manifest.json").read_text())["files"]
    assert hashed == {f["path"]: f["sha256"] for f in listed if f["role"] != "bom"}
