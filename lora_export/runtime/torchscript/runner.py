"""Run a TorchScript file, in a process of its own. The file is not trusted: see `code_check` and `child`."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from lora_export.errors import InputRefused, RuntimeRefused, one_line
from lora_export.runtime.runner import TIMEOUT, Arrays, PlainRunner, TooSlow, deadline
from lora_export.runtime.torchscript.messages import read_message, write_message
from lora_export.storage import input_files

MEMORY = 2 << 30  # bytes beyond PyTorch itself, and MEMORY_OF_FILE times the file
MEMORY_OF_FILE = 4
# This package's folder comes last in the child's search path: before the standard library, it could hide parts of that.
START = "import sys; sys.path.append(sys.argv.pop(1)); from lora_export.runtime.torchscript.child import main; main()"


class ScriptRunner(PlainRunner):
    """A TorchScript file, loaded and run in a child process.

    Its code is checked before it is loaded: only the operators of a list are run, and none that reads or writes files.
    The child prints nothing, writes no file, and takes no more than `memory` bytes beyond what PyTorch itself takes
    (default: 2 GiB and 4 times the file; where the system can bound it). Each run ends within `timeout` seconds.

    `input_names` are the names of its inputs in order, where the file has no record of them. Raises InputRefused
    where the file is no TorchScript, its path is not UTF-8, or it calls what is not run. `run` raises RuntimeRefused
    where the script fails, or needs more time or memory.
    """

    def __init__(self, path: Path, input_names: Sequence[str], *, timeout: float = TIMEOUT, memory: int | None = None):
        input_files.must_be_regular(path)
        _require_utf8(path)
        self.path, self.timeout = path, timeout
        self.memory = MEMORY + MEMORY_OF_FILE * path.stat().st_size if memory is None else memory
        self.axes: Mapping[str, tuple[int | None, ...]] = {}
        self.names_known = False
        self._process = _start(path, self.memory)
        self._requests, self._answers = _streams(self._process)
        self._end = weakref.finalize(self, _end, self._process)
        header, _ = self._answer()
        if refusal := header.get("refused"):
            what = "TorchScript that is run here" if header.get("is_ours") else "TorchScript file"
            raise InputRefused(f"{path} is no {what}: {one_line(str(refusal).splitlines()[0])}")
        self.input_names = _recorded_inputs(path, header.get("record") or "{}") or tuple(input_names)

    def run(self, inputs: Arrays) -> Arrays:
        """One forward pass, with the inputs in the order in which the file was traced."""
        missing = [name for name in self.input_names if name not in inputs]
        if missing:
            raise RuntimeRefused(
                f"the TorchScript file needs inputs that the model does not have: {', '.join(missing)}"
            )
        self._ask({"do": "run", "inputs": list(self.input_names)}, {name: inputs[name] for name in self.input_names})
        header, outputs = self._answer()
        if failure := header.get("failed"):
            raise RuntimeRefused(f"TorchScript: {one_line(str(failure))}")
        self.names_known = bool(header.get("names_known"))
        return outputs

    def state(self) -> Arrays:
        """Every parameter and buffer by name."""
        self._ask({"do": "state"}, {})
        return self._answer()[1]

    def close(self) -> None:
        """End the child process. Nothing can be run afterwards."""
        self._end()

    def _ask(self, request: Mapping[str, Any], arrays: Arrays) -> None:
        with contextlib.suppress(BrokenPipeError):  # `_answer` then finds how the child ended
            write_message(self._requests, request, arrays)

    def _answer(self) -> tuple[dict[str, Any], Arrays]:
        with deadline(self.timeout, self._process.kill) as expired:
            try:
                return read_message(self._answers, most=self.memory)
            except EOFError:
                code = self._process.wait()
            except (ValueError, KeyError, TypeError) as error:
                self.close()
                raise RuntimeRefused(f"the process that runs {self.path} sent no outputs: {error}") from error
        if expired.is_set():
            raise TooSlow(self.path, self.timeout)
        raise RuntimeRefused(f"the process that runs {self.path} ended: {_reason(code, self.memory)}")


def _require_utf8(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputRefused(
            f"{path} is not UTF-8, and PyTorch's reader takes no such path. Name it otherwise"
        ) from error


def _start(path: Path, memory: int) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[3])  # the folder of the package
    command = [sys.executable, "-P", "-c", START, root, str(path), str(memory), str(torch.get_num_threads())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def _streams(process: subprocess.Popen[bytes]) -> tuple[io.BufferedIOBase, io.BufferedIOBase]:
    return cast(io.BufferedIOBase, process.stdin), cast(io.BufferedIOBase, process.stdout)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in _streams(process):
        with contextlib.suppress(OSError):  # what is left in a buffer cannot be sent any more
            stream.close()
    process.wait()


def _reason(code: int, memory: int) -> str:
    if code < 0:
        return f"{signal.Signals(-code).name}. It may take {memory / 2**30:.1f} GiB of memory"
    return f"exit code {code}"


def _recorded_inputs(path: Path, record: str) -> tuple[str, ...]:
    """The names of the inputs that `export_torchscript` recorded in the file; none where there is no record."""
    try:
        names = json.loads(record).get("inputs", [])
        if not (isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)):
            raise ValueError("its inputs are no list of names")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputRefused(f"{path}: its record lora_export.json is damaged: {one_line(str(error))}") from error
    return tuple(names)
