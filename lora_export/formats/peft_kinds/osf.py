"""OSF: the least singular parts of a weight are replaced, W' = Σ uᵢ σᵢ vᵢ of the largest + U S V (Nayak et al. 2025).

The file has U, S and V. The rest is the base's, and follows from all of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair
from lora_export.pairs.stages import EntryWise, OfMatrix, Stage
from lora_export.pairs.transforms import WeightTransform

_TITLE = "OSF"
_PARTS = tuple(f"osf_svd_params.{name}_low" for name in "USV")
LEAST_GAP = 1e-6  # between the squares of the two singular values at which the weight is split, of the largest


def _change(stored: Stored) -> WeightTransform:
    u, s, v = (stored.part(name, dimensions) for name, dimensions in zip(_PARTS, (2, 1, 2), strict=True))
    if not u.shape[1] == len(s) == len(v) <= min(len(u), v.shape[1]):
        raise InputRefused(f"U {u.shape}, S {s.shape} and V {v.shape} disagree")
    return WeightTransform(_TITLE, {"u": u, "s": s, "v": v}, _lower, (len(u), v.shape[1]), rank=len(s))


def _lower(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
    stored, rank = transform.stored, transform.rank
    pair = LoraPair(a=stored["v"], b=stored["u"] * stored["s"], scale=1.0)

    def without_least(weight: NDArray[Any]) -> NDArray[Any]:
        """- the parts of the `rank` least singular values: the projection on these, from the smaller Gram matrix."""
        wide = weight.astype(np.float64)
        is_tall = len(wide) > wide.shape[1]
        squares, vectors = np.linalg.eigh(wide.T @ wide if is_tall else wide @ wide.T)
        if rank < len(squares) and squares[rank] - squares[rank - 1] <= LEAST_GAP * squares[-1]:
            raise InputRefused(f"the singular values {rank} and {rank + 1} from below are equal: OSF cannot split them")
        least = vectors[:, :rank]
        return np.asarray(-(wide @ least) @ least.T if is_tall else -least @ (least.T @ wide))

    return OfMatrix(function=without_least, is_whole=True), EntryWise(addend=pair)


KIND = Kind(
    peft_type="OSF",
    title=_TITLE,
    change=_change,
    parts=_PARTS,
    needed=_PARTS,
    fields=("effective_rank", "rank_pattern", "target_svd_config", "init_weights"),
)
