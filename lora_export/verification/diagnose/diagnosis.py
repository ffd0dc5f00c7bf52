"""The result of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_export.errors import EscapedLines, escaped_lines


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
