"""Combine adapters: within a plan, where all pairs of a weight meet, or by name into one adapter.

The methods are those of PEFT's `add_weighted_adapter`, under their names:

- `cat`: the exact sum. A and B are concatenated along the rank. A merge needs no such pair: it adds each.
- `linear`: A is a weighted sum of all A, and B of all B. B A then has cross terms of one adapter's B and another's A:
  it is no sum of the changes. Each factor takes the root of weight · scale, and A its sign.
- `svd`: the exact sum, cut to a lower rank.
- `ties`, `dare_linear`, `dare_ties`, `magnitude_prune`: as `linear`, of factors from which entries were removed.
- the same with `_svd`: of the whole changes; the result is cut to a rank. It needs the SVD of a whole matrix.

TIES: Yadav et al. 2023. DARE: Yu et al. 2024. PEFT gives the adapter that it makes the alpha of its rank. With rsLoRA
its scale is then √rank, and the combined change is wrong by this factor (PEFT 0.21.2). Here the scale is 1.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.adapters import low_rank, singular_values
from lora_export.adapters.low_rank import refuse_beyond_pairs
from lora_export.errors import InputRefused, listed
from lora_export.lora import Adapter, LoraPair
from lora_export.options.combining import EXACT, FACTORWISE, Combination
from lora_export.options.spelling import named
from lora_export.plan import Plan, Term
from lora_export.plan.build import checked_strengths

Factors = tuple[NDArray[np.float32], NDArray[np.float32]]  # A and B


@np.errstate(over="ignore", invalid="ignore")  # a pair refuses what is not finite
def combined_pair(
    combination: Combination, terms: Sequence[Term], numbers: Mapping[str, int], largest_rank: int
) -> LoraPair:
    """The pair, of scale 1, that takes the place of these terms.

    `numbers` are the positions of the adapters, `largest_rank` is that of all their pairs. Raises InputRefused,
    without the name of the weight, for terms that this method cannot combine.
    """
    kinds = {(term.pair.embedding, term.pair.shape) for term in terms}
    if len(kinds) > 1:
        raise InputRefused("the adapters were trained on layers of different kinds or shapes")
    if combination.is_exact:
        a, b = _exact_sum(terms)
    elif combination.method in FACTORWISE:
        a, b = _of_factors(combination, terms, numbers)
    else:
        a, b = _of_changes(combination, terms, numbers, combination.svd_rank or largest_rank)
    return LoraPair(a=a, b=b, scale=1.0, embedding=terms[0].pair.embedding)


def _of_factors(combination: Combination, terms: Sequence[Term], numbers: Mapping[str, int]) -> Factors:
    if others := [term for term in terms if type(term.pair) is not LoraPair]:
        kinds = ", ".join(f"{type(term.pair).__name__} ({term.adapter})" for term in others)
        raise InputRefused(
            f"{kinds}: {combination.method} combines A with A and B with B, and a change of this kind has none. "
            f"Use svd or {EXACT}, or another method with _svd"
        )
    if len({term.pair.rank for term in terms}) > 1:
        ranks = ", ".join(f"{term.pair.rank} ({term.adapter})" for term in terms)
        raise InputRefused(
            f"the pairs have different ranks: {ranks}. {combination.method} combines A with A, entry by entry. Use "
            f"svd or {EXACT}, or another method with _svd"
        )
    roots = [math.sqrt(abs(term.scale)) for term in terms]
    signed = np.array([math.copysign(root, term.scale) for root, term in zip(roots, terms, strict=True)])
    keys = [f"{combination.seed or 0}/{numbers[term.adapter]}/{term.module}" for term in terms]
    a = _combined(combination, [term.pair.a for term in terms], signed, [f"{key}/A" for key in keys])
    b = _combined(combination, [term.pair.b for term in terms], np.array(roots), [f"{key}/B" for key in keys])
    return a, b


def _of_changes(combination: Combination, terms: Sequence[Term], numbers: Mapping[str, int], rank: int) -> Factors:
    shape = terms[0].pair.shape
    if combination.method == "svd" and _are_low_rank(terms):  # their sum has a low rank: no whole change is needed
        a, b = _concatenated(terms)
        found = singular_values.of_product(b.reshape(shape[0], -1), _finite(a).reshape(len(a), -1))
    elif combination.method == "svd":
        found = singular_values.of_matrix(_finite(_whole_sum(terms)))
    else:
        strengths = np.array([term.strength for term in terms])
        keys = [f"{combination.seed or 0}/{numbers[term.adapter]}/{term.module}" for term in terms]
        change = _combined(combination, [low_rank.whole_change(term.pair) for term in terms], strengths, keys)
        found = singular_values.of_matrix(_finite(change))
    a, b = found.factors(min(rank, len(found.s)))
    kernel = [1] * (len(shape) - 2)
    return a.reshape(len(a), *shape[1:]), b.reshape(*b.shape, *kernel)


def _finite(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values themselves. Raises InputRefused where some are not finite: LAPACK finds no SVD of them."""
    if not np.isfinite(values).all():
        raise InputRefused("the change holds values that float32 cannot hold. Check the scales and weights")
    return values


