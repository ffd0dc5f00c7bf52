"""The command line: reads arguments, calls one function of `lora_export.api`, prints its result, exits.

One file a command, loaded when it is called; heavy packages are imported inside the commands, so
that `--help` is instant. stdout carries the print_document, stderr the story. This is the one place where
an error becomes a line and a number.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import click

from lora_export import __version__
from lora_export.cli import startup
from lora_export.errors import EnvironmentLacking, LoraExportError, OutputFailed, one_line, printable

# Job -> command -> its help in one line, so that `lora-export --help` imports no command.
JOBS = {
    "Adapters": {
        "train": "Train a LoRA adapter and save it in PEFT's format.",
        "inspect": "Show what an adapter, a checkpoint or a graph contains.",
        "convert": "Convert an adapter for an existing ONNX graph.",
    },
    "Deployment": {
        "merge": "Merge adapters into the weights of a checkpoint or a graph.",
        "onnx": "Export to ONNX: adapters merged, as nodes, as inputs, or per row.",
        "torchscript": "Export to TorchScript: adapters merged or as nodes.",
    },
    "Proof": {
        "verify": "Prove that a file computes what the PyTorch model computes.",
        "doctor": "Check the installed packages and the execution providers.",
    },
    "Help": {
        "guide": "Show a page of the guide.",
    },
}
COMMANDS = {name: line for commands in JOBS.values() for name, line in commands.items()}

# Packages that commands import. A missing one ends with a message, not with a traceback.
PACKAGES = frozenset({"ml_dtypes", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "safetensors", "torch"})


PATIENCE = 1.0  # seconds
NO_THREAD = "can't start new thread"  # Python's message where there is no memory for the stack of a thread


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
        for job, commands in JOBS.items():
            with formatter.section(job):
                formatter.write_dl(list(commands.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lora-export")
def cli() -> None:
    """Put LoRA adapters into production: merge them, export them, and prove that nothing was lost.

    \b
    Exit codes: 0 done, 2 wrong usage, 3 input refused, 4 verdict `different`,
    5 verdict `undecided`, 6 environment, 7 output not written,
    8 exporter or runtime refused the model, 130 Ctrl-C, 143 SIGTERM.
    """


class Terminated(KeyboardInterrupt):
    """SIGTERM ends a command as Ctrl-C does, so that unfinished outputs are removed."""


@contextlib.contextmanager
def _signals_unwind(*, for_good: bool) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into exceptions. A second one within PATIENCE is ignored while the first cleans up.

    A later one counts again: a library may have swallowed the first. Where the process ends afterwards (`for_good`),
    both signals are ignored from then on: Python would end with another exit code.
    """
    last = -math.inf

    def unwind(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the handler's signature
        nonlocal last
        if time.monotonic() - last > PATIENCE:
            last = time.monotonic()
            raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt

    previous = {number: signal.signal(number, unwind) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if for_good else handler)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its exit code."""
    # Waiting threads of PyTorch sleep instead of spinning. Training, measured on 2 cores: 1.1 times the time on an idle
    # machine, and a quarter of the time on a busy one such as a CI machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may not be text, and a terminal may lack letters
            stream.reconfigure(errors="backslashreplace")
    if arguments is None:
        startup.take_process()
    with _signals_unwind(for_good=arguments is None):
        code = run(arguments)
    sys.exit(code)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    line, stdout = sys.argv[1:] if arguments is None else arguments, sys.stdout
    if "lora_export.storage.atomic_output" in sys.modules:  # an earlier run in this process
        sys.modules["lora_export.storage.atomic_output"].published.clear()
    try:
        result = cli.main(arguments, prog_name="lora-export", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        # Ctrl-C and Terminated. click turns both into Abort where it catches them.
        return _stopped(terminated=isinstance(error, Terminated) or isinstance(error.__cause__, Terminated))
    except click.ClickException as error:
        usage = io.StringIO()
        error.show(usage)
        _print_error(usage.getvalue(), line)
        return error.exit_code
    except SystemExit as end:
        # rich and click raise SystemExit for a broken pipe; click also replaces stdout.
        if sys.stdout is stdout and not isinstance(end.__context__, BrokenPipeError):
            raise
        # `| head` has read enough: the code that shells report of a program that SIGPIPE ended. Windows has no SIGPIPE.
        return 128 + getattr(signal, "SIGPIPE", 13)
    except Exception as error:
        known = _known_failure(error)
        if known is None:
            raise
        message, code = known
        _print_error(f"Error: {message}", line)
        return code
    return result if isinstance(result, int) else 0


def _stopped(*, terminated: bool) -> int:
    from lora_export.errors import one_line
    from lora_export.storage import atomic_output

    left = (
        f"{one_line(str(atomic_output.published[-1]))} had been written"
        if atomic_output.published
        else "nothing was left behind"
    )
    click.echo(f"{'Terminated' if terminated else 'Stopped'}; {left}.", err=True)
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


def _known_failure(error: Exception) -> tuple[str, int] | None:
    """The message and the exit code of a failure; None for a bug of ours."""
    doctor = "`lora-export doctor` shows what is"
    if isinstance(error, LoraExportError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and _package(error) in PACKAGES:
        what = f"this command needs the package {_package(error)}, which is not installed. {doctor} missing"
        return what, EnvironmentLacking.exit_code
    if isinstance(error, ImportError) and _package(error) in PACKAGES:
        return f"the package {_package(error)} does not load: {error}. {doctor} wrong", EnvironmentLacking.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return f"there is not enough memory: {error}".rstrip(": "), EnvironmentLacking.exit_code
    if isinstance(error, RuntimeError) and str(error) == NO_THREAD:
        return "there is not enough memory for one more thread", EnvironmentLacking.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'the output could not be written'}: {error.strerror}", OutputFailed.exit_code
    if isinstance(error, OSError) and "shared object" in str(error):  # torch loads its libraries by itself
        return f"a library does not load: {error}. {doctor} wrong", EnvironmentLacking.exit_code
    return None


def _package(error: ImportError) -> str:
    return (error.name or "").partition(".")[0]


def _print_error(message: str, arguments: Sequence[str]) -> None:
    """Print an error on stderr. Messages may have several lines; a name of the user's is always shown in one."""
    words = list(arguments)
    with contextlib.suppress(OSError):  # the current folder was removed meanwhile
        words.append(str(Path.cwd()))
    for part in {part for word in words for part in word.split("/") if "\n" in part}:
        message = message.replace(part, one_line(part))
    with contextlib.suppress(OSError):  # stderr is full or closed: the exit code remains
        click.echo(printable(message).rstrip("\n"), err=True)
