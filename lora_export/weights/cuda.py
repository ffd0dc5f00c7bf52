"""A merge's arithmetic on a GPU: what `apply_step.apply_by_numpy` does to some rows, by PyTorch. Only on request.

A block is read into pinned memory, copied to the GPU as it is stored, summed, rounded and measured there, and copied
back. `block_copy.transfer` reads, writes and hashes. Each thread has a stream of its own, so that the copies of one
overlap with the computation of another. A and B of a step are copied to the GPU once.

Accuracy: an entry is W + ΔW, ΔW and the sum in fp32 (never TF32), rounded once to nearest even. ΔW is summed in another
order than on the processor. So an entry is the processor's, or differs by what that order may cost, at most
2·(r + 1)·2⁻²⁴·(|W| + Σ s·|B||A|), where r is the sum of all ranks, and then by one rounding: one step of the stored
dtype, where W and ΔW do not cancel. DoRA's factor multiplies both.

NumPy still computes fp64 weights, changes that follow from the weight, biases, tensors and rows that replace others
(with a pair on top of them or not), conversions, and the norms of DoRA's outputs where these are columns of the stored
weight.

Speed is not measured: no GPU was available. By estimate it is not faster for a base of some gigabytes: PyTorch takes
over a second to import and CUDA as long to start, and then the one thread that writes and hashes is the slowest part,
as it is without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lora_export import sums
from lora_export.errors import EnvironmentLacking, first_line
from lora_export.options.spelling import command
from lora_export.plan import Step
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Bytes
from lora_export.weights import apply_step
from lora_export.weights.apply_step import Backend, StepRows
from lora_export.weights.merge_report import Statistics

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WAITING = 2  # threads beyond the cores: so many wait for the GPU while the others read. Not measured
CACHED_STEPS = 16  # steps whose A and B stay on the GPU: blocks of several small weights are computed at once


class Stream(Protocol):
    """A queue of work on the device, such as `torch.cuda.Stream`."""

    def synchronize(self) -> None: ...


class NoStream:
    """The stream of a device that has none, such as the processor: a call returns when its work is done."""

    def synchronize(self) -> None:
        pass


def require_cuda() -> None:
    """Raise EnvironmentLacking where PyTorch cannot compute fp32 on a GPU. The message names what is missing."""
    if torch.version.cuda is None:
        raise EnvironmentLacking(
            f"this PyTorch ({torch.__version__}) is built without CUDA. Install one with CUDA: "
            f"https://pytorch.org/get-started/locally shows the command. {_advice()}"
        )
    if not torch.cuda.is_available():
        raise EnvironmentLacking(f"PyTorch (for CUDA {torch.version.cuda}) finds no GPU. {_advice()}")
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        raise EnvironmentLacking(
            "NVIDIA_TF32_OVERRIDE=1 turns TF32 on in every CUDA library, and a merge must sum in float32. Unset it"
        )


def _advice() -> str:
    return f"`{command('doctor', provider='cuda')}` reports what is missing"


@contextlib.contextmanager
def cuda() -> Iterator[Backend]:
    """The current GPU of PyTorch as a backend, with TF32 off meanwhile. Raises as `require_cuda` does."""
    require_cuda()
    device = torch.device("cuda", torch.cuda.current_device())
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield backend(
            device,
            name=f"cuda ({torch.cuda.get_device_name(device)})",
            memory=pinned,
            streams=lambda: torch.cuda.Stream(device),
            inside=torch.cuda.stream,
        )
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def backend(
    device: torch.device,
    *,
    name: str,
    memory: block_copy.Memory = block_copy.memory,
    streams: Callable[[], Any] = NoStream,
    inside: Callable[[Any], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Backend:
    """A backend on this device. `streams` makes the Stream of a thread, `inside` a context that uses it."""
    arithmetic = Arithmetic(device, streams, inside)
    return Backend(arithmetic.apply, block_copy.default_threads() + WAITING, memory, name)


def pinned(count: int) -> Bytes:
    """Bytes in pinned memory, which a GPU reads and writes by itself."""
    with cuda_errors("memory for the copies to the GPU"):
        memory: Bytes = torch.empty(count, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


@contextlib.contextmanager
def cuda_errors(where: str) -> Iterator[None]:
    """Turn an error of CUDA into EnvironmentLacking; an error of too little memory stays as it is."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA" not in str(error):
            raise
        raise EnvironmentLacking(f"{where}: {first_line(error)}. {_advice()}") from error


