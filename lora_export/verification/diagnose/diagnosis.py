"""The result of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass


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
    why: str
    layers: tuple[LayerError, ...] = ()

    def __str__(self) -> str:
        title = "no module differs" if self.first is None else f"first module that differs: {self.first}"
        return "\n".join([title, *(f"  {line}" for line in self.why.split("\n") if line)])
