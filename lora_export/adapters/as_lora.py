"""Any adapter as one of plain LoRA: exactly where the rank is enough, else the best pair of that rank for each layer.

A LoHa (B1 A1) ∘ (B2 A2) is a product of Khatri-Rao factors, whose rank is that of both together (Hyeon-Woo et al. 2022,
proposition 1). All others are decomposed: see `low_rank.of_pair`. DoRA's magnitude stays where the change is exact: the
length of W + ΔW is that of the exact change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from lora_export.adapters.low_rank import LayerShare, pair_of, values_of_change
from lora_export.adapters.singular_values import SingularValues, Truncation
from lora_export.errors import InputRefused, listed
from lora_export.lora import Adapter, LoraPair
from lora_export.options.spelling import named
from lora_export.pairs.structured import HadamardPair

ROUNDING = 1e-9  # of a share: factors in fp32 lose less of ‖ΔW‖²


def as_lora(
    adapter: Adapter, rank: int, min_kept: float, group: Callable[[str], str] = lambda module: module
) -> tuple[Adapter, tuple[LayerShare, ...]]:
    """The adapter with pairs of A and B alone, and what each of them holds of its layer's change.

    Plain pairs of at most this rank stay as they are. Modules of one `group` get one rank. Raises InputRefused with all
    layers whose pair would hold less than `min_kept` of ‖ΔW‖², and for DoRA on a layer whose change is not exact.
    """
    members: dict[str, list[str]] = {}
    for module in adapter.pairs:
        members.setdefault(group(module), []).append(module)
    pairs, layers, problems = dict(adapter.pairs), [], []
    for modules in members.values():
        if all(type(adapter.pairs[module]) is LoraPair and adapter.pairs[module].rank <= rank for module in modules):
            found: Mapping[str, SingularValues] = {}
        else:
            found = {name: values_of_change(name, adapter.pairs[name], Truncation(rank)) for name in modules}
        for module in modules:
            old = adapter.pairs[module]
            pair, share = _exact(old, rank) if len(modules) == 1 or not found else None, 1.0
            if pair is None:
                values = found[module]
                own = max(_rank_of(each, rank) for each in found.values())
                pair, share = pair_of(old, values, own), values.captured(own)
                pair = replace(pair, magnitude=old.magnitude, as_stored=old.as_stored)
            pairs[module] = pair
            layers.append(LayerShare(module, old.shape, pair.rank, old.rank, share, old.norm))
            if share < min_kept - ROUNDING:
                problems.append(f"{module}: {share:.4g} of its change at rank {pair.rank}")
            elif share < 1 - ROUNDING and old.magnitude is not None:
                problems.append(
                    f"{module}: DoRA's magnitude is that of the exact change, and rank {rank} has {share:.4g}"
                )
    pairs |= {head: pairs[table].transposed for head, table in adapter.tied.items()}  # one pair for both
    if problems:
        raise InputRefused(
            f"{adapter.name} as LoRA of rank {rank} would lose a part of {len(problems)} of {len(layers)} layers:",
            listed(problems, len(problems)),
            f"Give a larger {named('rank')}, or state the least share of ‖ΔW‖² that has to be kept of each layer by "
            f"{named('min_kept')}. Nothing was written.",
        )
    return replace(adapter, pairs=pairs, sha256="", file_sha256=""), tuple(layers)


def _exact(pair: LoraPair, rank: int) -> LoraPair | None:
    """The factors of a pair that has them in at most this rank, with its own scale."""
    if pair.rank > rank:
        return None
    if isinstance(pair, HadamardPair):
        return LoraPair(pair.a, pair.b, pair.scale, pair.magnitude)
    return pair if type(pair) is LoraPair else None


def _rank_of(values: SingularValues, rank: int) -> int:
    """The least rank that holds all of a change, 1 or more, up to this one."""
    largest = values.s[0] * np.finfo(np.float32).eps * math.sqrt(len(values.s))
    return max(1, min(rank, int(np.count_nonzero(values.s > largest))))
