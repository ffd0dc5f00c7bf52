"""Why tensors of adapters cannot change the same base tensor together, or one that has two names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lora_export.errors import Misfit
from lora_export.lora import LoraPair
from lora_export.plan.match_names import apart_or_both
from lora_export.plan.match_tensors import Match
from lora_export.plan.types import TensorSpec


def conflicts(matches: Sequence[Match]) -> list[Misfit]:
    """The conflicts among matches of one base tensor.

    Whole tensors conflict where they differ or others add to them, rows where two adapters replace the same one, pairs
    where one rescales the sum or they were trained on different kinds of layers.
    """
    return [*_of_wholes(matches), *_of_rows(matches), *_of_pairs(matches)]


def broken_ties(by_weight: Mapping[str, Sequence[Match]], base: Mapping[str, TensorSpec]) -> Iterator[Misfit]:
    """Changes of a tensor that is stored once under several names, where a name's own tensor does not change.

    If the parameters were trained apart, they would be two tensors. Rows of tokens are allowed: where parameters are
    tied, PEFT trains them for both.
    """
    for weight, matches in by_weight.items():
        aliases = base[weight].aliases if weight in base else ()
        unchanged = [
            alias
            for alias in aliases
            if alias not in by_weight and not all(alias in match.repeated_by for match in matches)
        ]
        if unchanged and any(match.rows is None for match in matches):
            why = (
                f"{weight} is {' and '.join(unchanged)} too (the header of the file ties them), which the adapter does "
                f"not change. {apart_or_both()}"
            )
            yield Misfit(matches[0].adapter, weight, why)


def overlapping_parts(by_weight: Mapping[str, Sequence[Match]], base: Mapping[str, TensorSpec]) -> Iterator[Misfit]:
    """Changes of parts of a stored tensor that are changes of the whole, or of an overlapping part, too.

    They are spelled differently: one adapter has q, k and v, another one a fused q|k|v.
    """
    parts: dict[str, list[str]] = {}
    for weight in by_weight:
        if weight in base and base[weight].region is not None:
            parts.setdefault(base[weight].stored_name, []).append(weight)
    for tensor, weights in parts.items():
        for number, weight in enumerate(weights):
            region = base[weight].region
            others = [tensor] if tensor in by_weight else []
            others += [
                other
                for other in weights[number + 1 :]
                if region is not None and (own := base[other].region) is not None and region.overlaps(own)
            ]
            for other in others:
                why = (
                    f"{by_weight[weight][0].adapter} changes {weight}, and {by_weight[other][0].adapter} changes "
                    f"{other}, which has entries of it. Merge one adapter, then the other into the result"
                )
                yield Misfit(by_weight[weight][0].adapter, weight, why)


def _what_depends(pair: LoraPair) -> str:
    return f"{pair.kind}'s change follows from the weight" if pair.needs_weight else "DoRA rescales the whole sum"


def _of_wholes(matches: Sequence[Match]) -> Iterator[Misfit]:
    owner, whole = next(((match, match.whole) for match in matches if match.whole is not None), (None, None))
    if owner is None or whole is None:
        return
    name, first = owner.weight, owner.adapter
    for other in matches:
        if other.whole is not None:
            if not np.array_equal(other.whole, whole):
                why = f"{first} also replaces {name}, with other values. Merge only one of these adapters"
                yield Misfit(other.adapter, name, why)
        elif other.adapter != first or other.shift is not None:
            # A pair of the same adapter is no conflict: PEFT saves a table of embeddings with the pair that changes it.
            why = f"{first} replaces the whole {name}, and {other.adapter} adds to it. Merge only one of these adapters"
            yield Misfit(first, name, why)


def _of_rows(matches: Sequence[Match]) -> Iterator[Misfit]:
    with_rows = [(match, match.rows) for match in matches if match.rows is not None]
    owners: dict[int, str] = {}
    for match, rows in with_rows:
        shared = sorted(set(rows.indices.tolist()) & owners.keys())
        if shared:
            why = f"{owners[shared[0]]} also replaces rows of {match.weight}, for example row {shared[0]}"
            yield Misfit(match.adapter, match.weight, f"{why}. Merge only one of these adapters")
        owners |= dict.fromkeys(rows.indices.tolist(), match.adapter)
    if with_rows:
        owner = with_rows[0][0]
        for other in matches:
            if other.term is not None:
                why = f"{owner.adapter} replaces rows of {owner.weight}, and {other.adapter} adds to it"
                yield Misfit(owner.adapter, owner.weight, f"{why}. Merge only one of these adapters")


def _of_pairs(matches: Sequence[Match]) -> Iterator[Misfit]:
    terms = [match.term for match in matches if match.term is not None]
    for term in terms[1:]:
        name, first = matches[0].weight, terms[0]
        if first.pair.embedding is not term.pair.embedding:
            kinds = {True: "an embedding", False: "a linear layer"}
            why = (
                f"{term.adapter} was trained with {name} as {kinds[term.pair.embedding]}, "
                f"{first.adapter} as {kinds[first.pair.embedding]}"
            )
            yield Misfit(term.adapter, name, why)
        elif deciding := next((one.pair for one in (first, term) if one.pair.depends_on_weight), None):
            why = (
                f"{first.adapter} and {term.adapter} both change {name}, and {_what_depends(deciding)}, so the "
                "result depends on their order. To choose an order, merge one adapter, then the other into the result"
            )
            yield Misfit(term.adapter, name, why)
