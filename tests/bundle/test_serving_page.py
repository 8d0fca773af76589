"""The server in SERVING.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

import deploykit

TEXT = (Path(deploykit.__file__).parent / "SERVING.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_the_server_of_the_page(sound: Path):
    from fastapi.testclient import TestClient

    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    code = code.replace('"bundle", public_key="key.pub.pem"', repr(str(sound)))
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102
    with TestClient(names["app"]) as client:  # type: ignore[arg-type]
        found = client.post("/predict", json={"x": [[0, 0, 0], [1, 2, 3]]})
        assert found.status_code == 200
        assert len(found.json()["y"]) == 2
        for bad in ({}, {"x": [[1, 2]]}, {"x": [["a", "b", "c"]]}):
            assert client.post("/predict", json=bad).status_code == 400
