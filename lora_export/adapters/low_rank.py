"""Adapters of a lower rank: the best factors of each change, and the share of it that they hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lora_export.adapters.singular_values import (
    BlockedMatrix,
    RowBlock,
    SingularValues,
    Truncation,
    of_kronecker,
    of_matrix,
    of_product,
)
from lora_export.errors import InputRefused, listed
from lora_export.lora import Adapter, LoraPair
from lora_export.options.spelling import named
from lora_export.pairs.structured import HadamardPair, KroneckerPair

LARGEST_CHANGE = 1 << 28  # of a change that is computed as a whole: 1 GiB in fp32
SMALL_CHANGE = 1 << 20  # entries of a change up to which LAPACK decomposes it; blocks of larger ones have as many
SMALLER = 4  # times as small as the change is the rank of factors that are decomposed in its place
ALL = Truncation(energy=1.0)


@dataclass(frozen=True)
class LayerShare:
    """What a pair of a lower rank holds of a change of one weight."""

    module: str
    shape: tuple[int, ...]  # of the weight, (out, in, ...)
    rank: int
    of_rank: int  # the rank of the change before, or the largest possible one
    share: float  # of ‖ΔW‖², 0 to 1
    norm: float  # ‖ΔW‖


def total_share(shares: Iterable[LayerShare]) -> float:
    """The share of all changes together, by their ‖ΔW‖²; 1 where nothing changes."""
    shares = list(shares)
    total = sum(layer.norm**2 for layer in shares)
    return sum(layer.share * layer.norm**2 for layer in shares) / total if total else 1.0


def of_pair(pair: LoraPair, truncation: Truncation = ALL) -> SingularValues:
    """The singular values and vectors of a pair's change: as many of the largest as a truncation needs, at least.

    Those of plain pairs, LoHa and LoKr come from their factors, exactly, where these are smaller than the change; those
    of small changes from LAPACK, in fp64; of all others from blocks of rows, in bounded memory. Raises InputRefused
    where such a change has more than LARGEST_CHANGE.
    """
    out, columns = matrix_shape(pair)
    if type(pair) is not LoraPair and truncation.rank is None:  # all singular vectors are as large as the change
        refuse_size(pair)
    if isinstance(pair, KroneckerPair) and pair.is_whole and max(pair.w1.size, pair.w2.size) <= SMALL_CHANGE:
        w2 = of_matrix(pair.w2.reshape(len(pair.w2), -1).astype(np.float64))
        return of_kronecker(of_matrix(pair.w1.astype(np.float64)), w2, pair.scale, truncation)
    if type(pair) is LoraPair or (isinstance(pair, HadamardPair) and SMALLER * pair.rank <= min(out, columns)):
        return of_product(pair.b.reshape(out, -1), pair.a.reshape(-1, columns), pair.scale)
    if out * columns <= SMALL_CHANGE:
        return of_matrix(whole_change(pair).astype(np.float64))
    refuse_size(pair)
    return ChangeByRows((out, columns), pair.delta).singular_values(truncation)


@dataclass(eq=False)
class ChangeByRows(BlockedMatrix):
    """A change of which `rows_of` computes some rows, (rows, in, ...). Here other kinds of changes plug in.

    One that follows from the weight W, as a rotation of it does, computes T(W) - W from the rows of W that it reads.
    Raises InputRefused where a value is not finite.
    """

    shape: tuple[int, int]
    rows_of: Callable[[slice], NDArray[np.float32]]

    def __post_init__(self) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            self.energy = sum(float(np.einsum("ij,ij->", b, b, dtype=np.float64)) for _, b in self.blocks())
        if not math.isfinite(self.energy):
            raise InputRefused("the change holds values that are not finite, or that float32 cannot hold")

    def blocks(self) -> Iterator[RowBlock]:
        step = max(1, SMALL_CHANGE // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            yield rows, self.rows_of(rows).reshape(rows.stop - rows.start, -1)


def matrix_shape(pair: LoraPair) -> tuple[int, int]:
    """(out, all else) of the weight that a pair changes."""
    return pair.shape[0], math.prod(pair.shape[1:])


def whole_change(pair: LoraPair, strength: float = 1.0) -> NDArray[np.float32]:
    """strength * ΔW as a matrix (out, all else). Raises InputRefused where it has more than LARGEST_CHANGE."""
    refuse_size(pair)
    return pair.delta(strength=strength).reshape(matrix_shape(pair))


def refuse_size(pair: LoraPair) -> None:
    """Raise InputRefused where the change of a pair has more than LARGEST_CHANGE entries."""
    out, columns = matrix_shape(pair)
    if out * columns > LARGEST_CHANGE:
        raise InputRefused(
            f"its change has the rank {pair.rank}, and is computed as a matrix of {out} x {columns} entries: more than "
            f"{LARGEST_CHANGE}, which no layer has"
        )


# --- An adapter of another rank ---


def resize_adapter(
    adapter: Adapter, truncation: Truncation, group: Callable[[str], str] = lambda module: module
) -> tuple[Adapter, tuple[LayerShare, ...]]:
    """The adapter with pairs of lower rank and scale 1, and what each of them holds of the change before.

    No rank grows. Modules of one `group` get one rank, the largest of theirs. Tensors that are saved whole stay.
    Raises InputRefused for what is no plain pair, and for a change that float32 cannot hold.
    """
    refuse_beyond_pairs([adapter], "a resized adapter", whole_ok=True)
    values = {module: values_of_change(module, pair, truncation) for module, pair in adapter.pairs.items()}
    ranks: dict[str, int] = {}
    for module, found in values.items():
        ranks[group(module)] = max(truncation.rank_of(found), ranks.get(group(module), 1))
    pairs, shares = {}, []
    for module, found in values.items():
        old, rank = adapter.pairs[module], ranks[group(module)]
        pairs[module] = pair_of(old, found, rank)
        share = found.captured(rank)
        shares.append(LayerShare(module, old.shape, rank, old.rank, share, math.sqrt(found.energy)))
    return replace(adapter, pairs=pairs, sha256="", file_sha256=""), tuple(shares)


def values_of_change(module: str, pair: LoraPair, truncation: Truncation) -> SingularValues:
    """The singular values of a module's pair. Raises InputRefused for a change that float32 cannot hold."""
    try:
        found = of_pair(pair, truncation)
    except InputRefused as error:
        raise InputRefused(f"{module}: {error}") from error
    if found.s[0] > np.finfo(np.float32).max:
        raise InputRefused(
            f"{module}: the change holds values that float32 cannot hold. Check its scale, {pair.scale:g}"
        )
    return found


