"""Whether a quantised weight is the weight that it should be, rounded.

Every reference computes with the graph's own weights, so that no output shows what is wrong with these. The integers
do. Quantisers round each entry to the nearest number that its scale and zero point allow: onnxruntime's default, RTN,
HQQ, k-quant, static and dynamic quantisers do, of 2 to 16 bits, without one exception in 400 weights (normal,
heavy-tailed and MiniLM's, in blocks of 16 to 128, by channel, by tensor). GPTQ does not: it changes integers so that
the error of the layer's output becomes smaller. That is measured, on the layer's own inputs.

The distance that a right weight has depends on its scales, not on its bits alone: MiniLM's in int8 are 1.5 % away by
channel, and 36 % by tensor in a reduced range. So it is compared with the distance that a symmetric range has which
just reaches the largest entry. Right weights have 0.4 to 2.1 times that.

A weight as a whole hides what is wrong with a few of its blocks, so these are measured one by one, too.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import first_of
from lora_export.graph.quantised_weights import Steps
from lora_export.plan import Layout
from lora_export.verification import parity
from lora_export.verification.parity import Wide

if TYPE_CHECKING:  # a graph is judged without PyTorch
    import torch
    from torch import nn

TIE_TOLERANCE = 2.0**-16  # of the largest entry: a sum in fp32 is that inexact about the middle of two integers
FLOAT_ZEROS = 1.25  # HQQ's zero points are that far from zero, relative to the largest entry of the group
FEW = 0.01  # of a weight's integers. GPTQ changes 5 % and more
NEIGHBOUR = 1.25  # steps: a single wrong integer that is further away than this is no neighbour of the nearest
# The error of a layer's output, relative to that of nearest integers. GPTQ: 0.1 to 0.5 on inputs that are correlated,
# 1.04 on independent ones. Noise of one step on 2 % of the integers: 1.1; on two of three: 3. Stochastic rounding: 1.4.
SMALL_OUTPUT_ERROR, LARGE_OUTPUT_ERROR = 1.1, 2.0
COARSE = 3.0  # times the distance that is needed
MEASURED_BLOCK = 32  # numbers of a row or column that are measured together
FEW_BLOCKS = 0.25  # of a weight's blocks have integers that are not the nearest. GPTQ: 80 % and more


class NearestNumbers(NamedTuple):
    """How a graph rounds a weight. Arrays are in the layout of the model's parameter."""

    nearest: Wide  # the right weight, at the nearest numbers that the graph's scales allow
    steps: Steps
    eps: float  # of the dtype of the scales or of the weight: quantisers divide by scales before these are rounded
    has_float_zeros: bool


@dataclass(frozen=True, eq=False)
class QuantisationError:
    """How far a quantised weight is from the weight that it should be."""

    size: int
    misrounded: int  # integers that are not the nearest
    excess: float  # in steps: how much further than the nearest number is from its entry, at most
    coarseness: float  # the distance, relative to what is needed
    relative: float  # the distance, relative to that of the nearest integers
    misrounded_blocks: float  # the part of the blocks that have integers which are not the nearest
    coarse_blocks: int  # whose steps are more than COARSE times what is needed
    blank_blocks: int  # whose numbers are all the same, further away than their steps explain
    own: NDArray[np.float32] = field(repr=False)  # weight - right weight; empty where all integers are the nearest
    least: NDArray[np.float32] = field(repr=False)  # nearest - right weight; empty where all integers are the nearest

    @property
    def has_few(self) -> bool:
        """Whether the quantiser rounds to nearest, but for a few integers or in a few blocks."""
        return self.misrounded > 0 and (self.misrounded <= FEW * self.size or self.misrounded_blocks <= FEW_BLOCKS)

    @property
    def is_corrected(self) -> bool:
        """Whether so many integers are not the nearest that the quantiser must have chosen them on purpose."""
        return self.misrounded > 0 and not self.has_few

    def __str__(self) -> str:
        return f"{self.misrounded:,} of {self.size:,} integers"