def _combined(
    combination: Combination, arrays: TaskTensors, weights: NDArray[np.float64], keys: Sequence[str]
) -> NDArray[np.float32]:
    """Several arrays as one: entries removed, then summed or averaged over the elected sign.

    A key determines which random entries of its array are removed.
    """
    if combination.is_random:
        arrays = [random_entries(array, combination.density or 1, key) for array, key in zip(arrays, keys, strict=True)]
    elif combination.prunes:
        arrays = [largest_entries(array, combination.density or 1) for array in arrays]
    factors = weights.astype(np.float32)
    if "ties" in combination.method:
        return elected_mean(arrays, factors, combination.majority_sign or "total")
    return weighted_sum(arrays, factors)


def _exact_sum(terms: Sequence[Term]) -> Factors:
    """A and B of the sum: those of all terms, or where these are larger than the change, the change and an identity."""
    if _are_low_rank(terms):
        return _concatenated(terms)
    pair, change = terms[0].pair, _whole_sum(terms)
    out, columns = change.shape
    identity = np.eye(min(out, columns), dtype=np.float32)
    a, b = (change, identity) if out <= columns else (identity, change)
    return a.reshape(-1, *pair.shape[1:]), b.reshape(out, -1, *[1] * (len(pair.shape) - 2))


def _are_low_rank(terms: Sequence[Term]) -> bool:
    """Whether the factors of all terms together are no larger than the change, or are those of the files."""
    rank = sum(term.pair.rank for term in terms)
    return all(type(term.pair) is LoraPair for term in terms) or rank <= min(low_rank.matrix_shape(terms[0].pair))


def _whole_sum(terms: Sequence[Term]) -> NDArray[np.float32]:
    total = low_rank.whole_change(terms[0].pair, terms[0].strength)
    for term in terms[1:]:
        total += low_rank.whole_change(term.pair, term.strength)
    return total


def _concatenated(terms: Sequence[Term]) -> Factors:
    """A and B of all terms along the rank, with weight and scale in A."""
    scaled = [term.pair.a * np.float32(term.strength) * np.float32(term.pair.scale) for term in terms]
    return np.concatenate(scaled), np.concatenate([term.pair.b for term in terms], axis=1)


TaskTensors = Sequence[NDArray[np.float32]]


