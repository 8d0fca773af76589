"""The server in SERVING.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: deploykit[test]")
pytest.importorskip("httpx2", reason="httpx2 is not installed: deploykit[test]")

import deploykit

TEXT = (Path(deploykit.__file__).parent / "SERVING.md").read_text()


def test_the_server_of_the_page(sound: Path):
    from fastapi.testclient import TestClient

    code = next(c for c in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "FastAPI" in c)
    code = code.replace('"bundle", public_key="key.pub.pem"', repr(str(sound)))
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102
    with TestClient(names["app"]) as client:  # type: ignore[arg-type]
        found = client.post("/predict", json={"x": [[0, 0, 0], [1, 2, 3]]})
        assert found.status_code == 200
        assert len(found.json()["y"]) == 2
        for bad in ({}, {"x": [[1, 2]]}, {"x": [["a", "b", "c"]]}, {"x": []}, {"x": [[1], [2, 3]]}):
            assert client.post("/predict", json=bad).status_code == 400
        for torn in ('{"x": [[1', "[1, 2]", "", '{"x": 3}'):
            assert client.post("/predict", content=torn).status_code == 422
        large = client.post("/predict", json={"x": [[0, 0, 0]] * 50_000})
        assert (large.status_code, len(large.json()["y"])) == (200, 50_000)
        assert client.post("/predict", json={"x": [[1, 2, 3]]}).status_code == 200
