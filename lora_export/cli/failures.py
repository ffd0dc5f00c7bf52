"""How a command fails: a line on stderr and an exit code, and the same for the programs that read its result.

With `--json` a failure is the one JSON document on stdout. Each `--report` of `verify` contains it, and a GitHub job
gets an annotation.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from lora_export.cli import verbosity
from lora_export.cli.verbosity import Verbosity
from lora_export.errors import (
    ALLOCATION_FAILED,
    EnvironmentLacking,
    InputRefused,
    LoraExportError,
    MatchError,
    NotTheSame,
    OutputFailed,
    RuntimeRefused,
    one_line,
    printable,
)

ERROR_SCHEMA = "lora-export/error/1"
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
FAILURE_KINDS = {
    1: "bug",
    2: "usage",
    3: "input",
    4: "different",
    5: "undecided",
    6: "environment",
    7: "output",
    8: "runtime",
    INTERRUPTED: "interrupted",
    TERMINATED: "terminated",
}

# Packages that commands import. A missing one ends with a message, not with a traceback.
PACKAGES = frozenset({"ml_dtypes", "numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "safetensors", "torch"})
INSTALL_PYTORCH = "pip install torch onnxscript (`lora-export guide install`)"  # what the core lacks
_PASSWORD = re.compile(r"://[^/\s]*@")  # of an address, which is refused, and would be shown by its refusal
STDOUT = "lora_export.stdout"  # in the context's `meta`: the stream for the document of --json, and its descriptor
NO_THREAD = "can't start new thread"  # Python's message where there is no memory for the stack of a thread


class Terminated(KeyboardInterrupt):
    """SIGTERM ends a command as Ctrl-C does, so that unfinished outputs are removed."""


@dataclass(frozen=True)
class Failure:
    """What ended a command."""

    message: str
    exit_code: int
    text: str  # the message as a person reads it on stderr, with click's usage lines, and that nothing was written
    facts: dict[str, Any] = field(default_factory=dict)  # more for the JSON document
    details: str = ""  # what -v prints besides: every figure of a proof, and the original of a wrapped error


@dataclass
class Invocation:
    """One run of the command line."""

    arguments: Sequence[str]
    context: click.Context | None = None  # of the command, from when its arguments are read
    answered: bool = False  # the result is known, and is printed and written from now on
    begun: float = field(default_factory=time.perf_counter)

    @property
    def wants_json(self) -> bool:
        """Whether `--json` was given. After a usage error only the words of the command line are known."""
        options = self.arguments[: self.arguments.index("--")] if "--" in self.arguments else self.arguments
        parameters = self.context.params if self.context else {}
        return bool(parameters.get("as_json", "--json" in options))

    @property
    def has_written_nothing(self) -> bool:
        """Whether the command writes an output, and has published none."""
        parameters = self.context.params if self.context else {}
        if parameters.get("output") is None or parameters.get("dry_run"):
            return False
        from lora_export.storage import atomic_output

        return not atomic_output.published

    @property
    def command(self) -> str:
        """`lora-export verify`, or `lora-export` where no command was found."""
        return f"lora-export {self.context.info_name}" if self.context else "lora-export"

    def document(self, failure: Failure) -> dict[str, Any]:
        """The failure as the JSON document that `--json` prints."""
        return {
            "schema": ERROR_SCHEMA,
            "error": failure.message,
            "exit": failure.exit_code,
            "kind": FAILURE_KINDS.get(failure.exit_code, "usage"),
            "command": ["lora-export", *(_PASSWORD.sub("://***@", word) for word in self.arguments)],
            **failure.facts,
        }


def answered() -> None:
    """Record that the command has its result. A later failure is no second document, and changes no report."""
    invocation = click.get_current_context().find_object(Invocation)
    if invocation is not None:
        invocation.answered = True


# --- From an exception to a failure ---


def failure_of(error: BaseException, invocation: Invocation) -> Failure | None:
    """The message and the exit code of an exception; None for a bug of ours."""
    error = _raised(error)
    if isinstance(error, click.exceptions.Abort | KeyboardInterrupt):
        # click turns Ctrl-C and Terminated into Abort where it catches them.
        return _stopped(terminated=isinstance(error, Terminated) or isinstance(error.__cause__, Terminated))
    if isinstance(error, click.ClickException):
        return Failure(_in_one_line(error.format_message()), error.exit_code, _usage(error))
    if isinstance(error, LoraExportError):
        refused = isinstance(error, InputRefused | NotTheSame | RuntimeRefused)
        outcome = "\nNothing was written." if refused and invocation.has_written_nothing else ""
        return Failure(str(error), error.exit_code, f"Error: {error}{outcome}", _facts(error), _details(error))
    known = _known(error)
    if known is None:
        return None
    message = one_line(known[0])
    return Failure(message, known[1], f"Error: {message}", details=_details(error))


def _raised(error: BaseException) -> BaseException:
    """What a command raised. click turns an EOFError, of a file that is cut off, into Abort too: nobody stopped it."""
    cause = error.__cause__
    return cause if isinstance(error, click.exceptions.Abort) and isinstance(cause, EOFError) else error


def _details(error: BaseException) -> str:
    """More on an error, in lines. Those of a traceback are indented: they are not this program's."""
    proof = getattr(error, "proof", None)
    original = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    parts = [] if proof is None else [str(proof.verdict)]
    if original is not None:
        import traceback

        parts += [
            "The original error:",
            *(f"  {line}" for line in "".join(traceback.format_exception(original)).splitlines()),
        ]
    return "\n".join(parts)