def weighted_sum(arrays: TaskTensors, weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Σ weight · array."""
    total: NDArray[np.float32] = np.sum(_weighted(arrays, weights), axis=0)
    return total


def elected_mean(arrays: TaskTensors, weights: NDArray[np.float32], majority_sign: str) -> NDArray[np.float32]:
    """For each entry, the mean of those weighted values whose sign is the elected one.

    "total" elects the sign of the sum, "frequency" that of most values; both without the weights, as PEFT does. A
    value of zero agrees with no sign.
    """
    stacked = np.stack(arrays)
    signs = np.sign(stacked)
    votes = (stacked if majority_sign == "total" else signs).sum(axis=0)
    agree = signs == np.where(votes >= 0, np.float32(1), np.float32(-1))
    total: NDArray[np.float32] = np.sum(_weighted(arrays, weights) * agree, axis=0)
    mean: NDArray[np.float32] = total / np.maximum(agree.sum(axis=0), 1).astype(np.float32)
    return mean


def _weighted(arrays: TaskTensors, weights: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.stack(arrays) * weights.reshape(-1, *[1] * arrays[0].ndim)


def largest_entries(array: NDArray[np.float32], density: float) -> NDArray[np.float32]:
    """The array with all entries zero but the largest: `int(density * size)` of them. 1.0 keeps all.

    Of entries with one magnitude, the first ones are taken.
    """
    if density >= 1:
        return array
    count = int(density * array.size)
    flat = np.abs(array).reshape(-1)
    kept = np.zeros(array.size, np.bool_)
    if count:
        limit = np.partition(flat, array.size - count)[array.size - count]
        kept = flat > limit
        kept[np.flatnonzero(flat == limit)[: count - np.count_nonzero(kept)]] = True
    return array * kept.reshape(array.shape)


def random_entries(array: NDArray[np.float32], density: float, key: str) -> NDArray[np.float32]:
    """The array with random entries zero; the others are divided by `density`. 1.0 keeps all, unchanged.

    `key` determines which entries are kept: the same ones on every machine (see `kept_at_random`).
    """
    if density >= 1:
        return array
    return array * kept_at_random(array.shape, density, key) / np.float32(density)


def kept_at_random(shape: tuple[int, ...], density: float, key: str) -> NDArray[np.bool_]:
    """A mask in which each entry is true with the probability `density`.

    NumPy promises that a bit generator gives the same raw numbers in every version; it promises no such thing for
    distributions.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest(), "little")
    raw = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    return np.reshape(raw < np.uint64(int(density * 2.0**64)), shape)


@dataclass(frozen=True, eq=False)
class CombinedTerm(Term):
    """The pair that takes the place of several. Its adapter is the first of them."""

    text: str = ""

    def __str__(self) -> str:
        return self.text


def combine_in_plan(plan: Plan, combination: Combination, together: Sequence[str] = ()) -> Plan:
    """The plan with one pair on each weight, combined from the pairs of all adapters. The exact sum is the plan itself.

    Where the plan is that of one model of a pipeline, `together` are the names of all adapters: one alone may change
    this model, and its pairs go through the method as those of a weight that one adapter changes.

    Raises InputRefused for adapters that change more than pairs can express, and for pairs that the method cannot
    combine, with the names of the weights.
    """
    if combination.is_exact:
        return plan
    refuse_beyond_pairs(_without(_tables(plan.adapters), plan.adapters), named("combine", combination.method))
    names = together or [adapter.name for adapter in plan.adapters]
    if len(names) < 2:
        raise InputRefused(f"{named('combine', combination.method)} combines several adapters, and there is one")
    terms = {step.weight: step.terms for step in plan.steps}
    combined = _combined_terms(terms, combination, plan.adapters, names)
    steps = tuple(dataclasses.replace(step, terms=(combined[step.weight],)) for step in plan.steps)
    note = f"the pairs of each weight are combined by {combination}, as PEFT does: not the exact sum"
    return dataclasses.replace(plan, steps=steps, notes=(*plan.notes, note))


def combine_adapters(
    adapters: Sequence[Adapter], strengths: Sequence[float], combination: Combination, name: str
) -> Adapter:
    """One adapter of several, called `name`: one pair of scale 1 for each module that any of them has.

    A table of embeddings that all save beside their pairs stays, where it is the same. Modules are the same where their
    names are. Raises InputRefused as `combine_in_plan`, for one that has no effect, and where an adapter is given
    twice.
    """
    strengths = checked_strengths(adapters, strengths)
    if len({adapter.flattened for adapter in adapters}) > 1:
        raise InputRefused("in the names of some of the adapters `_` stands for the dots, and in those of others not")
    tables = _tables(adapters)
    refuse_beyond_pairs(_without(tables, adapters), "a combined adapter")
    if len(adapters) < 2 and not combination.is_exact:
        raise InputRefused(f"{named('combine', combination.method)} combines several adapters, and there is one")
    terms: dict[str, tuple[Term, ...]] = {}
    for adapter, strength in zip(adapters, strengths, strict=True):
        for module, pair in adapter.pairs.items():
            terms[module] = (*terms.get(module, ()), Term(adapter.name, module, pair, strength))
    combined = _combined_terms(terms, combination, adapters, [adapter.name for adapter in adapters])
    metadata = [adapter.metadata for adapter in adapters]
    shared = {key: value for key, value in metadata[0].items() if all(other.get(key) == value for other in metadata)}
    kept = ("task_type", "base_model_name_or_path")
    is_known = all(adapter.targets for adapter in adapters)
    return Adapter(
        name=name,
        format="combined",
        pairs={module: term.pair for module, term in combined.items()},
        replaced=tables,
        layouts=_layouts(adapters),
        flattened=adapters[0].flattened,
        # The endings of all; none where those of one are not fully known.
        targets=tuple(sorted(_targets(adapters))) if is_known else (),
        spelling={module: adapter.spelled(module) for adapter in adapters[::-1] for module in adapter.pairs},
        metadata={key: shared[key] for key in kept if key in shared},
    )


