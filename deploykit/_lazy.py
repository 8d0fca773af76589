"""Heavy libraries are imported where they are used, under `needs`."""

from __future__ import annotations

from importlib.util import find_spec
from types import TracebackType

from deploykit.errors import MissingError

INSTALL = {
    "onnxruntime": "pip install 'deploykit[cpu]' (or 'deploykit[gpu]' on a GPU host)",
    "openvino": "pip install 'deploykit[cpu]'",
    "tensorrt": "pip install 'deploykit[tensorrt]' with the vendor's package index",
    "tensorrt_rtx": "pip install 'deploykit[tensorrt-rtx]'",
    "mlperf_loadgen": "pip install 'deploykit[loadgen]'",
    "model_signing": "pip install 'deploykit[sign]'",
    "tritonclient": "pip install 'deploykit[triton]'",
}


def installed(library: str) -> bool:
    """Whether a library can be found; it is not imported."""
    try:
        return find_spec(library) is not None
    except (ImportError, ValueError):  # a finder, or an entry in sys.modules, forbids it
        return False


class needs:  # noqa: N801 - reads as a statement: `with needs("torch"): import torch`
    """Turn an ImportError of `library` inside the block into MissingError with what to install."""

    def __init__(self, library: str) -> None:
        self.library = library

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, ImportError):
            raise MissingError(
                f"{self.library} cannot be imported: {error}",
                hint=INSTALL.get(self.library, f"pip install {self.library}"),
            ) from error