def bug(error: BaseException) -> Failure:
    """The failure that an unexpected exception is. Python prints the traceback itself."""
    error = _raised(error)
    return Failure(f"a bug in lora-export: {type(error).__name__}: {error}", 1, "")


def _usage(error: click.ClickException) -> str:
    text = io.StringIO()
    error.show(text)
    return _in_one_line(text.getvalue())


def _in_one_line(text: str) -> str:
    """With the choices that click lists below each other."""
    return text.replace("\n\t", " ")


def _stopped(*, terminated: bool) -> Failure:
    from lora_export.storage import atomic_output

    left = (
        f"{one_line(str(atomic_output.published[-1]))} had been written"
        if atomic_output.published
        else "nothing was left behind"
    )
    message = f"{'Terminated' if terminated else 'Stopped'}; {left}."
    return Failure(message, TERMINATED if terminated else INTERRUPTED, message)


def _known(error: BaseException) -> tuple[str, int] | None:
    doctor = "`lora-export doctor` shows what is"
    if isinstance(error, ModuleNotFoundError) and _package(error) in PACKAGES:
        package = _package(error)
        way = f"Install it: {INSTALL_PYTORCH}" if package in ("torch", "onnxscript") else f"{doctor} missing"
        what = f"this command needs the package {package}, which is not installed. {way}"
        return what, EnvironmentLacking.exit_code
    if isinstance(error, ImportError) and _package(error) in PACKAGES:
        return f"the package {_package(error)} does not load: {error}. {doctor} wrong", EnvironmentLacking.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
        return f"there is not enough memory: {error}".rstrip(": "), EnvironmentLacking.exit_code
    if isinstance(error, RuntimeError) and str(error) == NO_THREAD:
        return "there is not enough memory for one more thread", EnvironmentLacking.exit_code
    if isinstance(error, RuntimeError) and ALLOCATION_FAILED in str(error):
        requested = re.search(r"allocate (\d+) bytes", str(error))
        size = f" for {int(requested[1]):,} bytes at once" if requested else ""
        return f"there is not enough memory{size}", EnvironmentLacking.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.filename or 'the output could not be written'}: {error.strerror}", OutputFailed.exit_code
    if isinstance(error, OSError) and "shared object" in str(error):  # torch loads its libraries by itself
        return f"a library does not load: {error}. {doctor} wrong", EnvironmentLacking.exit_code
    return None


def _package(error: ImportError) -> str:
    return (error.name or "").partition(".")[0]


def _facts(error: BaseException) -> dict[str, Any]:
    """What programs read of an error beside its message: every misfit; every figure of a proof."""
    if isinstance(error, MatchError):
        misfits = [
            {"adapter": misfit.adapter, "key": misfit.key, "problem": misfit.problem} for misfit in error.misfits
        ]
        return {"misfits": misfits}
    if isinstance(error, NotTheSame) and error.proof is not None:
        from lora_export.report.json_document import document_of_proof

        return {"proof": document_of_proof(error.proof)}
    return {}


