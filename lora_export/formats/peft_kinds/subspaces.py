"""PEFT's kinds that replace a part of a weight: a subspace, or some of its singular values."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.peft_config import adapter_scale
from lora_export.formats.peft_kinds.kind import Stored
from lora_export.lora import LoraPair
from lora_export.pairs.stages import EntryWise, LowRank, OfMatrix, Stage
from lora_export.pairs.transforms import WeightTransform


def deft(stored: Stored) -> WeightTransform:
    """DEFT in PEFT: a subspace of the outputs is replaced, W' = W - Q Pᵀ W + s Q R (its PaRa form: without R).

    Q and P are the same orthonormal basis (qr), or a matrix and its positive part (relu). Signs of the basis are those
    of LAPACK's QR, which PyTorch and NumPy share.
    """
    parts, config = stored.parts, stored.config
    directions, method = stored.part("deft_P", 2), config.get("decomposition_method", "relu")
    injected = None if config.get("para") else parts.get("deft_R")
    alpha = config.get("alpha")
    if alpha is not None and (type(alpha) not in (int, float) or not 0 <= alpha <= sys.float_info.max):
        raise InputRefused(f"alpha is {alpha!r}")
    if method not in ("relu", "qr") or bool(config.get("para")) is not ("deft_R" not in parts):
        raise InputRefused(
            f"decomposition_method is {method!r}, para {config.get('para')}, and it has {', '.join(parts)}"
        )
    if directions.shape[1] != min(config["r"], len(directions)):
        raise InputRefused(f"deft_P is {directions.shape}, and the config's r is {config['r']}")
    rank = directions.shape[1]
    if injected is not None and (injected.ndim != 2 or len(injected) != rank):
        raise InputRefused(f"deft_P {directions.shape} and deft_R {injected.shape} have different ranks")
    settings = {"method": method, "scale": adapter_scale(rank, alpha, {}) if alpha else 1.0}
    tensors = {"deft_P": directions} | ({} if injected is None else {"deft_R": np.asarray(injected, np.float32)})
    whole = (len(directions), 0 if injected is None else injected.shape[1])
    return WeightTransform(stored.title, tensors, _lower_deft, whole, settings=settings, rank=rank)


def _lower_deft(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
    directions, injected = transform.stored["deft_P"].astype(np.float64), transform.stored.get("deft_R")
    basis = np.linalg.qr(directions).Q if transform.settings["method"] == "qr" else directions
    right = basis if transform.settings["method"] == "qr" else np.maximum(basis, 0)
    removal = LowRank(u=(-basis).astype(np.float32), v=right.T.astype(np.float32))
    if injected is None:
        return (removal,)
    return removal, EntryWise(
        addend=LoraPair(a=injected, b=basis.astype(np.float32), scale=transform.settings["scale"])
    )


_PARTS = ("frod_lambda_l", "frod_lambda_s_values")
LEAST_LENGTH = 1e-12  # shorter columns of U count as zero


def frod(stored: Stored) -> WeightTransform:
    """FRoD: a weight is written as U diag(l) Vᵀ with a V that layers of one name share, and gets U (S + diag(λ)) Vᵀ.

    The file has V, the places of the few entries of S, and what was trained: these entries, and λ. The columns of U are
    those of W V⁻ᵀ, divided by their lengths.
    """
    shared = {name: stored.shared.get(f"{name}.{_category(stored.module)}") for name in ("frod_V", "frod_s_indices")}
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
    return WeightTransform(stored.title, tensors, _lower_frod, (0, len(v)), settings=settings, rank=len(v))


def _category(module: str) -> str:
    """The name under which layers share V, as PEFT makes it."""
    *_, third, second, last = ["", "", *module.split(".")]
    if not second or second.isdigit():
        return last
    return "attention_output" if (third, second, last) == ("attention", "output", "dense") else f"{second}_{last}"


def _lower_frod(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
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


_PARTS_OF_OSF = tuple(f"osf_svd_params.{name}_low" for name in "USV")
LEAST_GAP = 1e-6  # between the squares of the two singular values at which the weight is split, of the largest


def osf(stored: Stored) -> WeightTransform:
    """OSF: the least singular parts are replaced, W' = Σ uᵢ σᵢ vᵢ of the largest + U S V (Nayak et al. 2025).

    The file has U, S and V. The rest is the base's, and follows from all of it.
    """
    u, s, v = (stored.part(name, dimensions) for name, dimensions in zip(_PARTS_OF_OSF, (2, 1, 2), strict=True))
    if not u.shape[1] == len(s) == len(v) <= min(len(u), v.shape[1]):
        raise InputRefused(f"U {u.shape}, S {s.shape} and V {v.shape} disagree")
    return WeightTransform(stored.title, {"u": u, "s": s, "v": v}, _lower_osf, (len(u), v.shape[1]), rank=len(s))


def _lower_osf(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
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
