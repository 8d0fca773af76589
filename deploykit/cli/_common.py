"""What several commands share: models, data, output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import click

from deploykit import _files, _json
from deploykit._code import beside, split_reference
from deploykit._shapes import parse_inputs
from deploykit.cli._errors import Shown
from deploykit.dataset import Dataset, open_dataset
from deploykit.errors import InputError, UsageError
from deploykit.formats import open_model
from deploykit.formats.torch_module import EXAMPLE_INPUTS
from deploykit.stages.take import TakeOptions, is_program, take
from deploykit.values import Artifact, Json, StageRecord, TensorSpec, Value

F = TypeVar("F", bound=Callable[..., Any])

JSON_HINT = """write '{"width": 24}'"""

output_option = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Where the result goes."
)
force_option = click.option("--force", is_flag=True, help="Replace what is there.")


def _reserve_stdout(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """Keep stdout for the document: what a user's function or a library prints goes to stderr."""
    del option
    if value:
        context.meta[STDOUT] = sys.stdout
        context.with_resource(redirect_stdout(sys.stderr))
    return value


STDOUT = "deploykit.stdout"
"""Where a command's context keeps the real stdout while --json reserves it."""
json_option = click.option(
    "--json", "as_json", is_flag=True, callback=_reserve_stdout, help="Print one JSON document."
)
backend_option = click.option("--backend", help="As `deploykit doctor` names them: ort-cpu, ...")
threads_option = click.option(
    "--threads", type=click.IntRange(1), default=None, help="Threads of the runtime."
)


def data_option(
    role: str = "--data", *, required: bool = True, text: str = "Data."
) -> Callable[[F], F]:
    """An option that takes a data reference."""
    text += " An .npz, a folder of them or of images, or file.py:function."
    return click.option(role, "data", required=required, help=text)


def factory_options(command: F) -> F:
    """Options for a model that is given as a factory."""
    for option in reversed(
        (
            click.option(
                "--weights",
                type=click.Path(path_type=Path),
                help="Checkpoint of a factory: .safetensors, or a .pt state dict.",
            ),
            click.option("--model-args", default="{}", help="Arguments of a factory, as JSON."),
            click.option(
                "--input-shape",
                "input_shapes",
                multiple=True,
                help="Input of a factory's model: name:1x3x224x224 or name:1x128:int64; "
                "the first axis is the batch. By default what example_inputs() beside the factory "
                "gives, else the data's.",
            ),
            click.option(
                "--dynamic-axis",
                "dynamic_axes",
                multiple=True,
                help="A dynamic axis, named, and its range if it has one: images:0=batch, "
                "input_ids:1=sequence[1..512].",
            ),
            click.option("--output-name", "output_names", multiple=True, help="Name of an output."),
        )
    ):
        command = option(command)
    return command


def is_factory(reference: str) -> bool:
    """Whether a model reference names what is to be taken in: a function, or a program."""
    return is_program(reference) or (":" in reference and not Path(reference).exists())


def model(
    reference: str, given: dict[str, Any], data: Dataset | None = None, *, native: bool = False
) -> Artifact:
    """Open a model; a factory is first written to a temporary torch artifact.

    With `native` it may be an ONNX file that only native code of others can run.
    Raises UsageError: a factory's options with a model that is none, or JSON that is none.
    """
    if not is_factory(reference):
        for name in ("weights", "input_shapes", "dynamic_axes", "output_names"):
            if given.get(name):
                raise UsageError(
                    f"--{name.rstrip('s').replace('_', '-')} goes with a factory, "
                    f"{reference} is a model on disk",
                    hint="leave it out: the model knows",
                )
        return open_model(reference, native=native)
    options = TakeOptions(
        factory=reference,
        arguments=_arguments(given.get("model_args", "{}")),
        weights=given.get("weights"),
        inputs=_inputs(reference, given, data),
        dynamic_axes=given.get("dynamic_axes", ()),
        outputs=given.get("output_names", ()),
    )
    folder = click.get_current_context().with_resource(_files.scratch())
    name = split_reference(reference)[1].replace("/", "_")
    return take(options, out=folder / name)


def on_disk(reference: str) -> Artifact:
    """Open a model that is compared with; a factory would bring weights of its own making.

    Raises UsageError: it is a factory.
    """
    if is_program(reference):
        return model(reference, {})
    if is_factory(reference):
        raise UsageError(
            f"{reference} is a factory, and a model to compare with needs its trained weights",
            hint="write it to disk first: deploykit export FACTORY --weights FILE -o m.onnx",
        )
    return open_model(reference)


def _inputs(reference: str, given: dict[str, Any], data: Dataset | None) -> tuple[TensorSpec, ...]:
    """As they were given, else the data's; () where the model itself is to say.

    Raises UsageError: of another form than `parse_inputs` takes.
    """
    specs = parse_inputs(given.get("input_shapes", ()))
    knows = is_program(reference) or beside(reference, EXAMPLE_INPUTS) is not None
    return specs or (data.specs() if data is not None and not knows else ())


def _arguments(text: str) -> Json:
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"--model-args {text!r}: {error}", hint="""write '{"width": 24}'"""
        ) from error
    if not isinstance(arguments, dict):
        raise UsageError(f"--model-args {text!r} is no object", hint=JSON_HINT)
    return arguments


def data(reference: str | None) -> Dataset | None:
    """Open data, or None. Raises InputError: it is the word `random`."""
    if reference == "random":
        raise InputError("random data would give a meaningless result here", hint="give real data")
    return open_dataset(reference) if reference else None


def required_data(reference: str) -> Dataset:
    """Open data that must be real."""
    opened = data(reference)
    if opened is None:
        raise InputError("the data reference is empty", hint="give real data")
    return opened


def show(value: Value | Json, text: str, *, as_json: bool, schema: str = "") -> None:
    """Print a result: text, or one JSON document with a `schema` key."""
    if not as_json:
        click.echo(text)
        return
    plain = value.model_dump(mode="json", by_alias=True) if isinstance(value, Value) else value
    document = plain if "schema" in plain else {"schema": schema, **plain}
    context = click.get_current_context()
    click.echo(_json.text(document), nl=False, file=context.meta[STDOUT])
    context.ensure_object(Shown).document = True


def made(artifact: Artifact, before: StageRecord | None, *, as_json: bool) -> None:
    """Print what a stage made, or kept if it is as it was `before`."""
    from deploykit.report.made import describe

    first, *rest = describe(artifact).splitlines()
    kept = ", kept: made before of the same inputs, options and versions"
    first += kept if before and before == artifact.history[-1] else ""
    text = "\n".join([f"{artifact.path}: {first}", *rest])
    show(artifact, text, as_json=as_json, schema="deploykit.artifact/1")
