"""The command line: reads arguments, calls one function of `lora_export.api`, prints its result, exits.

A command's file is loaded when it is called; heavy packages are imported inside the commands, so that `--help` is
instant. stdout has the result, stderr the messages. `run` is the one place where an error becomes a message and an exit
code.
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
from types import FrameType
from typing import Any

from lora_export.cli import startup
from lora_export.version import __version__

with startup.brisk_imports():
    import inspect

    import click

    from lora_export.cli import failures
    from lora_export.cli.failures import Invocation, Terminated
    from lora_export.cli.parameters import command_line_spelling, other_tools

# Job -> command -> its help in one line, so that `lora-export --help` imports no command.
JOBS = {
    "Adapters": {
        "train": "Train a LoRA adapter and save it in PEFT's format.",
        "inspect": "Show what an adapter, a checkpoint, a graph or a program contains.",
        "check": "Show what a runtime will refuse, drop or run at another strength.",
        "convert": "Convert an adapter for an existing ONNX graph.",
        "combine": "Combine adapters into one adapter.",
        "extract": "Write the adapter of what training changed in a checkpoint.",
        "resize": "Write an adapter with a lower rank.",
    },
    "Deployment": {
        "merge": "Merge adapters into the weights of a checkpoint or a graph.",
        "unmerge": "Make the base of a merge again, bit for bit.",
        "onnx": "Export to ONNX: adapters merged, as nodes, as inputs, or per row.",
        "torchscript": "Export to TorchScript: adapters merged or as nodes.",
        "generate": "Generate texts with the graphs of a model.",
        "fleet": "Plan, run and show many adapters by one file.",
    },
    "Proof": {
        "verify": "Prove that a file computes what the PyTorch model computes.",
        "doctor": "Check the installed packages and the execution providers.",
    },
    "Help": {"guide": "Show a page of the guide."},
}
COMMANDS = {name: line for commands in JOBS.values() for name, line in commands.items()}
# The file of a command, where it is not that of its name: one with a record of options beside its own.
FILE_OF_COMMAND = {
    **dict.fromkeys(("inspect", "check", "convert", "combine", "extract", "resize"), "adapters"),
    **dict.fromkeys(("onnx", "torchscript"), "export"),
}

PATIENCE = 1.0  # seconds


def command_named(name: str) -> click.Command:
    """Import the command of this name."""
    with startup.brisk_imports():
        module = importlib.import_module(f"lora_export.cli.{FILE_OF_COMMAND.get(name, name)}")
    command: click.Command = getattr(module, f"{name}_command")
    return command


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        return command_named(cmd_name) if cmd_name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; an unknown command ends with the commands that may be meant."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            import difflib  # most commands are spelled right

            meant = other_tools()["commands"].get(name) or difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f" Did you mean {' or '.join(meant)}?" if meant else ""
            ctx.fail(f"No such command '{name}'.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        for job, commands in JOBS.items():
            with formatter.section(job):
                formatter.write_dl(list(commands.items()))


def described(command: click.Command, name: str) -> dict[str, Any]:
    """A command and its parameters, as JSON."""
    parameters = []
    for parameter in command.params:
        known = parameter.to_info_dict()
        kind = known["type"]
        default = known["default"] if isinstance(known["default"], str | int | float | bool) else None
        parameters.append(
            {
                "name": parameter.name,
                "flags": [] if known["param_type_name"] == "argument" else known["opts"] + known["secondary_opts"],
                "type": kind["name"],
                "choices": list(kind.get("choices") or ()),
                "required": known["required"],
                "repeated": known["multiple"] or known["nargs"] == -1,
                "default": default,
                "help": known.get("help") or "",
            }
        )
    return {"name": name, "help": inspect.cleandoc(command.help or ""), "parameters": parameters}


def help_document(arguments: Sequence[str]) -> dict[str, Any] | None:
    """What `--help --json` prints, of all commands or of the one that is named; None where it was not given."""
    if not {"--help", "--json"} <= set(arguments):
        return None
    named = [word for word in arguments if word in COMMANDS][:1] or list(COMMANDS)
    commands = [described(command_named(name), name) for name in named]
    codes = {str(code): kind for code, kind in ({0: "done"} | failures.FAILURE_KINDS).items()}
    return {"schema": "lora-export/commands/1", "version": __version__, "exit_codes": codes, "commands": commands}


SETTINGS = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
    "auto_envvar_prefix": "LORA_EXPORT",  # LORA_EXPORT_VERIFY_PROVIDER
}


@click.group(cls=LazyGroup, context_settings=SETTINGS)
# LORA_EXPORT_VERSION is no option
@click.version_option(__version__, prog_name="lora-export", allow_from_autoenv=False)
def cli() -> None:
    """Put LoRA adapters into production: merge them, export them, and prove that nothing was lost.

    \b
    Exit codes: 0 done, 2 wrong usage, 3 input refused, 4 verdict `different`,
    5 verdict `undecided`, 6 environment, 7 output not written,
    8 exporter or runtime refused the model, 130 Ctrl-C, 143 SIGTERM.
    """


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
    """Run the command line and exit with its exit code. Without `arguments`, it is the command of the whole process."""
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
    startup.end_with(code)
    sys.exit(code)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    invocation, stdout = Invocation(sys.argv[1:] if arguments is None else arguments), sys.stdout
    if "lora_export.storage.atomic_output" in sys.modules:  # an earlier run in this process
        sys.modules["lora_export.storage.atomic_output"].published.clear()
    try:
        with command_line_spelling():
            if document := help_document(invocation.arguments):
                failures.print_json(document)
                return 0
            result = cli.main(arguments, prog_name="lora-export", standalone_mode=False, obj=invocation)
    except SystemExit as end:
        if "_LORA_EXPORT_COMPLETE" in os.environ:  # click ends so what a shell asks
            raise
        # rich and click raise SystemExit for a broken pipe; click also replaces stdout. `| head` has read enough: the
        # code that shells report of a program that SIGPIPE ended. Windows has no SIGPIPE.
        if sys.stdout is not stdout or isinstance(end.__context__, BrokenPipeError):
            return 128 + getattr(signal, "SIGPIPE", 13)
        # Of code of the user, or of a library: its code, which may be 0, is no result of a command.
        error = RuntimeError(f"the command was ended by SystemExit({end.code!r})")
        failures.show_failure(failures.bug(error), invocation)
        raise error from end
    except (Exception, KeyboardInterrupt) as error:
        failure = failures.failure_of(error, invocation)
        if failure is None:
            failures.show_failure(failures.bug(error), invocation)
            raise
        failures.show_failure(failure, invocation)
        return failure.exit_code
    return result if isinstance(result, int) else 0