def quantisation_error_of(
    values: NDArray[np.float32], right: NDArray[Any], rounding: NearestNumbers
) -> QuantisationError:
    """Compare a quantised weight with the weight that it should be."""
    truth = right.astype(np.float64)
    own, least = values - truth, rounding.nearest - truth
    slack = TIE_TOLERANCE * float(np.abs(truth).max(initial=0.0)) + 2 * rounding.eps * np.abs(truth)
    if rounding.has_float_zeros:
        slack += 2 * rounding.eps * FLOAT_ZEROS * rounding.steps.largest
    excess = np.abs(own) - np.abs(least)
    is_wrong = excess > slack
    in_steps = excess / np.where(rounding.steps.own, rounding.steps.own, 1.0)
    needed = norm(rounding.steps.needed) / math.sqrt(12)  # errors are uniform within a step
    differing = slice(None) if is_wrong.any() else slice(0)
    coarse_blocks, blank_blocks = _coarse_and_blank(values, own, rounding.steps)
    return QuantisationError(
        values.size,
        int(is_wrong.sum()),
        float(np.max(in_steps, initial=0.0, where=is_wrong)),
        _relative(norm(own), needed),
        _relative(norm(own), norm(least)),
        min((float(_by_block(np.logical_or, is_wrong, axis).mean()) for axis in _axes(values)), default=1.0),
        coarse_blocks,
        blank_blocks,
        own[differing].astype(np.float32),
        least[differing].astype(np.float32),
    )


def _coarse_and_blank(values: NDArray[np.float32], own: Wide, steps: Steps) -> tuple[int, int]:
    """Blocks with steps that are too large, and blocks of one number that no rounding explains, such as a scale of 0.

    Along either axis: which of them the scales are for depends on how the weight is stored. That a block is far away is
    no sign of a fault: quantisers search for scales that cut off the largest numbers, and GPTQ moves errors.
    """
    coarse = blank = 0
    for axis in _axes(values):
        distances, sizes, needed = (_by_block(np.add, np.square(each), axis) for each in (own, steps.own, steps.needed))
        is_same = _by_block(np.maximum, values, axis) == _by_block(np.minimum, values, axis)
        coarse = max(coarse, int(np.count_nonzero(sizes > COARSE**2 * needed)))
        blank = max(blank, int(np.count_nonzero(is_same & (distances > sizes))))
    return coarse, blank


