"""The process that loads a TorchScript file and runs it: without output of its own, and with bounded memory.

Its arguments are the file, the bytes of memory that it may take beyond what PyTorch takes, and the number of threads.
It answers requests on stdin with messages on what was its stdout. Code in a file can print; here it prints to nowhere.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import torch

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.isolation.bounds import bound_child
from lora_export.isolation.limits import MAX_CODE
from lora_export.isolation.process import private_streams, read_request, write_message
from lora_export.layers.torch_internals import script_archive, script_operators
from lora_export.models.outputs import have_names, named_outputs
from lora_export.runtime.torch_runners import to_numpy
from lora_export.runtime.torchscript.code_check import check_code, check_pickle

RECORD = "extra/lora_export.json"
RAISED_BY_SCRIPTS = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RuntimeRefused)


def main() -> None:
    """Load the file, say so, and answer requests until stdin ends."""
    path, memory, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    requests, answers = private_streams()
    torch.set_num_threads(threads)
    bound_child(memory)
    try:
        script, record = load_script(path)
    except (InputRefused, RuntimeError, ValueError) as error:
        write_message(answers, {"refused": str(error), "is_ours": isinstance(error, InputRefused)}, {})
        return
    write_message(answers, {"record": record}, {})
    with contextlib.suppress(EOFError):
        while True:
            request, arrays = read_request(requests, threads)
            if request["do"] == "state":
                state = script.state_dict()
                write_message(answers, {}, {name: to_numpy(value) for name, value in state.items()})
            else:
                _answer(answers, script, [torch.from_numpy(arrays[name]) for name in request["inputs"]])


def load_script(path: Path) -> tuple[torch.jit.ScriptModule, str]:
    """The script and its record of inputs; its code is checked before any of it is run.

    Raises InputRefused for code that calls what is not on the list, and RuntimeError for what is no TorchScript file.
    """
    archive = script_archive(str(path))
    sources, record = {}, ""
    for name in archive.get_all_records():
        if name == RECORD:
            record = archive.get_record(name).decode("utf-8", "replace")
        elif name.endswith(".pkl"):
            check_pickle(name, archive.get_record(name))
        elif name.startswith("code/") and not name.endswith(".debug_pkl"):
            source = archive.get_record(name)
            if len(source) > MAX_CODE:
                raise InputRefused(f"{name} has more than {MAX_CODE:,} bytes")
            sources[name] = source.decode()
        elif name == "model.json":
            raise InputRefused("it has the format of PyTorch before 1.4, which is not read")
    if not sources:
        raise RuntimeError("it has no code")
    check_code(sources, script_operators())
    return torch.jit.load(str(path), map_location="cpu"), record


def _answer(answers: io.BufferedIOBase, script: torch.jit.ScriptModule, tensors: list[torch.Tensor]) -> None:
    with torch.no_grad():
        try:
            outputs = named_outputs(script(*tensors))
            arrays = {name: to_numpy(value) for name, value in outputs.items()}
        except RAISED_BY_SCRIPTS as error:
            last = (str(error).strip() or type(error).__name__).splitlines()[-1]
            write_message(answers, {"failed": last}, {})
            return
    write_message(answers, {"names_known": have_names(outputs)}, arrays)