def _targets(adapters: Iterable[Adapter]) -> Iterable[str]:
    """The endings of all. One of modules and one of parameters are two, where they have the same letters, too."""
    return {(type(target), target): target for adapter in adapters for target in adapter.targets}.values()


def combined_unless_exact(
    adapters: Sequence[Adapter], strengths: Sequence[float], combination: Combination
) -> tuple[list[Adapter], Sequence[float]]:
    """Adapters that have the same names for the same layers, combined into one, with its strengths.

    The exact sum needs no such adapter: they are returned as they are. Raises InputRefused as `combine_adapters`.
    """
    if combination.is_exact:
        return list(adapters), strengths
    name = "+".join(adapter.name for adapter in adapters)
    return [combine_adapters(adapters, strengths, combination, name)], ()


def _combined_terms(
    terms: Mapping[str, Sequence[Term]], combination: Combination, adapters: Sequence[Adapter], names: Sequence[str]
) -> dict[str, Term]:
    numbers = {name: number for number, name in enumerate(names)}
    by_name = {adapter.name: adapter for adapter in adapters}
    largest = max(term.pair.rank for own in terms.values() for term in own)
    combined: dict[str, Term] = {}
    problems = []
    for name, own in terms.items():
        # Random entries depend on the names in the files, not on those of the base.
        in_files = [dataclasses.replace(one, module=by_name[one.adapter].spelled(one.module)) for one in own]
        try:
            pair = combined_pair(combination, in_files, numbers, largest)
            text = f"B A (rank {pair.rank}), {combination.method} of {' and '.join(map(str, own))}"
            combined[name] = CombinedTerm(own[0].adapter, own[0].module, pair, text=text)
        except InputRefused as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise InputRefused(
            f"{len(problems)} of {len(terms)} weights cannot be combined by {combination.method}",
            listed(problems),
        )
    return combined


def _tables(adapters: Sequence[Adapter]) -> dict[str, NDArray[Any]]:
    """Weights that are saved beside their pairs, equal in all adapters with such a pair: PEFT repeats embeddings so."""
    tables: dict[str, NDArray[Any]] = {}
    for module in dict.fromkeys(module for adapter in adapters for module in adapter.pairs):
        name = f"{module}.weight"
        first, *others = (adapter.replaced.get(name) for adapter in adapters if module in adapter.pairs)
        if first is not None and all(other is not None and np.array_equal(other, first) for other in others):
            tables[name] = first
    return tables


def _without(tables: Collection[str], adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters without the tables of these names that stand beside their pairs."""

    def others(adapter: Adapter) -> dict[str, NDArray[Any]]:
        own = {name for name in tables if name.removesuffix(".weight") in adapter.pairs}
        return {name: value for name, value in adapter.replaced.items() if name not in own}

    return [dataclasses.replace(adapter, replaced=others(adapter)) for adapter in adapters]


def _layouts(adapters: Sequence[Adapter]) -> dict[str, str]:
    """How the weights are stored, where an adapter records it. Raises InputRefused where two contradict each other."""
    layouts: dict[str, str] = {}
    for adapter in adapters:
        for module, layout in adapter.layouts.items():
            if layouts.setdefault(module, layout) != layout:
                raise InputRefused(
                    f"{module}: {adapter.name} was trained on a weight that is stored as {layout}, another adapter on "
                    f"one that is stored as {layouts[module]}"
                )
    return layouts