# --- From a failure to its readers ---


def show_failure(failure: Failure, invocation: Invocation) -> None:
    """Print a failure on stderr, and give it to the programs that wait for a result."""
    if failure.text:
        _print_error(failure.text, invocation.arguments)
    if failure.details and invocation.context and verbosity.verbosity(invocation.context) is Verbosity.FULL:
        _print_error(failure.details, invocation.arguments)
    if invocation.answered:
        return
    if invocation.wants_json:
        with contextlib.suppress(OSError):  # stdout is full or closed: the exit code remains
            print_json(invocation.document(failure))
    _write_reports(failure, invocation)
    _annotate(failure, invocation)


@contextlib.contextmanager
def stdout_for_a_document() -> Iterator[None]:
    """Leave stdout to `print_json` within the block.

    What else is printed, as by a model's own code or by a process that it starts, is on stderr.
    """
    meta = click.get_current_context().meta
    with contextlib.suppress(OSError, AttributeError):  # it is closed
        sys.stdout.flush()
    with _stdout_to(2) as descriptor:
        meta[STDOUT] = sys.stdout or io.StringIO(), descriptor  # where it was closed
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            del meta[STDOUT]


@contextlib.contextmanager
def _stdout_to(descriptor: int) -> Iterator[int]:
    """Make descriptor 1 a copy of another within the block. Yields a copy of what it was; 1 where one is closed."""
    try:
        former = os.dup(1)
        os.dup2(descriptor, 1)
    except OSError:
        yield 1
        return
    try:
        yield former
    finally:
        os.dup2(former, 1)
        os.close(former)


def print_json(document: Any, indent: int | None = None) -> None:
    """Print the one JSON document on stdout. GitHub's runner would take a `##[` in a name for a command."""
    context = click.get_current_context(silent=True)
    text = json.dumps(document, allow_nan=False, indent=indent).replace("##[", "##\\u005b")
    stream, descriptor = context.meta.get(STDOUT, (None, 1)) if context else (None, 1)
    with _stdout_to(descriptor):
        click.echo(text, file=stream)


def print_message(line: str) -> None:
    """Print a message on stderr, in one line whatever names it contains. A closed stderr does not stop the work."""
    shown = verbosity.message_to_print(line)
    if shown is not None:
        with contextlib.suppress(OSError):
            click.echo(one_line(shown), err=True)


def _print_error(message: str, arguments: Sequence[str]) -> None:
    """Print an error on stderr. Messages may have several lines; a name of the user's is always shown in one."""
    words = list(arguments)
    with contextlib.suppress(OSError):  # the current folder was removed meanwhile
        words.append(str(Path.cwd()))
    for part in {part for word in words for part in word.split("/") if "\n" in part}:
        message = message.replace(part, one_line(part))
    with contextlib.suppress(OSError):  # stderr is full or closed: the exit code remains
        click.echo(printable(message).rstrip("\n"), err=True)


def _write_reports(failure: Failure, invocation: Invocation) -> None:
    """Write the failure into every report that was requested. A report that cannot be written is a message."""
    for path in (invocation.context.params.get("reports") or ()) if invocation.context else ():
        try:
            from lora_export.report.files import write_error_report

            write_error_report(path, invocation.document(failure), seconds=time.perf_counter() - invocation.begun)
        except InputRefused:
            continue  # another suffix: that, or something before it, is the failure itself
        except (LoraExportError, OSError, ImportError) as error:
            if str(error) != failure.message:  # the failure itself was that no report can be there
                print_message(f"the report {path} was not written: {error}")


def _annotate(failure: Failure, invocation: Invocation) -> None:
    if "GITHUB_ACTIONS" not in os.environ:
        return
    try:
        from lora_export.report import github
    except ImportError as error:
        print_message(f"the job was not annotated: {error}")
        return
    with contextlib.suppress(OSError):
        click.echo(github.workflow_command("error", invocation.command, failure.message), err=True)
