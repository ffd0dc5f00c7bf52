"""ExecuTorch: .pte files, in a process of its own with bounded memory. They are not trusted.

A program takes its inputs in order, and none larger than those that its memory was planned for.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_export.artifacts.artifact import Artifact
from lora_export.errors import InputRefused, RuntimeRefused, first_line
from lora_export.extras import optional_package
from lora_export.isolation.bounds import bound_child
from lora_export.isolation.limits import TIMEOUT, memory_for
from lora_export.isolation.process import IsolatedProcess
from lora_export.runtime.registered.child import serve
from lora_export.runtime.registered.runner import RegisteredRunner
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import to_numpy, to_tensor
from lora_export.storage.artifact_kinds import ArtifactKind

EXECUTORCH = "executorch"
SERVING_CHILD = "lora_export.runtime.registered.executorch"
FORWARD = "forward"
# ExecuTorch's number of a dtype -> that of PyTorch
_NUMBERED = torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64
NUMBERED_DTYPES = {**dict(enumerate(_NUMBERED)), 11: torch.bool, 15: torch.bfloat16}


def open_executorch(
    candidate: Artifact, input_names: Sequence[str], timeout: float = TIMEOUT, adapter: Path | None = None
) -> RegisteredRunner:
    """A runner of a .pte file. `input_names` are those of the model in order, for a file without a record of them.

    `adapter` is a file for the adapter inputs of the program. Without it they have zeros.

    Raises EnvironmentLacking where ExecuTorch is not installed, and InputRefused for what it does not load.
    """
    path = candidate.path.absolute()
    memory = memory_for(path.stat().st_size)
    process = IsolatedProcess.start(SERVING_CHILD, path, memory, *input_names, memory=memory)
    runner = RegisteredRunner(EXECUTORCH, candidate, timeout=timeout, process=process)
    return runner if adapter is None else runner.with_adapter(adapter)


def main() -> None:
    """Serve a .pte file. The arguments are its path, the bytes of memory that it may take, and the inputs' names."""
    path, memory, *names = sys.argv[1:]
    serve(EXECUTORCH, lambda: ExecuTorchProgram(Path(path), names, int(memory)))


class ExecuTorchProgram:
    """The method `forward` of a .pte file. Called with inputs by name, it returns outputs in their order."""

    def __init__(self, path: Path, input_names: Sequence[str], memory: int):
        runtime = optional_package("executorch.runtime", "a .pte file needs", EXECUTORCH)
        version = optional_package("executorch.version", "a .pte file needs", EXECUTORCH).__version__
        bound_child(memory)
        try:
            self._program = runtime.Runtime.get().load_program(path)
            self._method = self._program.load_method(FORWARD)
        except KeyError as error:
            raise InputRefused(f"{path} has no method {FORWARD}") from error
        except RuntimeError as error:
            raise InputRefused(
                f"{path} is no .pte file that ExecuTorch {version} loads: {first_line(error)}"
            ) from error
        inputs = [self._method.metadata.input_tensor_meta(at) for at in range(self._method.metadata.num_inputs())]
        names = _names(path, input_names, len(inputs))
        self._dtypes = {name: NUMBERED_DTYPES.get(each.dtype()) for name, each in zip(names, inputs, strict=True)}
        planned = {name: tuple(each.sizes()) for name, each in zip(names, inputs, strict=True)}
        largest = {name: torch.zeros(sizes, dtype=self._dtypes[name]) for name, sizes in planned.items()}
        varies = {name: self._takes_smaller(name, largest) for name in names}
        self.axes: Mapping[str, list[int | None]] = {
            name: [None if varies[name] else size for size in sizes] for name, sizes in planned.items()
        }
        self.limits = {name: [(0 if varies[name] else size, size) for size in sizes] for name, sizes in planned.items()}
        self.plans_memory = True
        self.notes = [f"run by ExecuTorch {version}"]

    def _takes_smaller(self, name: str, largest: Mapping[str, torch.Tensor]) -> bool:
        """Whether an input takes other sizes than the largest. Sets the inputs, and computes nothing."""
        smaller = largest[name][tuple(slice(max(1, size - 1)) for size in largest[name].shape)].contiguous()
        if smaller.shape == largest[name].shape:
            return False
        try:
            self._method._method.set_inputs([*{**largest, name: smaller}.values()])
        except RuntimeError:
            return False
        return True

    def __call__(self, inputs: Arrays) -> list[Any]:
        tensors = [to_tensor(inputs[name]) for name in self.axes]
        for name, tensor in zip(self.axes, tensors, strict=True):
            if tensor.dtype != self._dtypes[name]:
                raise RuntimeRefused(f"the program takes {name} as {self._dtypes[name]}, and not as {tensor.dtype}")
        try:
            outputs = self._method.execute(tensors)
        except RuntimeError as error:
            raise RuntimeRefused(f"ExecuTorch: {first_line(error)}") from error
        return [to_numpy(value) for value in outputs if isinstance(value, torch.Tensor)]


def _names(path: Path, given: Sequence[str], count: int) -> list[str]:
    """The names of the inputs: those of the file's record, else the first ones of the model."""
    recorded = Artifact(path, ArtifactKind.EXECUTORCH).record.content.get("inputs", given)
    if not isinstance(recorded, list) or len(recorded) < count:
        raise InputRefused(f"{path} takes {count} inputs, and the model has {', '.join(given)}")
    return [str(name) for name in recorded[:count]]
