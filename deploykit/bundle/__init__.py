"""Bundles: models packaged with what it takes to verify and serve them; see BUNDLE_FORMAT.md."""

from __future__ import annotations

from deploykit.bundle.loading import Loaded, load
from deploykit.bundle.manifest import Bundle, BundleError, Engine, FileEntry, Requirements
from deploykit.bundle.packaging import PackagedModel, PackageOptions, package
from deploykit.bundle.publishing import Published, PublishOptions, publish, rollback
from deploykit.bundle.rebuilding import Origin, Rebuilt, origin, prove
from deploykit.bundle.signature import sign
from deploykit.bundle.verification import EngineCheck, Verification, verify

__all__ = [
    "Bundle",
    "BundleError",
    "Engine",
    "EngineCheck",
    "FileEntry",
    "Loaded",
    "Origin",
    "PackageOptions",
    "PackagedModel",
    "PublishOptions",
    "Published",
    "Rebuilt",
    "Requirements",
    "Verification",
    "load",
    "origin",
    "package",
    "prove",
    "publish",
    "rollback",
    "sign",
    "verify",
]
