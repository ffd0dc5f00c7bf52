"""The command line: reads arguments, strings the doers together, prints, exits.

One file a command, loaded when it is called; heavy packages are imported inside the commands, so
that `--help` is instant. stdout carries the answer, stderr the story. This is the one place where
an error becomes a line and a number.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import click

from lora_export import __version__
from lora_export.errors import EnvironmentLacking, LoraExportError, printable

# name -> its one-line help, so that `lora-export --help` loads no command
COMMANDS = {
    "inspect": "Show what an adapter or a checkpoint holds.",
    "merge": "Merge adapters into a checkpoint's weights.",
    "onnx": "Export to ONNX, adapters merged or as graph nodes.",
    "torchscript": "Export to TorchScript, adapters merged or attached.",
    "verify": "Prove that a file computes what the PyTorch model computes.",
    "train": "Train a LoRA adapter.",
    "doctor": "Say what is installed and which providers really load.",
}

# What commands import besides our own files; one that is missing is told, not traced.
PACKAGES = frozenset({"ml_dtypes", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "safetensors", "torch"})


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, each from its own file."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"lora_export.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lora-export")
def cli() -> None:
    """Put LoRA adapters into production: merge, export, and prove that nothing was lost.

    \b
    Exit codes: 0 done, 2 usage, 3 input refused, 4 different, 5 undecided,
    6 environment, 7 output, 8 exporter or runtime refused the model.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM: leave like Ctrl-C does, so that stages are removed on the way out."""


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    def unwind(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the handler's signature
        raise Terminated

    previous = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the code of what happened."""
    # PyTorch's threads sleep while they wait, instead of spinning. Measured on 2 cores, training: 1.1 times the time
    # where the machine is idle, a quarter of it where others compute too, as on a CI machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _sigterm_unwinds():
        sys.exit(run(arguments))


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        result = cli.main(arguments, prog_name="lora-export", standalone_mode=False)
    except click.exceptions.Abort as error:  # what click makes of Ctrl-C, and so of Terminated
        terminated = isinstance(error.__cause__, Terminated)
        click.echo(f"{'Terminated' if terminated else 'Stopped'}; nothing was left behind.", err=True)
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except LoraExportError as error:
        click.echo(f"Error: {printable(str(error))}", err=True)
        return error.exit_code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES:
            raise
        click.echo(
            f"Error: this command needs the package {package}, which is not installed. `lora-export doctor` says what "
            "is missing",
            err=True,
        )
        return EnvironmentLacking.exit_code
    return result if isinstance(result, int) else 0
