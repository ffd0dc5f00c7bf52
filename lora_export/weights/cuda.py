"""The same arithmetic on a GPU: what `rewrite` does to a block with NumPy, by PyTorch. Never chosen by itself.

A block is read into pinned memory, copied to the GPU as it is stored, summed, rounded and measured there, and copied
back; reading, writing and hashing stay `transfer`'s. Each thread has a stream of its own, so that one's copies pass
while another's block is computed. A and B of a step are brought over once.

What is promised: an entry is W + ΔW, ΔW and the sum in fp32 (never TF32), rounded once to nearest even. ΔW is added up
in another order than on the processor. So an entry is the processor's, or differs by what that order may cost, at most
2·(r + 1)·2⁻²⁴·(|W| + Σ s·|B||A|), r being all ranks together, and then by one rounding: one step of the stored type,
where W and ΔW do not cancel. DoRA's factor multiplies both.

On the processor stay: fp64 weights, biases, tensors and rows that take another's place (with a pair on top of them or
not), what is only converted, and the lengths of DoRA where they run along the stored rows.

Not measured: no GPU was at hand. By reckoning it is not faster for a base of some gigabytes: PyTorch takes over a
second to import and CUDA as long to begin, and then the one thread that writes and hashes sets the pace, as it does
without.
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
from lora_export.errors import EnvironmentLacking
from lora_export.plan import Step
from lora_export.storage import block_copy
from lora_export.storage.block_copy import Bytes
from lora_export.storage.safetensors_file import Entry
from lora_export.weights import apply_step
from lora_export.weights.apply_step import Backend
from lora_export.weights.merge_report import Statistics

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SLEEPING = 2  # threads beyond the cores: so many wait for the GPU while the others read. Not measured
STEPS_AT_ONCE = 16  # whose A and B stay on the GPU: small weights share the blocks that are under way
DOCTOR = "`lora-export doctor --provider cuda` says what is missing"


class Stream(Protocol):
    """A queue of work on the device, as `torch.cuda.Stream` is one."""

    def synchronize(self) -> None: ...


class OneQueue:
    """The stream of a device that has none, such as the processor: all is done when the call returns."""

    def synchronize(self) -> None:
        pass


def require_cuda() -> None:
    """Raise EnvironmentLacking where PyTorch cannot compute fp32 on a GPU, with what is missing."""
    if torch.version.cuda is None:
        raise EnvironmentLacking(
            f"this PyTorch ({torch.__version__}) is built without CUDA: https://pytorch.org/get-started/locally names "
            f"the command that installs one with it. {DOCTOR}"
        )
    if not torch.cuda.is_available():
        raise EnvironmentLacking(f"PyTorch (for CUDA {torch.version.cuda}) finds no GPU. {DOCTOR}")
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        raise EnvironmentLacking(
            "NVIDIA_TF32_OVERRIDE=1 turns TF32 on in every CUDA library, whatever is asked for, and a merge sums in "
            "float32; unset it"
        )


@contextlib.contextmanager
def cuda() -> Iterator[Backend]:
    """The GPU that PyTorch takes for the current one, with TF32 off meanwhile. Raises as `require_cuda` does."""
    require_cuda()
    place = torch.device("cuda", torch.cuda.current_device())
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield backend(
            place,
            name=f"cuda ({torch.cuda.get_device_name(place)})",
            memory=pinned,
            streams=lambda: torch.cuda.Stream(place),
            inside=torch.cuda.stream,
        )
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def backend(
    device: torch.device,
    *,
    name: str,
    memory: block_copy.Memory = block_copy.memory,
    streams: Callable[[], Any] = OneQueue,
    inside: Callable[[Any], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Backend:
    """Whoever computes on this device. `streams` makes a thread's Stream, `inside` a context that computes on it."""
    arithmetic = Arithmetic(device, streams, inside)
    return Backend(arithmetic.carry_out, block_copy.default_threads() + SLEEPING, memory, name)


