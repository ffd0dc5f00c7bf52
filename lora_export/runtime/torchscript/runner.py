"""Run a TorchScript file, in a process of its own. The file is not trusted: see `code_check` and `child`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_export.errors import InputRefused, RuntimeRefused, one_line
from lora_export.isolation.bounds import is_out_of_memory
from lora_export.isolation.limits import TIMEOUT, memory_for
from lora_export.isolation.process import IsolatedProcess
from lora_export.options.spelling import named
from lora_export.provenance import read_longest
from lora_export.runtime.runner import Arrays, PlainRunner, refused_ends
from lora_export.storage import input_files

CHILD = "lora_export.runtime.torchscript.child"


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
        self.memory = memory_for(path.stat().st_size) if memory is None else memory
        self.axes: Mapping[str, tuple[int | None, ...]] = {}
        self.names_known = False
        arguments = (path, self.memory, torch.get_num_threads())
        self._process = IsolatedProcess.start(CHILD, *arguments, memory=self.memory)
        with self._refusals():
            header, _ = self._process.answer(timeout)
        if refusal := header.get("refused"):
            what = "TorchScript that is run here" if header.get("is_ours") else "TorchScript file"
            raise InputRefused(f"{path} is no {what}: {one_line(str(refusal).splitlines()[0])}")
        record = header.get("record") or "{}"
        self.input_names = _recorded_inputs(path, record) or tuple(input_names)
        self.longest = read_longest(json.loads(record), path)  # the sizes up to which it was traced

    def run(self, inputs: Arrays) -> Arrays:
        """One forward pass, with the inputs in the order in which the file was traced."""
        missing = [name for name in self.input_names if name not in inputs]
        if missing:
            raise RuntimeRefused(
                f"the TorchScript file needs inputs that the model does not have: {', '.join(missing)}"
            )
        request = {"do": "run", "inputs": list(self.input_names)}
        header, outputs = self._ask(request, {name: inputs[name] for name in self.input_names})
        if failure := header.get("failed"):
            more = self._more_memory() if is_out_of_memory(RuntimeError(failure)) else ""
            raise RuntimeRefused(f"TorchScript: {one_line(str(failure))}{more}")
        self.names_known = bool(header.get("names_known"))
        return outputs

    def state(self) -> Arrays:
        """Every parameter and buffer by name."""
        return self._ask({"do": "state"}, {})[1]

    def close(self) -> None:
        """End the child process. Nothing can be run afterwards."""
        self._process.close()

    def _ask(self, request: Mapping[str, object], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        with self._refusals():
            return self._process.ask(request, arrays, self.timeout)

    def _refusals(self) -> contextlib.AbstractContextManager[None]:
        return refused_ends(f"the process that runs {self.path}", self.path, self.timeout, self._more_memory())

    def _more_memory(self) -> str:
        return f". Allow more with {named('memory')}"


def _require_utf8(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputRefused(
            f"{path} is not UTF-8, and PyTorch's reader takes no such path. Name it otherwise"
        ) from error


def _recorded_inputs(path: Path, record: str) -> tuple[str, ...]:
    """The names of the inputs that `export_torchscript` recorded in the file; none where there is no record."""
    try:
        names = json.loads(record).get("inputs", [])
        if not (isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)):
            raise ValueError("its inputs are no list of names")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputRefused(f"{path}: its record lora_export.json is damaged: {one_line(str(error))}") from error
    return tuple(names)
