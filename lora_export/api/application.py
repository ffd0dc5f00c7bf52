"""How adapters are applied, where that is more than a sum on each weight: options that merges and proofs share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_export.adapters.combination import Combination
from lora_export.plan import Tied


@dataclass(frozen=True)
class Application:
    """How the pairs of several adapters are combined, and what happens to tied tensors of which one changes."""

    combination: Combination = field(default_factory=Combination)
    tied: Tied = Tied.ERROR

    @classmethod
    def of(cls, combination: str | Combination, tied: str) -> Application:
        """From the arguments of a function. Raises WrongUsage for a method that does not exist or lacks a value."""
        return cls(Combination(combination) if isinstance(combination, str) else combination, Tied(tied))

    @property
    def settings(self) -> dict[str, Any]:
        """What records and reports contain of it; empty where it is the default."""
        return {**self.combination.settings, **({} if self.tied is Tied.ERROR else {"tied": str(self.tied)})}
