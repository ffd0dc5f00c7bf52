"""Run a PyTorch module, as deployed or in fp64."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from lora_export.models.tracing import have_names, named_failures, named_outputs, same_state
from lora_export.runtime import onnx_runner
from lora_export.runtime.fp64_operators import Fp64Operators, NarrowOperators
from lora_export.runtime.runner import Arrays, PlainRunner, TooSlow, within_memory

NamedTensors = dict[str, torch.Tensor]
UseRow = Callable[[torch.Tensor], contextlib.AbstractContextManager[None]]


@dataclass
class ModuleRunner(PlainRunner):
    """A module as deployed: in its own dtype, without gradients and TF32."""

    module: nn.Module
    device: str = "cpu"
    axes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    names_known: bool = True
    stored_dtypes: Mapping[str, str] = field(default_factory=dict)  # tensor -> dtype in its file, where known
    limits: Mapping[str, tuple[tuple[int, int | None], ...]] = field(default_factory=dict)  # least and greatest sizes
    has_fp32_outputs: bool = False  # whether float outputs are cast to fp32, whatever the module computes in
    path: Path = Path()  # of the file that the module is from, for the message of TooSlow
    timeout: float = math.inf  # seconds after which a run ends with TooSlow, once its operator has ended
    memory: int | None = None  # bytes that a run may take; None: without a bound

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module's first float parameter."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def run(self, inputs: Arrays) -> Arrays:
        """One forward pass, with floats in the module's own dtype."""
        dtype = self.dtype
        tensors = {name: _tensor(value).to(self.device) for name, value in inputs.items()}
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
        limit = contextlib.nullcontext() if math.isinf(self.timeout) else _TimeLimit(self.path, self.timeout)
        bound = within_memory(self.memory, self.path)
        named = named_failures(self.module, inputs)
        with bound, torch.no_grad(), _tf32_off(), named, same_state(self.module), limit:
            outputs = named_outputs(self.module(**tensors))
        self.names_known = have_names(outputs)
        if self.has_fp32_outputs:
            outputs = {name: value.float() if value.is_floating_point() else value for name, value in outputs.items()}
        return _as_arrays(outputs)


class _TimeLimit(TorchFunctionMode):
    """Raises TooSlow at the first operator after so many seconds. One that runs is not interrupted."""

    def __init__(self, path: Path, seconds: float):
        super().__init__()
        self.path, self.seconds, self._end = path, seconds, time.monotonic() + seconds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self._end:
            raise TooSlow(self.path, self.seconds)
        return func(*args, **(kwargs or {}))


@dataclass
class Fp64Runner:
    """A module computed in fp64; its own casts to fp32 or a half are replaced by casts to fp64.

    Weights that the module has in a narrower dtype are widened where they are used (see `fp64_operators`).
    `narrow_operators` collects the operators that produced less than fp64 all the same, for the report.
    """

    module: nn.Module
    narrow_operators: set[str] = field(default_factory=set)
    largest_result: int = 0  # bytes of the largest result of an operator in all runs

    def run(self, inputs: Arrays) -> Arrays:
        """One forward pass with every float in fp64."""
        return _as_arrays(self._outputs(inputs, lambda forward: forward()))

    def run_each(self, inputs: Arrays, rows: torch.Tensor, use: UseRow) -> list[Arrays]:
        """One forward pass for each of the rows, in the context that `use` makes of it: all of them in one batch.

        The numbers are those of single runs, but for the order of sums in fp64. Raises RuntimeRefused where the module
        computes what a batch cannot have: a number of its rows that Python reads.
        """

        def each(forward: Callable[[], NamedTensors]) -> NamedTensors:
            def with_row(row: torch.Tensor) -> NamedTensors:
                with use(row):
                    return forward()

            return torch.func.vmap(with_row)(rows)

        with warnings.catch_warnings(action="ignore"):  # of operators that a batch computes one by one
            outputs = self._outputs(inputs, each)
        return [_as_arrays({name: value[row] for name, value in outputs.items()}) for row in range(len(rows))]

    def _outputs(self, inputs: Arrays, call: Callable[[Callable[[], NamedTensors]], NamedTensors]) -> NamedTensors:
        """What `call` returns for the module's forward pass."""
        wide = {name: _tensor(value) for name, value in inputs.items()}
        wide = {name: value.double() if value.is_floating_point() else value for name, value in wide.items()}
        module = self.module  # before the modes are active: a lazy reference makes it now, from one in fp32
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        narrow = NarrowOperators(self.narrow_operators)
        try:
            with (
                torch.no_grad(),
                narrow,
                Fp64Operators(module, narrow),
                named_failures(module, wide),
                same_state(module),
            ):
                return call(lambda: named_outputs(module(**wide)))
        finally:
            torch.set_default_dtype(default)
            self.largest_result = max(self.largest_result, narrow.largest_result)


@contextlib.contextmanager
def _tf32_off() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor as an array of its own dtype."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _as_arrays(outputs: NamedTensors) -> Arrays:
    return {name: to_numpy(value) for name, value in outputs.items()}


def describe_environment() -> dict[str, Any]:
    """Versions and settings that a result depends on."""
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **onnx_runner.describe_ort_environment(),
    }
    if transformers := sys.modules.get("transformers"):
        facts["transformers"] = transformers.__version__
    return facts
