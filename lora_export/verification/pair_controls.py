"""What was found when single pairs of the adapters were switched off (references/switched_pairs.py), in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lora_export.errors import count
from lora_export.options.spelling import named
from lora_export.verification import parity

SHOWN_PAIRS = 5


@dataclass(frozen=True)
class PairControls:
    """What was found when pairs were switched off. A name stands for the pairs that were off together."""

    names: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()  # no output changes in any case
    missed: tuple[str, ...] = ()  # some do, by so little that the candidate may lack the pairs
    # Others whose absence the gates miss, and the share of their effect that the candidate lacks
    shares: Mapping[str, float] = field(default_factory=dict)
    by_layer: bool = False  # the pairs of a layer were off together

    @property
    def detected(self) -> frozenset[str]:
        """The names whose absence the gates detect, whatever the candidate is."""
        return frozenset(self.names) - {*self.without_effect, *self.missed, *self.shares}

    @property
    def doubts(self) -> list[str]:
        """One message on the pairs that change nothing: a fault in them cannot show."""
        if not self.without_effect:
            return []
        return [
            f"no output depends on {self._counted(self.without_effect)}: {first_names(self.without_effect)}. A fault "
            f"in them could not show. Give inputs on which one does ({named('inputs')})"
        ]

    @property
    def faults(self) -> list[str]:
        """A message for each pair that the candidate lacks, or has twice."""
        return [
            f"{name}: the candidate lacks {parity.percent(share)} of what this pair changes"
            if share > 0
            else f"{name}: the candidate has {1 - share:.2g} times what this pair changes"
            for name, share in self.shares.items()
            if abs(share) > parity.LARGEST_SHARE
        ]

    @property
    def not_judged(self) -> list[str]:
        """One message on the pairs whose effect is hidden by rounding."""
        if not self.missed:
            return []
        one = "those of one layer" if self.by_layer else "one of them"
        return [
            f"{self._counted(self.missed)}, whose effect is much smaller than rounding: {first_names(self.missed)}. A "
            f"candidate without {one} would pass"
        ]

    @property
    def notes(self) -> list[str]:
        """How the pairs were switched off, where it was not each by itself."""
        return ["the pairs of one layer were switched off together: the model is large"] if self.by_layer else []

    def _counted(self, found: Sequence[str]) -> str:
        if self.by_layer:
            return f"the pairs of {len(found)} of the {len(self.names)} layers"
        return f"{len(found)} of the {count(len(self.names), 'pair')} of the adapters"


def first_names(names: Sequence[str]) -> str:
    """The first names of a list, and how many follow."""
    more = f" and {len(names) - SHOWN_PAIRS} more" if len(names) > SHOWN_PAIRS else ""
    return ", ".join(names[:SHOWN_PAIRS]) + more
