"""FRoD: a weight is written as U diag(l) Vᵀ with a V that layers of one name share, and gets U (S + diag(λ)) Vᵀ.

The file has V, the places of the few entries of S, and what was trained: these entries, and λ. The columns of U are
those of W V⁻ᵀ, divided by their lengths.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.pairs.stages import OfMatrix, Stage
from lora_export.pairs.transforms import WeightTransform

_TITLE = "FRoD"
_PARTS = ("frod_lambda_l", "frod_lambda_s_values")
_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")
LEAST_LENGTH = 1e-12  # shorter columns of U count as zero


def _change(stored: Stored) -> WeightTransform:
    shared = {name: stored.shared.get(f"{name}.{_category(stored.module)}") for name in _SHARED[:2]}
    v, places = shared.values()
    if v is None or places is None:
        raise InputRefused(
            "its projection is not saved, and PEFT computes it from the weights of all layers. Save the adapter with "
            "save_projection=True"
        )
    lengths, values = (np.asarray(stored.parts[name], np.float32) for name in _PARTS)
    if v.ndim != 2 or v.shape != (lengths.size,) * 2 or lengths.ndim != 1 or places.shape != (2, values.size):
        raise InputRefused(f"V {v.shape}, λ {lengths.shape}, S {values.shape} at places {places.shape} disagree")
    if places.dtype.kind not in "iu" or ((places < 0) | (places >= len(v))).any():
        raise InputRefused(f"frod_s_indices are no places in a matrix {v.shape}")
    if len(np.unique(places[0].astype(np.int64) * len(v) + places[1])) < values.size:
        raise InputRefused("two of its values have one place")
    tensors = {"v": v, "lengths": lengths, "values": values}
    settings = {"places": places.astype(np.int64)}
    return WeightTransform(_TITLE, tensors, _lower, (0, len(v)), settings=settings, rank=len(v))


def _category(module: str) -> str:
    """The name under which layers share V, as PEFT makes it."""
    *_, third, second, last = ["", "", *module.split(".")]
    if not second or second.isdigit():
        return last
    return "attention_output" if (third, second, last) == ("attention", "output", "dense") else f"{second}_{last}"


def _lower(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
    stored = {name: value.astype(np.float64) for name, value in transform.stored.items()}

    def change(weight: NDArray[Any]) -> NDArray[Any]:
        try:
            u = np.linalg.solve(stored["v"], weight.T.astype(np.float64)).T
        except np.linalg.LinAlgError:
            raise InputRefused("its V has no inverse") from None
        lengths = np.linalg.norm(u, axis=0)
        middle = np.diag(stored["lengths"])
        middle[tuple(transform.settings["places"])] += stored["values"]
        inverse = np.where(lengths > LEAST_LENGTH, 1 / np.maximum(lengths, LEAST_LENGTH), 0)
        return np.asarray((u * inverse) @ middle @ stored["v"].T - weight)

    return (OfMatrix(function=change, is_whole=True),)


KIND = Kind(
    peft_type="FROD",
    title=_TITLE,
    change=_change,
    parts=_PARTS,
    needed=_PARTS,
    shared=_SHARED,
    fields=(
        *("projection_prng_key", "sparse_rate", "regularization_alpha", "save_projection", "frod_dropout"),
        *("runtime_offload_base_weight", "progressbar", "fan_in_fan_out", "init_weights"),
    ),
)
