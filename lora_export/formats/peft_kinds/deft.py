"""DEFT in PEFT: a subspace of the outputs is replaced, W' = W - Q Pᵀ W + s Q R (its PaRa form: without R).

Q and P are the same orthonormal basis (qr), or a matrix and its positive part (relu). Signs of the basis are those of
LAPACK's QR, which PyTorch and NumPy share.
"""

from __future__ import annotations

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.lora import LoraPair
from lora_export.pairs.stages import EntryWise, LowRank, Stage
from lora_export.pairs.transforms import WeightTransform

_TITLE = "DEFT"


def _change(stored: Stored) -> WeightTransform:
    parts, config = stored.parts, stored.config
    directions, method = stored.part("deft_P", 2), config.get("decomposition_method", "relu")
    injected = None if config.get("para") else parts.get("deft_R")
    alpha = config.get("alpha")
    if alpha is not None and (type(alpha) not in (int, float) or not 0 <= alpha < float("inf")):
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
    settings = {"method": method, "scale": alpha / rank if alpha else 1.0}
    tensors = {"deft_P": directions} | ({} if injected is None else {"deft_R": np.asarray(injected, np.float32)})
    whole = (len(directions), 0 if injected is None else injected.shape[1])
    return WeightTransform(_TITLE, tensors, _lower, whole, settings=settings, rank=rank)


def _lower(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
    directions, injected = transform.stored["deft_P"].astype(np.float64), transform.stored.get("deft_R")
    basis = np.linalg.qr(directions).Q if transform.settings["method"] == "qr" else directions
    right = basis if transform.settings["method"] == "qr" else np.maximum(basis, 0)
    removal = LowRank(u=(-basis).astype(np.float32), v=right.T.astype(np.float32))
    if injected is None:
        return (removal,)
    return removal, EntryWise(
        addend=LoraPair(a=injected, b=basis.astype(np.float32), scale=transform.settings["scale"])
    )


KIND = Kind(
    peft_type="DEFT",
    title=_TITLE,
    change=_change,
    parts=("deft_P", "deft_R"),
    needed=("deft_P",),
    fields=("decomposition_method", "init_scale", "alpha", "para", "fan_in_fan_out", "deft_dropout", "init_weights"),
    numbers=("r",),
)
