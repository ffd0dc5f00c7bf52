"""How the steps of a training are computed: dtype, library, torch.compile, and where their memory goes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_export.errors import EnvironmentLacking
from lora_export.layers.frozen_linear import scales_of_4bit
from lora_export.layers.module_tensors import own_share
from lora_export.layers.products import fastest_products as fastest_products
from lora_export.layers.torch_internals import compiler_errors
from lora_export.models.refusals import innermost_cause
from lora_export.options.spelling import named
from lora_export.options.train import Precision
from lora_export.training.checkpoint import MemoryUse

AUTOCAST_DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}


def refuse_without_compiler(device: str) -> None:
    """Compile a function of one tensor. Raises EnvironmentLacking where this machine cannot: it has no C++ compiler."""
    with _explained("any function"):
        torch.compile(lambda x: 2 * x)(torch.ones(2, device=device))


def compiled(module: nn.Module) -> Any:
    """A callable like `module`, with its parameters. It is compiled when it is first called, and for new shapes."""
    made = torch.compile(module)

    def forward(**inputs: Any) -> Any:
        with _explained(type(module).__name__):
            return made(**inputs)

    return forward


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except compiler_errors() as error:
        raise EnvironmentLacking(
            f"torch.compile cannot compile {what} here: {innermost_cause(error)}. Train without "
            f"{named('compile', True)}"
        ) from error


def autocast(device: str | torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """PyTorch's autocast on a device in this precision; with "no", a context that does nothing."""
    if precision == "no":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, AUTOCAST_DTYPES[precision])


def memory_use(module: nn.Module, optimizer: torch.optim.Optimizer, activations: int) -> MemoryUse:
    """Measure the tensors of a module and its optimiser, after a step. Shared storage counts once."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    scales = itertools.chain.from_iterable(map(scales_of_4bit, module.parameters()))
    return MemoryUse(
        weights=_bytes_of([*module.parameters(), *scales, *module.buffers()]),
        gradients=_bytes_of(gradients),
        optimizer=_bytes_of(states),
        activations=activations,
        peak=0,
    )


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    own = [own_share(tensor).untyped_storage() for tensor in tensors]
    storages = {storage.data_ptr(): storage.nbytes() for storage in own}
    return sum(storages.values())


class SavedActivations:
    """Counts what autograd keeps for the backward pass."""

    def __init__(self, module: nn.Module):
        owned = itertools.chain(module.parameters(), module.buffers())
        self._weights = {own_share(tensor).untyped_storage().data_ptr() for tensor in owned}
        self._storages: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count while the context, a forward pass, is active."""

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            # A weight that was gathered from its shares is dropped after its block, and gathered again.
            if storage.data_ptr() not in self._weights and not isinstance(tensor, nn.Parameter):
                self._storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield


class PeakMemory:
    """The largest memory measured since it was created, in bytes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def measure(self) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            import psutil  # comes with accelerate

            self.peak = max(self.peak, psutil.Process().memory_info().rss)
