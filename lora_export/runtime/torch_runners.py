"""Run a PyTorch module, as deployed or in fp64."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_export.models.failures import named_failures
from lora_export.models.output_names import have_names, named_outputs
from lora_export.runtime import onnx_runner
from lora_export.runtime.runner import Arrays

NARROW_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
NARROWING_METHODS = frozenset({torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16})
GROUPED_MM = getattr(torch, "_grouped_mm", None)  # what torch.nn.functional.grouped_mm calls


@dataclass
class ModuleRunner:
    """A module as deployed: in its own dtype, without gradients and TF32."""

    module: nn.Module
    device: str = "cpu"
    axes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    names_known: bool = True
    stored_dtypes: Mapping[str, str] = field(default_factory=dict)  # tensor -> dtype in its file, where known
    limits: Mapping[str, tuple[tuple[int, int | None], ...]] = field(default_factory=dict)  # least and greatest sizes
    has_fp32_outputs: bool = False  # whether float outputs are cast to fp32, whatever the module computes in

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module's first float parameter."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def run(self, inputs: Arrays) -> Arrays:
        """One forward pass, with floats in the module's own dtype."""
        dtype = self.dtype
        tensors = {name: _tensor(value).to(self.device) for name, value in inputs.items()}
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
        with torch.no_grad(), _tf32_off(), named_failures(self.module, inputs):
            outputs = named_outputs(self.module(**tensors))
        self.names_known = have_names(outputs)
        if self.has_fp32_outputs:
            outputs = {name: value.float() if value.is_floating_point() else value for name, value in outputs.items()}
        return {name: to_numpy(value) for name, value in outputs.items()}


@dataclass
class Fp64Runner:
    """A module in fp64; its own casts to fp32 or a half are replaced by casts to fp64.

    `narrow_operators` collects the operators that produced less than fp64 all the same, for the report.
    """

    module: nn.Module  # in fp64 already
    narrow_operators: set[str] = field(default_factory=set)

    def run(self, inputs: Arrays) -> Arrays:
        """One forward pass with every float in fp64."""
        wide = {name: _tensor(value) for name, value in inputs.items()}
        wide = {name: value.double() if value.is_floating_point() else value for name, value in wide.items()}
        module = self.module  # before the modes are active: a lazy reference makes it now, from one in fp32
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.no_grad(), _NarrowOperators(self.narrow_operators), _CastsToFp64(), named_failures(module, wide):
                outputs = named_outputs(module(**wide))
        finally:
            torch.set_default_dtype(default)
        return {name: to_numpy(value) for name, value in outputs.items()}


class _CastsToFp64(TorchFunctionMode):
    """Replaces a model's own casts to a narrower float (norms, rotary tables, softmax) by casts to fp64.

    PyTorch has no fp64 kernel for products of experts, so these are computed one expert after the other.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in NARROWING_METHODS:
            return args[0].double()
        if func is GROUPED_MM and (args[0].ndim, args[1].ndim) == (2, 3):
            return _grouped_products(*args, **kwargs)
        args = tuple(torch.float64 if _is_narrow(arg) else arg for arg in args)
        kwargs = {name: torch.float64 if _is_narrow(value) else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in NARROW_DTYPES


def _grouped_products(rows: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor, **_: None) -> torch.Tensor:
    """Products of rows (rows, in) with the weights (experts, in, out); the rows of expert i end before `offs[i]`."""
    products, begin = rows.new_zeros(len(rows), weights.shape[-1]), 0
    for weight, end in zip(weights, offs.tolist(), strict=True):
        products[begin:end] = rows[begin:end] @ weight
        begin = end
    return products


class _NarrowOperators(TorchDispatchMode):
    """Records which operators produce a narrower float although everything should be fp64."""

    def __init__(self, seen: set[str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.dtype in NARROW_DTYPES:
                self.seen.add(str(func))
        return result


@contextlib.contextmanager
def _tf32_off() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor as an array of its own dtype."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


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
