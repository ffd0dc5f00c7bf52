"""Pairs of the adapters are switched off one after the other, in a module or in a graph, and the outputs are judged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from lora_export.errors import count, first_of
from lora_export.options.spelling import named
from lora_export.runtime.runner import Arrays
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
    def findings(self) -> parity.Findings:
        """What a verdict reports of the pairs.

        Faults are pairs that the candidate lacks, or has twice. A fault in pairs that change nothing could not show.
        """
        notes = ("the pairs of one layer were switched off together: the model is large",) if self.by_layer else ()
        faults = (
            f"{name}: the candidate lacks {parity.percent(share)} of what this pair changes"
            if share > 0
            else f"{name}: the candidate has {1 - share:.2g} times what this pair changes"
            for name, share in self.shares.items()
            if abs(share) > parity.LARGEST_SHARE
        )
        return parity.Findings(notes, tuple(self._hidden()), tuple(self._unseen()), tuple(faults))

    def _unseen(self) -> Iterator[str]:
        if self.without_effect:
            yield (
                f"no output depends on {self._counted(self.without_effect)}: "
                f"{first_of(self.without_effect, SHOWN_PAIRS)}. "
                f"A fault in them could not show. Give inputs on which one does ({named('inputs')})"
            )

    def _hidden(self) -> Iterator[str]:
        if self.missed:
            one = "those of one layer" if self.by_layer else "one of them"
            yield (
                f"{self._counted(self.missed)}, whose effect is much smaller than rounding: "
                f"{first_of(self.missed, SHOWN_PAIRS)}. A candidate without {one} would pass"
            )

    def _counted(self, found: Sequence[str]) -> str:
        if self.by_layer:
            return f"the pairs of {len(found)} of the {len(self.names)} layers"
        return f"{len(found)} of the {count(len(self.names), 'pair')} of the adapters"


# Pairs × parameters up to which each pair is switched off by itself: some minutes. Beyond, the pairs of a layer are.
LARGEST_EFFORT = 2e10

JudgeWithout = Callable[[parity.Case, parity.Outputs], parity.MissingPart]
Pair = TypeVar("Pair")


def switch_off(
    groups: Mapping[str, Sequence[Pair]],
    cases: Sequence[parity.Case],
    run_without: Callable[[Mapping[str, Sequence[Pair]], parity.Case], Iterable[tuple[str, Arrays]]],
    judge: JudgeWithout,
    *,
    detected: Collection[str] = (),
    by_layer: bool = False,
) -> PairControls:
    """Judge the outputs without each group of pairs, case after case.

    A further case follows only for the groups that were not detected so far: the smallest should be the first.
    `detected` are the names of groups that are known to be detected. `run_without` gives what the reference would
    return without each group, in any order.
    """
    undetected = {name: off for name, off in groups.items() if name not in detected}
    silent = set(undetected)
    shares = dict.fromkeys(groups, parity.EffectShare())
    for case in cases:
        for name, outputs in run_without(dict(undetected), case) if undetected else ():
            found = judge(case, outputs)
            shares[name] += found.share
            if found.changes_outputs:
                silent.discard(name)
            if found.is_detected:
                del undetected[name]
    missing = {name: shares[name].missing for name in undetected if name not in silent}
    return PairControls(
        tuple(groups),
        without_effect=tuple(name for name in undetected if name in silent),
        missed=tuple(name for name, share in missing.items() if share is None),
        shares={name: share for name, share in missing.items() if share is not None},
        by_layer=by_layer,
    )


def too_many(pairs: int, parameters: int) -> bool:
    """Whether each pair by itself would take too long: those of a layer are then switched off together."""
    return pairs * parameters > LARGEST_EFFORT


def grouped(pairs: Iterable[tuple[str, str, Pair]], *, by_layer: bool) -> dict[str, list[Pair]]:
    """Name -> the pairs to switch off together, from (module, adapter, pair)."""
    pairs = list(pairs)
    several = len({adapter for _, adapter, _ in pairs}) > 1
    groups: dict[str, list[Pair]] = {}
    for module, adapter, pair in pairs:
        name = _layer_of(module) if by_layer else module
        groups.setdefault(f"{name} of {adapter}" if several else name, []).append(pair)
    return groups


def with_difference(case: parity.Case, off: parity.Outputs, on: parity.Outputs) -> Arrays:
    """The reference's outputs without some pairs, from those of another computation with and without them.

    The other computation may not round as the reference does. What the pairs change is the same in both.
    """
    wrong = {}
    for name, without in off.items():
        with np.errstate(invalid="ignore"):  # inf - inf
            changed = case.reference[name] + (without - on[name])
        wrong[name] = np.where(np.isfinite(without) & np.isfinite(on[name]), changed, without)
    return wrong


def _layer_of(name: str) -> str:
    """`model.layers.3` of `model.layers.3.self_attn.q_proj`; the whole name where it has no number."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name
