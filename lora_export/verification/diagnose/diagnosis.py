"""What a diagnosis observes of a layer of the candidate, on its own input, and its result. Arrays only.

The output of a layer is linear in its weight: y = x Wᵀ + b for a weight W (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from lora_export.errors import EscapedLines, escaped_lines
from lora_export.lora import LoraPair
from lora_export.pairs.exact_transforms import exact_change
from lora_export.pairs.transforms import WeightTransform
from lora_export.plan import Step, Term
from lora_export.verification.parity import EPS, FEW_EPS, Array, Wide, rms

# A layer may be off by this many times the error of its own product in fp32, and by FEW_EPS of its output.
FP32_ERRORS = 8.0


@dataclass(frozen=True, eq=False)
class LayerObservation:
    """The input and output of one layer of the candidate, and the weights that it should have.

    All are in fp64, with a convolution's kernel flattened. For an embedding, `x` are ids (n,).
    """

    name: str
    x: Array  # (n, in)
    y: Wide  # (n, out)
    weight: Wide  # (out, in): the base's, or the adapter's where that replaces the whole tensor
    bias: Wide | None = None  # (out,), with the adapter's shift
    step: Step | None = None  # what the adapters do to the weight
    shift: Wide | None = None  # (out,): the adapter's part of the bias
    original_weight: Wide | None = None  # (out, in): the base's, where the adapter replaces the whole tensor
    candidate_weight: Wide | None = None  # (out, in): the one that the candidate stores, where it can be read
    rounded_weight: Wide | None = None  # (out, in): W + ΔW as it should be rounded, where it is stored rounded
    tolerance: float = 0.0  # allowed by PyTorch's own error, which fp32 does not explain where a layer runs in int8

    @property
    def terms(self) -> Sequence[Term]:
        """The adapters' pairs on this weight."""
        return self.step.terms if self.step else ()

    @property
    def magnitude(self) -> Array | None:
        """DoRA's magnitude (out,)."""
        return self.step.magnitude if self.step else None

    @property
    def has_factors(self) -> bool:
        """Whether the adapters' changes are products of A and B."""
        return not any(term.pair.needs_weight for term in self.terms)

    @property
    def constant(self) -> Wide:
        """(out,): the bias, or zeros."""
        return np.zeros(len(self.weight)) if self.bias is None else self.bias

    # --- outputs ---

    @cached_property
    def base_output(self) -> Wide:
        """(n, out): the output without the pairs."""
        return self.product(self.weight) + self.constant

    @cached_property
    def pair_outputs(self) -> list[Wide]:
        """(n, out) for each term: what its pair adds to the output."""
        return [self.pair_output(term) for term in self.terms]

    @cached_property
    def expected(self) -> Wide:
        """(n, out): the correct output."""
        if self.rounded_weight is None:
            return self.expected_unrounded
        return self.product(self.rounded_weight) + self.constant

    @cached_property
    def expected_unrounded(self) -> Wide:
        """(n, out): the output with W + ΔW, unrounded."""
        if self.magnitude is not None:
            return self.dora_product(self.magnitude, self.merged_weight()) + self.constant
        return self.base_output + sum(self.pair_outputs, np.zeros_like(self.base_output))

    def pair_output(self, term: Term, x: Array | None = None) -> Wide:
        """(n, out): what a term's pair makes of the layer's input, or of another one."""
        x = self.x if x is None else x
        if term.pair.needs_weight:
            return apply_matrix(x, self.change_of(term))
        a, b = factors(term.pair)
        return apply_matrix(apply_matrix(x, a), b) * term.scale

    def product(self, weight: Wide) -> Wide:
        """(n, out): x Wᵀ."""
        return apply_matrix(self.x, weight)

    def merged_weight(self, factor: float = 1.0) -> Wide:
        """(out, in): W + factor · ΔW."""
        total = self.weight.copy()
        for term in self.terms:
            total += factor * self.change_of(term)
        return total

    def change_of(self, term: Term) -> Wide:
        """(out, in): what a term adds to the weight."""
        if isinstance(term.pair, WeightTransform):
            return term.strength * exact_change(term.pair, self.weight)[0]
        a, b = factors(term.pair)
        return term.scale * (b @ a)

    def dora_product(self, magnitude: Array, weight: Wide, norms_of: Wide | None = None) -> Wide:
        """(n, out): x Wᵀ, each output times its magnitude / ‖W‖; with the norms of `norms_of` instead, if given."""
        return self.product(weight) * expected_dora_factors(magnitude, weight if norms_of is None else norms_of)

    # --- errors ---

    @cached_property
    def error(self) -> float:
        """rmse of the output from the expected one; infinite where it is not finite."""
        return rms(self.y - self.expected) if np.isfinite(self.y).all() else math.inf

    @cached_property
    def allowed_error(self) -> float:
        """The error that fp32 costs this layer on this input, some times over."""
        merged = self.merged_weight()
        x = self.x.astype(np.float32) if self.x.dtype.kind == "f" else self.x
        in_fp32 = apply_matrix(x, merged.astype(np.float32)).astype(np.float64)
        own = rms(in_fp32 - self.product(merged))
        return max(self.tolerance, FP32_ERRORS * own, FEW_EPS * EPS["float32"] * rms(self.expected))

    @property
    def rounding_error(self) -> float:
        """rmse that an intended rounding costs the output. No explanation can be finer than twice that."""
        return rms(self.expected - self.expected_unrounded)

    @property
    def agrees(self) -> bool:
        """Whether the output is correct."""
        return self.error <= self.allowed_error


def apply_matrix(x: Array, matrix: Array) -> Array:
    """x (n, in), or ids (n,) of its columns, by a matrix (out, in)."""
    product: Array = x @ matrix.T if x.ndim == 2 else matrix[:, x].T
    return product


def factors(pair: LoraPair) -> tuple[Wide, Wide]:
    """A (rank, in) and B (out, rank) in fp64, a convolution's kernel flattened."""
    a, b = pair.a.astype(np.float64), pair.b.astype(np.float64)
    return a.reshape(pair.rank, -1), b.reshape(-1, pair.rank)


def expected_dora_factors(magnitude: Array, weight: Wide) -> Wide:
    """(out,): magnitude / ‖W‖; the magnitude itself where a row of W is zero."""
    norms = np.linalg.norm(weight, axis=1)
    factor: Wide = magnitude / np.where(norms, norms, 1.0)
    return factor


# --- one layer, as every run computed it ---


@dataclass(frozen=True)
class LayerError:
    """The error of one module's output in one case, in the output's own units."""

    name: str
    error: float  # rmse(candidate, reference); infinite where the candidate is not finite
    deployed_error: float  # rmse(PyTorch, reference)
    effect: float | None  # rmse(reference, base without adapters); None without an adapter


@dataclass(frozen=True)
class Diagnosis:
    """The first module whose output differs, and why. `layers` are in the order in which they run."""

    first: str | None  # None where no module differs
    why: str  # one line; several where it is EscapedLines
    layers: tuple[LayerError, ...] = ()
    title: str = field(default="", repr=False)  # in place of the first module, where no modules were compared

    def __post_init__(self) -> None:
        object.__setattr__(self, "why", escaped_lines(self.why))

    @property
    def text(self) -> EscapedLines:
        """The first module that differs, and why, in lines."""
        title = self.title or (
            "no module differs" if self.first is None else f"first module that differs: {self.first}"
        )
        return escaped_lines(title, *(f"  {line}" for line in self.why.split("\n") if line))

    def __str__(self) -> str:
        return self.text
