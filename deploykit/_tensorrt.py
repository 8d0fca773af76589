"""What is said of TensorRT by those who build engines and by those who run them."""

from __future__ import annotations

from typing import Any

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
DISTRIBUTIONS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}
"""By flavour: the module to import, and the distribution whose version an engine is bound to."""
_KEPT = 50


def logger(trt: Any) -> Any:
    """A logger that keeps what it hears: TensorRT reports by None and the log, not by raising."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            first = (message.splitlines() or [""])[0]
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(first)
            elif severity == trt.ILogger.Severity.WARNING and first not in self.warnings:
                self.warnings = [*self.warnings, first][:_KEPT]

        def told(self) -> str:
            return self.errors[-1] if self.errors else "no reason given"

    return Logger()
