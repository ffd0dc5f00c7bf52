"""The merge report: what became of each weight, in numbers, measured on what was stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, brief, count, listed
from lora_export.notebook import html_table
from lora_export.options.spelling import command, named
from lora_export.sums import sum_dtype

LOW_RETENTION = 0.9  # below this a result is worth a warning
MIN_RETENTION = 0.5  # below this a merge is refused, unless the user chooses another limit

OnBytesWritten = Callable[[int], None]  # receives how many bytes of output have been written since the last call

# A sum of squares below this, or above its inverse, may have under- or overflown in fp32. It is computed again in fp64.
SMALLEST_SUM = 1e-25
COMPARED_AT_ONCE = 1 << 16  # entries; a comparison of so many stays in a core's cache


@dataclass(frozen=True)
class OutputResult:
    """What became of the outputs of a layer on held-out inputs, relative to the effect of its change on them."""

    retention: float  # <X(W'-W)ᵀ, XΔWᵀ> / ‖XΔWᵀ‖²: how much of the effect arrived
    error: float  # ‖X(W'-W-ΔW)ᵀ‖ / ‖XΔWᵀ‖
    # The same of the nearest values
    nearest_retention: float
    nearest_error: float
    is_calibrated: bool  # whether numbers of W' are not the nearest

    @classmethod
    def of(cls, sums: NDArray[np.float64]) -> OutputResult | None:
        """From ‖XΔWᵀ‖², of the errors <., XΔWᵀ> and ‖.‖², the same of the nearest values, and how many are others."""
        effect, along, error, nearest_along, nearest_error, others = map(float, sums)
        if not effect:
            return None
        ratios = 1 + along / effect, math.sqrt(error / effect)
        return cls(*ratios, 1 + nearest_along / effect, math.sqrt(nearest_error / effect), others > 0)


@dataclass(frozen=True)
class StepResult:
    """What became of one weight, measured on what was written: how much of the change survived rounding."""

    weight: str
    relative_change: float  # ‖ΔW‖ / ‖W‖
    retention: float  # <W'-W, ΔW> / ‖ΔW‖²: how much of the change arrived
    noise: float  # ‖(W'-W) - ΔW‖ / ‖ΔW‖
    changed: int  # entries whose stored value changed
    elements: int  # entries that were measured
    outputs: OutputResult | None = None  # where inputs of the layer were given

    @property
    def arrived(self) -> float:
        """How much of the change arrived: in the outputs, where these were measured, else in the weight."""
        return self.retention if self.outputs is None else self.outputs.retention

    @property
    def error(self) -> float:
        """The rounding beside it, measured in the same place."""
        return self.noise if self.outputs is None else self.outputs.error


@dataclass(frozen=True)
class QuantisationLoss:
    """How far a dequantised weight Q is from the float weight W that it was made from."""

    weight: str
    scheme: str  # such as nf4
    norm: float  # ‖W‖
    error: float  # ‖Q - W‖
    relative_error: float  # ‖Q - W‖ / ‖W‖
    change: float | None  # ‖ΔW‖ of the adapters; None where they do not change the weight


@dataclass(frozen=True)
class QuantisedLayer:
    """A quantised weight of the base, and how the output stores it."""

    weight: str
    scheme: str  # in the base, such as gptq 4-bit
    stored: str  # in the output: the same scheme, or the type that it was promoted to
    why: str  # why it was promoted; empty where it is kept
    # Of the change in the scheme of the base, rounded to nearest; None where no adapter adds to it.
    retention: float | None
    noise: float | None
    outputs: OutputResult | None = None  # of the change, where inputs of the layer were given

    @property
    def is_kept(self) -> bool:
        return not self.why


@dataclass(frozen=True, repr=False)
class MergeReport:
    """What a merge did, in numbers."""

    results: tuple[StepResult, ...]
    copied: int  # bytes that were copied unchanged
    bytes: int  # bytes of weights written in all
    replaced: int = field(init=False)  # tensors that adapters replaced, whole or in some rows
    replaced_weights: tuple[str, ...]  # the names of these
    seconds: float
    spellings: Mapping[str, str] = field(default_factory=dict)  # adapter -> how its names relate to the base's
    quantisation: tuple[QuantisationLoss, ...] = ()  # of each quantised weight, where the float base was given
    layers: tuple[QuantisedLayer, ...] = ()  # changed or promoted, where a quantised base stays quantised
    base_bytes: int = 0  # of weights of the base, there

    def __post_init__(self) -> None:
        object.__setattr__(self, "replaced", len(self.replaced_weights))

    def __repr__(self) -> str:
        return brief(self, f"{count(len(self.results), 'weight')} merged", f"{self.bytes:,} bytes written")

    def _repr_html_(self) -> str:
        rows = [(each.weight, each.relative_change, f"{each.retention:.1%}", each.noise) for each in self.results]
        return html_table(repr(self), ("weight", "‖ΔW‖ / ‖W‖", "of it kept", "noise / ‖ΔW‖"), rows)

    @property
    def has_new_scales(self) -> bool:
        """Whether weights that stay quantised have new scales."""
        return any(layer.stored.endswith("new scales") for layer in self.layers)

    @property
    def below_rounding(self) -> tuple[StepResult, ...]:
        """The weights whose change is so small that rounding took more than a tenth of it."""
        return tuple(result for result in self.results if result.arrived < LOW_RETENTION)


def refuse_below_rounding(
    results: Sequence[StepResult], min_retention: float, ways_out: Callable[[], str] | None = None
) -> None:
    """Raise InputRefused where rounding took too much of a change.

    `ways_out` spells what helps, when it is needed: with flags that imports the options of all commands. By default
    they are those of a checkpoint.
    """
    lost = [result for result in results if result.arrived < min_retention]
    if lost:
        in_its_type = f"{named('calibration', 'TEXTS')} rounds it to its type with feedback"
        if all(result.outputs is not None for result in lost):  # of both roundings
            in_its_type = "No rounding to its type keeps it"
        in_a_checkpoint = (
            f"Store the result with {named('dtype', 'float32')}, or keep the adapter beside the weights "
            f"({command('onnx', lora='nodes')}). {in_its_type}"
        )
        lines = [f"{r.weight}: {r.arrived:.1%} of the change kept, noise {r.error:.0%}" for r in lost]
        raise InputRefused(
            f"{len(lost)} of {len(results)} weights would lose most of their change to rounding "
            f"({named('min_retention', min_retention)}):",
            listed(lines),
            f"{ways_out() if ways_out else in_a_checkpoint}",
        )


def refuse_no_change(report: MergeReport) -> None:
    """Raise InputRefused where a merge changed no weight at all."""
    if not report.replaced and not any(result.changed for result in report.results):
        raise InputRefused("the merge would change no entry of any weight: the whole change is lost to rounding")


class Statistics:
    """Sums over the blocks of one weight, in fp64."""

    def __init__(self, weight: str, outputs: NDArray[np.float64] | None = None):
        self.weight = weight
        self.sums = np.zeros(5)  # ‖W‖², ‖ΔW‖², <W'-W, ΔW>, ‖(W'-W) - ΔW‖², entries changed
        self.outputs = np.zeros(6) if outputs is None else outputs  # see `OutputResult.of`
        self.elements = 0

    def add_block(
        self,
        weight: NDArray[Any],
        change: NDArray[np.float32],
        merged: NDArray[Any],
        scratch: NDArray[Any] | None = None,
    ) -> None:
        """Add a block: the weight before, the change that should be added to it, and what was stored.

        `scratch`, of the weight's shape and `sum_dtype`, is overwritten. Give it where many blocks are added: new
        memory for each block costs several times what is computed in it.
        """
        if scratch is None:
            scratch = np.empty(weight.shape, sum_dtype(weight.dtype))
        sums = _sums(weight, change, merged, scratch)
        if not is_in_range(sums[:2]):
            sums = _sums(weight, change, merged, np.empty(weight.shape))
        self.add_sums(sums, weight.size)

    def add_sums(self, sums: NDArray[np.float64], elements: int) -> None:
        """Add the sums over so many entries."""
        self.sums += sums
        self.elements += elements

    def merge(self, other: Statistics) -> None:
        """Add the sums of another object over other blocks of the same weight."""
        self.sums += other.sums
        self.outputs += other.outputs
        self.elements += other.elements

    def result(self) -> StepResult:
        """The figures of the whole weight."""
        weight_sq, change_sq, kept_by_change, noise_sq, changed = map(float, self.sums)
        if not change_sq:  # nothing should have changed, so nothing was lost
            return StepResult(self.weight, 0.0, 1.0, 0.0, int(changed), self.elements)
        return StepResult(
            weight=self.weight,
            relative_change=math.sqrt(change_sq / weight_sq) if weight_sq else math.inf,
            retention=kept_by_change / change_sq,
            noise=math.sqrt(noise_sq / change_sq),
            changed=int(changed),
            elements=self.elements,
            outputs=OutputResult.of(self.outputs),
        )


class StatisticsByWeight:
    """Statistics of blocks, summed by their weights."""

    def __init__(self, found: Iterable[Statistics] = ()) -> None:
        self._sums: dict[str, Statistics] = {}
        self.add(found)

    def add(self, found: Iterable[Statistics] | None) -> None:
        """Add statistics to those of their weights."""
        for each in found or ():
            self._sums.setdefault(each.weight, Statistics(each.weight)).merge(each)

    @property
    def results(self) -> tuple[StepResult, ...]:
        """The figures of each weight."""
        return tuple(each.result() for each in self._sums.values())


def is_in_range(squares: NDArray[np.float64]) -> bool:
    """Whether sums of squares in fp32 neither under- nor overflow."""
    return bool(np.all((squares > SMALLEST_SUM) & (squares < 1 / SMALLEST_SUM)))


def _sums(
    weight: NDArray[Any], change: NDArray[np.float32], merged: NDArray[Any], scratch: NDArray[Any]
) -> NDArray[np.float64]:
    flat, expected = scratch.reshape(-1), change.astype(scratch.dtype, copy=False).reshape(-1)
    with np.errstate(over="ignore"):  # `add_block` checks for it
        np.copyto(scratch, weight)
        weight_sq = flat @ flat
        np.copyto(scratch, merged)
        scratch -= weight  # W' - W
        kept_by_change = flat @ expected
        starts = range(0, flat.size, COMPARED_AT_ONCE)
        # Comparing with 0 and counting booleans is several times as fast as counting numbers that are not 0.
        changed = sum(np.count_nonzero(flat[start : start + COMPARED_AT_ONCE] != 0) for start in starts)
        flat -= expected
        return np.array([weight_sq, expected @ expected, kept_by_change, flat @ flat, changed], np.float64)
