"""A running Triton, over gRPC: load a model, ask it, compare."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from deploykit._lazy import needs
from deploykit.bundle.golden import Agreement
from deploykit.errors import AnswerIsNo, InputError, MissingError
from deploykit.values import Array, Feed


@contextmanager
def connected(url: str, timeout_s: float) -> Iterator[tuple[Any, float]]:
    """A client and its time limit. Raises MissingError: nothing is live at this address."""
    with needs("tritonclient"):
        from tritonclient.grpc import InferenceServerClient, InferenceServerException

    client = InferenceServerClient(url)
    try:
        try:
            live = client.is_server_live(client_timeout=timeout_s)
        except InferenceServerException as error:
            raise _unreachable(url, error) from error
        if not live:
            raise _unreachable(url, "it is not live")
        yield client, timeout_s
    finally:
        client.close()


def load(connection: tuple[Any, float], name: str, version: int) -> None:
    """Load a model as its configuration now says, until this version is ready.

    Raises InputError: the server refuses it, in its own words.
    """
    from tritonclient.grpc import InferenceServerException

    client, timeout_s = connection
    try:
        client.load_model(name, client_timeout=timeout_s)
        ready = client.is_model_ready(name, str(version), client_timeout=timeout_s)
    except InferenceServerException as error:
        raise InputError(
            f"the server refuses version {version} of {name}: {error.message()}",
            hint="the repository is as it was, older versions serve on; start Triton with "
            "--model-control-mode=explicit if it says that loading is not allowed",
        ) from error
    if not ready:
        raise InputError(
            f"the server loaded {name}, and version {version} is not ready",
            hint="the repository is as it was; see the server's log",
        )


def reload(name: str, url: str, timeout_s: float, *, gone: bool) -> None:
    """Make the server follow a configuration that was put back, or that is gone."""
    from tritonclient.grpc import InferenceServerException

    with connected(url, timeout_s) as (client, limit):
        try:
            if gone:
                client.unload_model(name, client_timeout=limit)
            else:
                client.load_model(name, client_timeout=limit)
        except InferenceServerException as error:
            raise InputError(f"{name}: {error.message()}", hint="see the server's log") from error


def ask(
    connection: tuple[Any, float], name: str, version: int, feed: Feed, batch_size: int
) -> dict[str, Array]:
    """The server's outputs over the feed, at most `batch_size` samples a request.

    Raises InputError: the server refuses a request.
    """
    from tritonclient.grpc import InferenceServerException

    client, timeout_s = connection
    config = client.get_model_config(name, str(version), client_timeout=timeout_s).config
    step = min(batch_size, config.max_batch_size or batch_size)
    samples = len(next(iter(feed.values())))
    names = [output.name for output in config.output]
    parts = []
    for start in range(0, samples, step):
        inputs = [_input(n, array[start : start + step]) for n, array in feed.items()]
        try:
            result = client.infer(name, inputs, str(version), client_timeout=timeout_s)
        except InferenceServerException as error:
            raise InputError(
                f"the server does not answer the golden inputs: {error.message()}",
                hint="the repository is as it was; see the server's log",
            ) from error
        parts.append([np.array(result.as_numpy(n)) for n in names])
    return {
        n: np.concatenate(column) for n, column in zip(names, zip(*parts, strict=True), strict=True)
    }


def check_answer(agreement: Agreement, name: str, url: str) -> float | None:
    """The largest difference. Raises AnswerIsNo: it is out of tolerance."""
    if agreement.problem:
        raise AnswerIsNo(
            f"{name} on {url} answers the golden inputs differently: {agreement.problem}",
            hint="the repository is as it was; the server's runtime or CPU is another one",
        )
    return agreement.max_error if math.isfinite(agreement.max_error) else None


def _input(name: str, array: Array) -> Any:
    from tritonclient.grpc import InferInput
    from tritonclient.utils import np_to_triton_dtype

    tensor = InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(np.ascontiguousarray(array))
    return tensor


def _unreachable(url: str, why: object) -> MissingError:
    return MissingError(
        f"no Triton answers at {url}: {why}",
        hint="give its gRPC address (usually port 8001); the repository is as it was",
    )
