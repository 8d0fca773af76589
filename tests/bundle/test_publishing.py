"""A live repository without a server: what lies where, and that a failure leaves it as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploykit import _files
from deploykit.bundle import PackageOptions, PublishOptions, package, publish, rollback
from deploykit.bundle.publishing import served_versions
from deploykit.dataset import Dataset
from deploykit.errors import IntegrityError, MissingError, UsageError
from deploykit.values import Artifact


@pytest.fixture
def made(linear: Artifact, data: Dataset, tmp_path: Path) -> dict[int, Path]:
    """Three versions."""
    found = {}
    for version in (1, 2, 3):
        options = PackageOptions(name="net", layout="triton", version=version)
        found[version] = tmp_path / f"v{version}"
        package([(linear, "ort-cpu")], options, out=found[version], data=data)
    return found


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def test_versions_come_and_go(made: dict[int, Path], repository: Path):
    net = repository / "net"
    for version in (1, 2, 3):
        publish(made[version], repository)
    assert served_versions(net) == (2, 3)
    assert (net / "3" / "model.onnx").read_bytes() == (made[3] / "net/3/model.onnx").read_bytes()
    assert "v3_input_0" in (net / "config.pbtxt").read_text()
    assert rollback(repository, "net").version == 2
    assert served_versions(net) == (2,)
    assert rollback(repository, "net").version == 1
    with pytest.raises(UsageError, match="nothing before version 1"):
        rollback(repository, "net")


def test_a_number_is_not_used_twice(
    made: dict[int, Path], repository: Path, linear: Artifact, data: Dataset, tmp_path: Path
):
    publish(made[1], repository)
    publish(made[2], repository)
    with pytest.raises(UsageError, match="serves version 2, 1 is not newer"):
        publish(made[1], repository)
    rollback(repository, "net")
    other = tmp_path / "other"
    options = PackageOptions(name="net", layout="triton", version=2, max_queue_size=9)
    package([(linear, "ort-cpu")], options, out=other, data=data)
    with pytest.raises(UsageError, match="was another bundle"):
        publish(other, repository)
    assert publish(made[2], repository).version == 2


def test_what_a_kill_left_of_a_version_is_not_served(made: dict[int, Path], repository: Path):
    net = repository / "net"
    publish(made[1], repository)
    (net / "2").mkdir()
    (net / "2" / "model.onnx").write_text("of another bundle, whose publish was killed twice")
    publish(made[2], repository)
    assert (net / "2" / "model.onnx").read_bytes() == (made[2] / "net/2/model.onnx").read_bytes()


def test_a_failure_leaves_all_as_it_was(made: dict[int, Path], repository: Path):
    (made[1] / "extra").write_text("?")
    with pytest.raises(IntegrityError):
        publish(made[1], repository)
    assert not repository.exists()
    publish(made[2], repository)
    before = {name: _files.sha256(repository / name) for name in _files.tree(repository)}
    with pytest.raises(MissingError, match="no Triton answers"):
        publish(made[3], repository, PublishOptions(url="127.0.0.1:9", timeout_s=1))
    assert {name: _files.sha256(repository / name) for name in _files.tree(repository)} == before
