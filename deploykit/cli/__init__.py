"""The command line. `--help` loads no heavy library: commands are imported when they are called."""

from __future__ import annotations

import importlib

import click

from deploykit.cli import _errors

COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("tell", "Say what works here, and why the rest does not."),
    "inspect": ("tell", "Say what a model is: inputs, operators, history, facts."),
    "prune": ("torch_stages", "Remove channels of a PyTorch model."),
    "distill": ("torch_stages", "Train a student to follow a teacher."),
    "export": ("torch_stages", "Export a PyTorch model to ONNX, proven against PyTorch."),
    "convert": (
        "onnx_stages",
        "Rewrite an ONNX model in FP16, BF16 or a newer opset, proven on data.",
    ),
    "quantize": (
        "onnx_stages",
        "Quantize an ONNX model to INT8, FP8 or INT4 Q/DQ, on calibration data.",
    ),
    "build": ("onnx_stages", "Build a TensorRT engine from an ONNX model."),
    "evaluate": ("measure", "Score a model on data."),
    "compare": ("measure", "Compare the outputs of two models on data."),
    "bench": ("bench", "Time models, each in its own process, interleaved."),
    "package": ("ship", "Pack a model into a verified bundle for a server."),
    "sign": ("ship", "Sign a bundle with a local key."),
    "verify": ("ship", "Check a bundle: signature, files, machine, golden inputs."),
    "publish": ("ship", "Put a bundle into a live Triton repository, or leave it as it was."),
    "rollback": ("ship", "Serve the version before the newest one again."),
    "run": ("run", "Go the whole way of a recipe, with gates; resumable."),
}
"""Name to its module here and its one line of help."""


class Commands(click.Group):
    """A group that imports a command when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the way of a model."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the module of the command."""
        del ctx
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"deploykit.cli.{COMMANDS[name][0]}")
        command: click.Command = getattr(module, f"{name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Say what was meant when the name is unknown."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise _errors.unknown_command(args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="deploykit")
@click.option("--traceback", is_flag=True, help="Show where an error comes from.")
def group(*, traceback: bool) -> None:
    """From a trained PyTorch or ONNX model to a measured, verified engine bundle."""
    del traceback  # `_errors` reads it from the arguments


def run_command_line() -> None:
    """Run the command that the process was started with, and exit."""
    raise SystemExit(_errors.call(group))
