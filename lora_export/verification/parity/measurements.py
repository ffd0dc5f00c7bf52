"""The measurements of one output in one case, and the checks that they pass or fail."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

PYTORCH = "PyTorch"


@dataclass(frozen=True)
class Gate:
    """One check of one output. It passes where `value` is at most `allowed`."""

    name: str
    value: float
    allowed: float
    passed: bool

    @property
    def limit_used(self) -> float:
        """value / allowed: over 1 is a failure."""
        if self.allowed:
            return self.value / self.allowed
        return 0.0 if self.passed else math.inf


@dataclass(frozen=True)
class Control:
    """The gates applied with a reference that is wrong on purpose. They must fail, or they could not have failed."""

    name: str
    error: float  # rmse of the candidate against the wrong reference
    detected: bool
    required: bool  # False for an output that the mistake cannot change, as where no adapter reaches it

    @property
    def is_missed(self) -> bool:
        """Whether the check failed to detect a mistake that it had to detect."""
        return self.required and not self.detected


@dataclass(frozen=True)
class WorstElement:
    """The element of the candidate that is farthest from the reference."""

    index: tuple[int, ...]
    candidate: float
    reference: float


@dataclass(frozen=True)
class Histogram:
    """Magnitudes by powers of two: counts[i] elements are in [2^(first+i), 2^(first+i+1)), `zeros` elements are 0."""

    first: int
    counts: tuple[int, ...]
    zeros: int


@dataclass(frozen=True)
class Figures:
    """The measurements of one output in one case, in the units of the output unless stated otherwise.

    O is the candidate, R the reference, P the peer (PyTorch as deployed), B the reference without adapters.
    """

    dtype: str
    shape: tuple[int, ...]
    ratio_limit: float  # allowed multiple of the peer's own error; 0 for integers and booleans
    error: float  # rmse(O, R)
    deployed_error: float  # rmse(P, R)
    ratio: float | None  # error / deployed_error; None where the peer is exact
    max_error: float  # max |O - R|
    deployed_max_error: float  # max |P - R|
    max_relative_error: float | None  # max |O - R| / |R| where R is not 0
    worst: WorstElement
    effect: float | None  # rmse(R, B), the adapter's effect; None without an adapter
    relative_to_effect: float | None  # error / effect; None where there is no effect
    cosine: float | None  # of O and R; None where one of them is all zero
    top1: float | None  # fraction of rows with the same largest class; class scores only
    kl: float | None  # mean KL(R || O) in nats; class scores only
    merge_loss: float | None  # rmse(R with rounded weights, R) / effect, where weights were rounded
    errors: Histogram  # |O - R|, element by element
    deployed_errors: Histogram  # |P - R|
    effects: Histogram | None  # |R - B|; None without an adapter
    gates: tuple[Gate, ...]
    controls: tuple[Control, ...]
    peer: str = field(default=PYTORCH, repr=False)  # the implementation whose own error sets the limits

    @property
    def limit_used(self) -> float:
        """value / allowed of the gate that is closest to its limit: over 1 is a failure."""
        return max(gate.limit_used for gate in self.gates)

    def gate(self, name: str) -> Gate | None:
        """The gate of this name; None where it was not applied."""
        return next((gate for gate in self.gates if gate.name == name), None)