class Arithmetic:
    """Changes rows of weights on a device, each thread in a stream of its own."""

    def __init__(
        self,
        device: torch.device,
        streams: Callable[[], Any] = NoStream,
        inside: Callable[[Any], AbstractContextManager[Any]] = contextlib.nullcontext,
    ):
        self.device, self.streams, self.inside = device, streams, inside
        self._of_thread = threading.local()
        self.factors = functools.lru_cache(CACHED_STEPS)(self._factors)

    @property
    def stream(self) -> Stream:
        """The stream of the current thread."""
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = self.streams()
        stream: Stream = self._of_thread.stream
        return stream

    def apply(self, part: StepRows) -> Statistics | None:
        """As `apply_step.apply_by_numpy`, which does what this device does not."""
        step, stored, output = part.step, part.stored, part.output
        is_sum = step.terms and step.replace is None and not step.needs_weight
        if not is_sum or str(stored.dtype) not in TORCH_DTYPES:
            return apply_step.apply_by_numpy(part)
        with cuda_errors(part.name), self.inside(self.stream):
            weight = self._to_device(stored)
            factors = self.factors(step)  # held until the stream is done: only then may another use their memory
            change = _change(factors, part.rows, output.shape)
            total = change + weight  # in fp32, whatever dtype is stored
            if step.magnitude is not None:
                total *= self._dora_factors(part, total)
                change = total - weight
            rounded = total.to(TORCH_DTYPES[str(output.dtype)])
            figures = [torch.isfinite(rounded).all(), *(_sums(weight, change, rounded) if part.measured else ())]
            found = torch.stack([figure.double() for figure in figures])
            bits = rounded.view({2: torch.int16, 4: torch.int32}[rounded.itemsize])
            _as_integers(output).copy_(bits, non_blocking=output.flags.c_contiguous)
            self.stream.synchronize()
            is_finite, *block_sums = found.tolist()
        if not is_finite:
            apply_step.refuse_overflow(part.name, stored, output)
        statistics = Statistics(part.name)
        if part.measured:
            statistics.add_sums(np.array(block_sums), output.size)
        return statistics

    def _to_device(self, array: NDArray[Any]) -> torch.Tensor:
        """The array on the device. Its bytes are copied as integers: NumPy and PyTorch do not share bf16."""
        integers = _as_integers(array).to(self.device, non_blocking=array.flags.c_contiguous)
        return integers.view(TORCH_DTYPES[str(array.dtype)])

    def _factors(self, step: Step) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """B (rows, rank), A (rank, columns) and the scale of each term, copied before a stream needs them."""
        factors = []
        for term in step.stored_terms:
            b, a = (np.array(factor, np.float32).reshape(len(factor), -1) for factor in (term.pair.b, term.pair.a))
            scale = float(np.float32(term.scale))
            factors.append((torch.from_numpy(b).to(self.device), torch.from_numpy(a).to(self.device), scale))
        return factors

    def _dora_factors(self, part: StepRows, total: torch.Tensor) -> torch.Tensor:
        """DoRA's factor of each output of W + ΔW, as a tensor that broadcasts with these rows."""
        if part.column_norms is not None:
            return self._to_device(sums.dora_factors(part.step, part.column_norms).astype(np.float32))
        norms = total.double().square().reshape(len(total), -1).sum(1).cpu().numpy()
        factors = sums.dora_factors(part.step, norms, part.rows).astype(np.float32)
        return self._to_device(factors.reshape(-1, *[1] * (total.ndim - 1)))


def _change(
    factors: list[tuple[torch.Tensor, torch.Tensor, float]], rows: slice, shape: tuple[int, ...]
) -> torch.Tensor:
    """ΔW of some stored rows, as `sums.stored_delta`."""
    first, *others = [torch.mm(b[rows], a).mul_(scale) for b, a, scale in factors]
    for other in others:
        first += other
    return first.reshape(shape)


def _sums(weight: torch.Tensor, change: torch.Tensor, merged: torch.Tensor) -> list[torch.Tensor]:
    """The sums of `Statistics` over a block, in fp64."""
    before, expected = weight.double().flatten(), change.double().flatten()
    kept = merged.double().flatten() - before
    noise = kept - expected
    return [before @ before, expected @ expected, kept @ expected, noise @ noise, torch.count_nonzero(kept)]


def _as_integers(array: NDArray[Any]) -> torch.Tensor:
    """The memory of the array as a tensor of integers of the same size."""
    return torch.from_numpy(array.view(f"i{array.itemsize}"))