def _axes(array: NDArray[Any]) -> list[int]:
    """The axes that have a block."""
    return [axis for axis, size in enumerate(array.shape) if size >= MEASURED_BLOCK // 2]


def _by_block(combine: np.ufunc, array: NDArray[Any], axis: int) -> NDArray[Any]:
    """One number for each block along an axis. The last one is not shorter than half a block."""
    starts = np.arange(0, max(1, array.shape[axis] - MEASURED_BLOCK // 2 + 1), MEASURED_BLOCK)
    combined: NDArray[Any] = combine.reduceat(array, starts, axis=axis)
    return combined


def norm(array: NDArray[Any]) -> float:
    """The Euclidean norm, in fp64."""
    return float(np.linalg.norm(array.astype(np.float64)))


def _relative(value: float, unit: float) -> float:
    if not value:
        return 0.0
    return value / unit if unit else math.inf


# --- the error of a layer's output --------------------------------------------------------------


@dataclass(eq=False)
class OutputErrors:
    """The errors of layers' outputs in a run: of the stored integers, and of the nearest ones."""

    own: dict[str, float] = field(default_factory=dict)  # weight -> sum of squares
    least: dict[str, float] = field(default_factory=dict)

    def relative(self, weight: str) -> float | None:
        """The error of the stored integers, relative to that of the nearest; None where no product was seen."""
        if not self.least.get(weight):
            return None
        return math.sqrt(self.own[weight] / self.least[weight])


@contextlib.contextmanager
def output_errors(module: nn.Module, errors: Mapping[str, QuantisationError]) -> Iterator[OutputErrors]:
    """Measure the errors of outputs, for weights whose integers are not the nearest, while the module runs."""
    import torch
    from torch import nn

    from lora_export import layers

    found = OutputErrors()
    layouts = {spec.name: spec.layout for spec in layers.specs(module)}
    hooks = []
    for name, error in errors.items():
        owner = module.get_submodule(name.rpartition(".")[0])
        if error.is_corrected and error.own.ndim == 2 and not isinstance(owner, nn.Embedding | nn.MultiheadAttention):
            own, least = (part if layouts[name] is Layout.IN_OUT else part.T for part in (error.own, error.least))
            measure = functools.partial(_measure, found, name, torch.from_numpy(own), torch.from_numpy(least))
            hooks.append(owner.register_forward_pre_hook(measure, with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _measure(
    found: OutputErrors,
    name: str,
    own: torch.Tensor,
    least: torch.Tensor,
    _: nn.Module,
    inputs: tuple[Any, ...],
    named_inputs: dict[str, Any],
) -> None:
    x = next(iter((*inputs, *named_inputs.values()))).detach().float().cpu()
    found.own[name] = found.own.get(name, 0.0) + float((x @ own).double().square().sum())
    found.least[name] = found.least.get(name, 0.0) + float((x @ least).double().square().sum())


# --- what the verdict reports -------------------------------------------------------------------


def findings_on(errors: Mapping[str, QuantisationError], outputs: OutputErrors) -> parity.Findings:
    """Decide which weights are no rounding of the right ones, and which could not be decided."""
    faults: list[str] = []
    doubts: list[str] = []
    unjudged = []
    for name, error in errors.items():
        if error.has_few:
            text = (
                f"{name}: {error} are not the nearest to the right weight that their scales allow, and all others are. "
                f"The worst is {error.excess:.2g} steps further away than the nearest"
            )
            (faults if error.excess > NEIGHBOUR else doubts).append(text)
        elif error.is_corrected:
            times = outputs.relative(name)
            what = "the layer's outputs are" if times is not None else "the weight is"
            times = error.relative if times is None else times
            text = (
                f"{name}: {error} are not the nearest to the right weight that their scales allow, and {what} "
                f"{times:.3g} times as far away as with the nearest: this is more than a quantiser leaves"
            )
            if times <= SMALL_OUTPUT_ERROR:
                unjudged.append(name)
            else:
                (faults if times > LARGE_OUTPUT_ERROR else doubts).append(text)
        if error.blank_blocks:
            faults.append(
                f"{name}: all numbers are the same in each of {error.blank_blocks:,} blocks of {MEASURED_BLOCK}, and "
                "those of the right weight are not"
            )
        elif error.coarse_blocks and error.coarseness <= COARSE:
            doubts.append(
                f"{name}: the scales do not fit the right weight in {error.coarse_blocks:,} blocks of "
                f"{MEASURED_BLOCK}: they are more than {COARSE:g} times as coarse as the number of bits needs"
            )
        if error.coarseness > COARSE:
            doubts.append(
                f"{name}: the scales do not fit the right weight. The rounded weight is {error.coarseness:.3g} times "
                "as far away as its number of bits needs"
            )
    return parity.Findings(not_judged=_not_judged(unjudged), doubts=tuple(doubts), faults=tuple(faults))


def _not_judged(weights: Sequence[str]) -> tuple[str, ...]:
    """One message on weights whose integers a quantiser seems to have chosen on purpose."""
    if not weights:
        return ()
    return (
        f"each integer of {first_of(weights, parity.SHOWN)}. Many are not the nearest to the "
        "right weight, and the layers' outputs are as near as with the nearest. GPTQ leaves such integers",
    )
