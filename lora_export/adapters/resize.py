"""An adapter of another rank: each pair becomes the best one of a lower rank, by an SVD of its factors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lora_export.adapters import low_rank
from lora_export.adapters.low_rank import LayerShare, SingularValues, Truncation
from lora_export.adapters.plain_pairs import refuse_beyond_pairs
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair


def resize_adapter(
    adapter: Adapter, truncation: Truncation, group: Callable[[str], str] = lambda module: module
) -> tuple[Adapter, tuple[LayerShare, ...]]:
    """The adapter with pairs of lower rank and scale 1, and what each of them holds of the change before.

    No rank grows. Modules of one `group` get one rank, the largest of theirs. Tensors that are saved whole stay.
    Raises InputRefused for what is no plain pair, and for a change that float32 cannot hold.
    """
    refuse_beyond_pairs([adapter], "a resized adapter", whole_ok=True)
    values = {module: _values(module, pair) for module, pair in adapter.pairs.items()}
    ranks: dict[str, int] = {}
    for module, found in values.items():
        ranks[group(module)] = max(truncation.rank_of(found), ranks.get(group(module), 1))
    pairs, shares = {}, []
    for module, found in values.items():
        old, rank = adapter.pairs[module], ranks[group(module)]
        pairs[module] = _pair(old, found, rank)
        share = found.captured(rank)
        shares.append(LayerShare(module, old.shape, rank, old.rank, share, math.sqrt(found.energy)))
    return replace(adapter, pairs=pairs, sha256=""), tuple(shares)


def _values(module: str, pair: LoraPair) -> SingularValues:
    try:
        found = low_rank.of_pair(pair)
    except InputRefused as error:
        raise InputRefused(f"{module}: {error}") from error
    if found.s[0] > np.finfo(np.float32).max:
        raise InputRefused(
            f"{module}: the change holds values that float32 cannot hold. Check its scale, {pair.scale:g}"
        )
    return found


def _pair(old: LoraPair, found: SingularValues, rank: int) -> LoraPair:
    a, b = found.factors(rank)
    kernel = [1] * (len(old.shape) - 2)
    return LoraPair(a.reshape(-1, *old.shape[1:]), b.reshape(*b.shape, *kernel), 1.0, embedding=old.embedding)
