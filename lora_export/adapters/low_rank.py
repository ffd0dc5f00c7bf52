"""The best factors of lower rank for a product of two factors, without computing the product; and adapters of these.

With B = Q R and Aᵀ = P S (both reduced), B A = Q (R Sᵀ) Pᵀ, and R Sᵀ has only (rank, rank) entries. Its SVD gives that
of the product (Eckart and Young 1936: the first singular values and vectors are the best approximation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, WrongUsage, listed
from lora_export.lora import Adapter, LoraPair
from lora_export.options.spelling import named

LARGEST_CHANGE = 1 << 28  # of a change that is computed as a whole: 1 GiB in fp32


@dataclass(frozen=True, eq=False)
class SingularValues:
    """U (out, k), s (k,) in falling order and Vᵀ (k, in) of a product or a difference, in fp64.

    `energy` is ‖·‖² of the whole matrix, of which these values may be a part.
    """

    u: NDArray[np.float64]
    s: NDArray[np.float64]
    vt: NDArray[np.float64]
    energy: float

    def captured(self, rank: int) -> float:
        """The share of ‖·‖² that the first `rank` singular values hold, 0 to 1; 1 of a zero matrix."""
        return float(min(1.0, np.sum(self.s[:rank] ** 2) / self.energy)) if self.energy else 1.0

    def rank_for(self, energy: float) -> int | None:
        """The least rank, 1 or more, that captures this share; None where these values do not reach it."""
        shares = np.cumsum(self.s**2)
        # A share that is reached up to the rounding of the sum counts: 1.0 of values that are all there.
        reached = np.flatnonzero(shares >= energy * self.energy * (1 - 1e-12))
        return int(reached[0]) + 1 if reached.size else None

    def factors(self, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A (rank, in) and B (out, rank) with B A the best approximation of this rank, in fp32.

        The singular values are shared: A has their roots, and B too. So neither is much smaller than the other.
        """
        roots = np.sqrt(self.s[:rank])
        return (
            (roots[:, None] * self.vt[:rank]).astype(np.float32),
            (self.u[:, :rank] * roots).astype(np.float32),
        )


@dataclass(frozen=True)
class Truncation:
    """How many singular values are kept: a rank, or the fewest that hold a share of ‖ΔW‖², or that but at most a rank.

    Raises WrongUsage where neither is given.
    """

    rank: int | None = None
    energy: float | None = None  # above 0, at most 1

    def __post_init__(self) -> None:
        if self.rank is None and self.energy is None:
            raise WrongUsage(f"give {named('rank')}, or {named('energy')}: the share of each change that is kept")

    def rank_of(self, values: SingularValues) -> int:
        """The rank for a matrix of which all needed singular values are known."""
        least = None if self.energy is None else values.rank_for(self.energy)
        wanted = [len(values.s), *(rank for rank in (self.rank, least) if rank is not None)]
        return min(wanted)


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


def of_pair(pair: LoraPair) -> SingularValues:
    """The singular values and vectors of a pair's change: of its factors, or of the change where these are larger.

    The factors of LoHa, LoKr and whole changes may have a rank above that of any matrix of their shape. Raises
    InputRefused where the change has more than LARGEST_CHANGE.
    """
    out, columns = matrix_shape(pair)
    if type(pair) is LoraPair or pair.rank <= min(out, columns):
        return of_product(pair.b.reshape(out, -1), pair.a.reshape(-1, columns), pair.scale)
    return of_matrix(whole_change(pair))


def matrix_shape(pair: LoraPair) -> tuple[int, int]:
    """(out, all else) of the weight that a pair changes."""
    return pair.shape[0], math.prod(pair.shape[1:])


def whole_change(pair: LoraPair, strength: float = 1.0) -> NDArray[np.float32]:
    """strength * ΔW as a matrix (out, all else). Raises InputRefused where it has more than LARGEST_CHANGE."""
    out, columns = matrix_shape(pair)
    if out * columns > LARGEST_CHANGE:
        raise InputRefused(
            f"its change has the rank {pair.rank}, and is computed as a matrix of {out} x {columns} entries: more than "
            f"{LARGEST_CHANGE}, which no layer has"
        )
    return pair.delta(strength=strength).reshape(out, columns)


def of_product(b: NDArray[np.float32], a: NDArray[np.float32], scale: float = 1.0) -> SingularValues:
    """The singular values and vectors of `scale * B @ A`, (out, rank) by (rank, in), in fp64."""
    q, r = np.linalg.qr(b.astype(np.float64))
    p, s = np.linalg.qr(a.astype(np.float64).T)
    u, values, vt = np.linalg.svd(scale * (r @ s.T), full_matrices=False)
    return SingularValues(q @ u, values, vt @ p.T, float(np.sum(values**2)))


def of_matrix(matrix: NDArray[np.floating]) -> SingularValues:
    """The singular values and vectors of a whole matrix, by LAPACK in its own precision."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    s = values.astype(np.float64)
    return SingularValues(u, s, vt, float(np.sum(s**2)))


# --- An adapter of another rank ---


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
    return replace(adapter, pairs=pairs, sha256="", file_sha256=""), tuple(shares)


def _values(module: str, pair: LoraPair) -> SingularValues:
    try:
        found = of_pair(pair)
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


WHY = {  # what no pair of plain LoRA expresses
    "magnitude": "has DoRA's magnitude, which rescales the whole weight",
    "transforms": "has a change that follows from the weight",
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
        raise InputRefused(f"{what} can contain pairs of A and B alone. Nothing was written.", listed(problems))


def _beyond_pairs(adapter: Adapter, whole_ok: bool) -> Iterator[str]:
    for kind, names in adapter.beyond_pairs.items():
        if names and not (whole_ok and kind == "replaced"):
            first, *others = names
            yield f"{first}{f' (and {len(others)} more)' if others else ''} {WHY[kind]}"
    if not adapter.pairs:
        yield "it has no pair"