def pair_of(old: LoraPair, found: SingularValues, rank: int) -> LoraPair:
    """The best pair of this rank in place of an old one, with the scale 1."""
    a, b = found.factors(rank)
    kernel = [1] * (len(old.shape) - 2)
    return LoraPair(a.reshape(-1, *old.shape[1:]), b.reshape(*b.shape, *kernel), 1.0, embedding=old.embedding)


WHY = {  # what no pair of plain LoRA expresses
    "magnitude": "has DoRA's magnitude, which rescales the whole weight",
    "transforms": "has a change that follows from the weight",
    "invocation_tokens": "acts on some tokens only (alora_invocation_tokens)",
    "as_stored": "is a bare parameter (target_parameters), which has no layer of LoRA",
    "replaced": "is saved whole",
    "biases": "has a bias of B",
    "added": "has a change of a vector, such as the weight of a norm",
    "token_rows": "has trained rows of tokens",
    "tied": "is tied to the input embeddings (ensure_weight_tying)",
}


def refuse_beyond_pairs(adapters: Sequence[Adapter], what: str, *, whole_ok: bool = False) -> None:
    """Raise InputRefused for what no pair of plain LoRA expresses. The message names all of it.

    `what` is the subject of the message. With `whole_ok`, tensors that are saved whole are allowed beside the pairs.
    """
    problems = [f"{adapter.name}: {problem}" for adapter in adapters for problem in _beyond_pairs(adapter, whole_ok)]
    if problems:
        raise InputRefused(f"{what} can contain pairs of A and B alone:", listed(problems))


def _beyond_pairs(adapter: Adapter, whole_ok: bool) -> Iterator[str]:
    for kind, names in adapter.beyond_pairs.items():
        if names and not (whole_ok and kind == "replaced"):
            first, *others = names
            yield f"{first}{f' (and {len(others)} more)' if others else ''} {WHY[kind]}"
    if not adapter.pairs:
        yield "it has no pair"


# --- Any adapter as one of plain LoRA: exactly where the rank is enough, else the best pair of that rank ---
#
# A LoHa (B1 A1) ∘ (B2 A2) is a product of Khatri-Rao factors, whose rank is that of both together (Hyeon-Woo et al.
# 2022, proposition 1). All others are decomposed: see `of_pair`. DoRA's magnitude stays where the change is
# exact: the length of W + ΔW is that of the exact change.

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
    # One pair for both. Tied tables may have trained rows in place of pairs.
    pairs |= {head: pairs[table].transposed for head, table in adapter.tied.items() if table in pairs}
    if problems:
        raise InputRefused(
            f"{adapter.name} as LoRA of rank {rank} would lose a part of {len(problems)} of {len(layers)} layers:",
            listed(problems, len(problems)),
            f"Give a larger {named('rank')}, or state the least share of ‖ΔW‖² that has to be kept of each layer by "
            f"{named('min_kept')}",
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