def pinned(count: int) -> Bytes:
    """Bytes in memory that the kernel leaves where it is: a GPU copies from there and to there by itself."""
    with told("memory for the copies to the GPU"):
        memory: Bytes = torch.empty(count, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """What CUDA raises, as EnvironmentLacking; too little memory stays what it is."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUDA" not in str(error):
            raise
        raise EnvironmentLacking(f"{what}: {str(error).splitlines()[0]}. {DOCTOR}") from error


class Arithmetic:
    """Changes rows of weights on a device, each thread in a stream of its own."""

    def __init__(
        self,
        device: torch.device,
        streams: Callable[[], Any] = OneQueue,
        inside: Callable[[Any], AbstractContextManager[Any]] = contextlib.nullcontext,
    ):
        self.device, self.streams, self.inside = device, streams, inside
        self.own = threading.local()
        self.factors = functools.lru_cache(STEPS_AT_ONCE)(self._factors)

    @property
    def stream(self) -> Stream:
        """This thread's."""
        if not hasattr(self.own, "stream"):
            self.own.stream = self.streams()
        stream: Stream = self.own.stream
        return stream

    def carry_out(
        self,
        step: Step,
        place: Entry,
        rows: slice,
        stored: NDArray[Any],
        merged: NDArray[Any],
        along: NDArray[np.float64] | None,
        spare: Bytes,
        *,
        measured: bool,
    ) -> list[Statistics]:
        """See `rewrite.CarryOut`. What is not for a device is done by NumPy."""
        if not step.terms or step.replace is not None or str(stored.dtype) not in TYPES:
            return apply_step.carry_out(step, place, rows, stored, merged, along, spare, measured=measured)
        with told(place.name), self.inside(self.stream):
            weight = self._up(stored)
            factors = self.factors(step)  # held until the stream is done: only then may another have their memory
            change = _change(factors, rows, merged.shape)
            total = change + weight  # in fp32, whatever the weight is stored in
            if step.magnitude is not None:
                total *= self._lengths(step, total, rows, along)
                change = total - weight
            rounded = total.to(TYPES[str(merged.dtype)])
            figures = [torch.isfinite(rounded).all(), *(_sums(weight, change, rounded) if measured else ())]
            found = torch.stack([figure.double() for figure in figures])
            _as_integers(merged).copy_(_bits(rounded), non_blocking=merged.flags.c_contiguous)
            self.stream.synchronize()
            is_finite, *sums = found.tolist()
        if not is_finite:
            apply_step.refuse_overflow(place, stored, merged)
        statistics = Statistics(place.name)
        if measured:
            statistics.sums += sums
            statistics.elements += merged.size
        return [statistics]

    def _up(self, array: NDArray[Any]) -> torch.Tensor:
        """The array on the device, its bytes as they are: NumPy and PyTorch do not share bf16."""
        there = _as_integers(array).to(self.device, non_blocking=array.flags.c_contiguous)
        return there.view(TYPES[str(array.dtype)])

    def _factors(self, step: Step) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        """B (rows, rank), A (rank, columns) and their scale, of each term; there before anybody's stream needs them."""
        made = []
        for term in step.stored_terms:
            b, a = (np.array(side, np.float32).reshape(len(side), -1) for side in (term.pair.b, term.pair.a))
            scale = float(np.float32(term.scale))
            made.append((torch.from_numpy(b).to(self.device), torch.from_numpy(a).to(self.device), scale))
        return made

    def _lengths(self, step: Step, total: torch.Tensor, rows: slice, along: NDArray[np.float64] | None) -> torch.Tensor:
        """What DoRA multiplies each output of W + ΔW by, as a tensor that is as wide as these rows."""
        if along is not None:  # an output is a column
            factor = np.ones((len(along), 1), np.float32)
            sums.rescale_outputs(step, factor, along)
            return self._up(factor).T
        squares = total.double().square().reshape(len(total), -1).sum(1).cpu().numpy()
        factor = np.ones((len(squares), *[1] * (total.ndim - 1)), np.float32)
        sums.rescale_outputs(step, factor, squares, rows)
        return self._up(factor)


def _change(
    factors: list[tuple[torch.Tensor, torch.Tensor, float]], rows: slice, shape: tuple[int, ...]
) -> torch.Tensor:
    """ΔW of some rows as they are stored: what `sums.stored_delta` computes."""
    first, *others = [torch.mm(b[rows], a).mul_(scale) for b, a, scale in factors]
    for other in others:
        first += other
    return first.reshape(shape)


def _sums(weight: torch.Tensor, change: torch.Tensor, merged: torch.Tensor) -> list[torch.Tensor]:
    """What `Statistics.sums` adds up, in fp64."""
    before, wanted = weight.double().flatten(), change.double().flatten()
    kept = merged.double().flatten() - before
    lost = kept - wanted
    return [before @ before, wanted @ wanted, kept @ wanted, lost @ lost, torch.count_nonzero(kept)]


def _as_integers(array: NDArray[Any]) -> torch.Tensor:
    """The array's memory, seen by PyTorch as integers of the same size."""
    return torch.from_numpy(array.view(f"i{array.itemsize}"))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.itemsize])
