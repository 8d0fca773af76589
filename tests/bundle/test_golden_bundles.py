"""A bundle of every released format verifies for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploykit.bundle import verify
from tests.conftest import ROOT

BUNDLES = sorted((ROOT / "tests" / "golden").iterdir())


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda p: p.name)
def test_a_bundle_of_an_earlier_release_verifies(bundle: Path) -> None:
    assert "golden" in str(verify(bundle))


def test_there_is_one_of_each_format() -> None:
    assert [p.name for p in BUNDLES] == ["bundle-1", "bundle-2"]


def test_the_signature_of_an_earlier_release_verifies() -> None:
    pytest.importorskip("model_signing", reason="model-signing is not installed: deploykit[sign]")
    key = Path(__file__).with_name("golden_bundle_2.pub.pem")
    bundle = ROOT / "tests" / "golden" / "bundle-2"
    assert "signature is sound" in str(verify(bundle, public_key=key, min_version=2))


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda p: p.name)
def test_a_bundle_tells_no_path_of_the_machine_that_made_it(bundle: Path) -> None:
    for path in bundle.rglob("*.json"):
        assert "calibration_data/" not in path.read_text().replace('"calibration_data"', "")
