"""Signed by a local key; each way to break it is told apart."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("model_signing", reason="model-signing is not installed: deploykit[sign]")

from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from deploykit.bundle import BundleError, PackageOptions, package, sign, verify
from deploykit.dataset import Dataset
from deploykit.errors import InputError, UsageError
from deploykit.formats import onnx_check
from deploykit.values import Artifact


def write_key(path: Path, private: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> Path:
    path.write_bytes(
        private.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    )
    public = private.public_key().public_bytes(
        pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo
    )
    path.with_suffix(".pub").write_bytes(public)
    return path


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_key(
        tmp_path_factory.mktemp("keys") / "key.pem", ec.generate_private_key(ec.SECP256R1())
    )


@pytest.fixture
def signed(bundle: Path, key: Path) -> Path:
    sign(bundle, key)
    return bundle


def code(bundle: Path, key: Path, **more: int) -> str:
    with pytest.raises(BundleError) as caught:
        verify(bundle, public_key=key.with_suffix(".pub"), **more)
    assert caught.value.exit_code == 5
    return caught.value.code


def test_a_signed_bundle(signed: Path, key: Path):
    assert "signature is sound" in str(verify(signed, public_key=key.with_suffix(".pub")))
    assert "NOT CHECKED BY WHOM" in str(verify(signed))
    assert [p.name for p in signed.parent.iterdir()] == ["bundle"]


def test_a_model_is_read_apart_only_where_nobody_signed_for_it(
    signed: Path, key: Path, monkeypatch: pytest.MonkeyPatch
):
    read: list[Path] = []
    monkeypatch.setattr(onnx_check, "check", read.append)
    verify(signed, public_key=key.with_suffix(".pub"))
    assert read == []
    verify(signed)
    assert [path.name for path in read] == ["model.onnx"]


def test_the_library_itself_takes_the_signature(signed: Path, key: Path):
    from model_signing import verifying

    config = verifying.Config().use_elliptic_key_verifier(public_key=key.with_suffix(".pub"))
    config.verify(signed, signed / "signature.json")
    (signed / ".gitignore").write_text("*")
    assert code(signed, key) == "SIGNATURE"


def test_each_fault_has_its_own_code(signed: Path, key: Path, tmp_path: Path):
    other = write_key(tmp_path / "other.pem", ec.generate_private_key(ec.SECP384R1()))
    assert code(signed, other) == "WRONG_KEY"
    assert code(signed, key, min_version=4) == "OLD_VERSION"
    signature = signed / "signature.json"
    text = signature.read_text()
    for end in (0, 1, len(text) // 2):
        signature.write_text(text[:end])
        assert code(signed, key) == "SIGNATURE"
    signature.unlink()
    assert code(signed, key) == "UNSIGNED"


def test_an_edited_payload(signed: Path, key: Path):
    path = signed / "signature.json"
    document = json.loads(path.read_text())
    payload = base64.b64decode(document["dsseEnvelope"]["payload"]).replace(b"a", b"b", 1)
    document["dsseEnvelope"]["payload"] = base64.b64encode(payload).decode()
    path.write_text(json.dumps(document))
    assert code(signed, key) == "SIGNATURE"


def test_a_forger_who_writes_a_new_manifest(signed: Path, key: Path):
    manifest = json.loads((signed / "manifest.json").read_text())
    (signed / "manifest.json").write_text(json.dumps({**manifest, "version": 9}))
    assert verify(signed).version == 9
    assert code(signed, key, min_version=9) == "SIGNATURE"


def test_all_problems_are_told_with_the_signature(signed: Path, key: Path):
    (signed / "signature.json").unlink()
    (signed / "extra").write_text("?")
    with pytest.raises(BundleError) as caught:
        verify(signed, public_key=key.with_suffix(".pub"), min_version=7)
    assert len(caught.value.problems) == 3


def test_a_signature_of_another_bundle(signed: Path, key: Path, sound: Path, tmp_path: Path):
    other = Path(shutil.copytree(sound, tmp_path / "other"))
    (other / "evidence.json").write_text("{}")
    shutil.copy(signed / "signature.json", other)
    assert code(other, key) == "SIGNATURE"


def test_signing_twice_and_what_is_damaged(signed: Path, key: Path):
    with pytest.raises(UsageError, match="signed already"):
        sign(signed, key)
    sign(signed, key, force=True)
    (signed / "evidence.json").write_text("{}")
    with pytest.raises(BundleError):
        sign(signed, key, force=True)


@pytest.mark.parametrize("kind", ["ed25519", "text", "missing"])
def test_keys_that_cannot_be_used(bundle: Path, tmp_path: Path, kind: str):
    path = tmp_path / "odd.pem"
    if kind == "ed25519":
        write_key(path, ed25519.Ed25519PrivateKey.generate())
    elif kind == "text":
        path.write_text("no key")
    with pytest.raises(InputError, match="no key that can be used"):
        sign(bundle, path)
    assert not (bundle / "signature.json").exists()


def test_an_image_layout_is_signed_too(linear: Artifact, data: Dataset, key: Path, tmp_path: Path):
    out = tmp_path / "oci"
    package([(linear, "ort-cpu")], PackageOptions(layout="oci"), out=out, data=data)
    sign(out, key)
    assert verify(out, public_key=key.with_suffix(".pub")).golden_max_error == 0.0
