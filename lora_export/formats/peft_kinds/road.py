"""RoAd in PEFT: pairs of outputs are rotated and scaled, the bias too (Liao et al. 2024).

In each group of outputs, the first half y and the second half z become α y cos θ - α z sin θ and α z cos θ + α y sin θ,
each output with an α and a θ: those of road_1 are equal in both halves, and road_4 has others for sine and cosine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.peft_kinds.kind import Kind, Stored
from lora_export.pairs.stages import Blocks, Stage
from lora_export.pairs.transforms import WeightTransform

_TITLE = "RoAd"
_LARGEST_GROUP = 4096  # outputs; PEFT's default is 64
_PER_OUTPUT = {"road_1": 0.5, "road_2": 1.0, "road_4": 2.0}


def _change(stored: Stored) -> WeightTransform:
    angles, lengths, config = stored.part("road_theta", 1), stored.part("road_alpha", 1), stored.config
    variant, group = config.get("variant", "road_1"), config["group_size"]
    is_known = isinstance(variant, str) and variant in _PER_OUTPUT
    if not is_known or type(group) is not int or group % 2 or group > _LARGEST_GROUP:
        raise InputRefused(f"the variant is {variant!r}, and group_size {group!r}: at most {_LARGEST_GROUP}, and even")
    outputs = int(angles.size / _PER_OUTPUT[variant])
    if angles.shape != lengths.shape or not outputs or outputs % group:
        raise InputRefused(
            f"road_theta {angles.shape} and road_alpha {lengths.shape} make no groups of {group} outputs"
        )
    tensors, settings = {"road_theta": angles, "road_alpha": lengths}, {"variant": variant, "group": group}
    bias = WeightTransform(_TITLE, tensors, _lower, (outputs,), settings=settings, rank=2)
    return WeightTransform(_TITLE, tensors, _lower, (outputs, 0), settings=settings, rank=2, bias=bias)


def _lower(transform: WeightTransform, _shape: tuple[int, int]) -> tuple[Stage, ...]:
    half = transform.settings["group"] // 2
    cosines, sines = _columns(transform)
    matrices = np.zeros((len(cosines), 2 * half, 2 * half))
    first, second = np.arange(half), np.arange(half, 2 * half)
    matrices[:, first, first], matrices[:, second, second] = cosines[:, :half] - 1, cosines[:, half:] - 1
    matrices[:, first, second], matrices[:, second, first] = -sines[:, :half], sines[:, half:]
    return (Blocks(less_identity=matrices.astype(np.float32)),)


def _columns(transform: WeightTransform) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """α cos θ and α sin θ of each output, (groups, group)."""
    group, variant = transform.settings["group"], transform.settings["variant"]
    angles, lengths = (transform.stored[name].astype(np.float64) for name in ("road_theta", "road_alpha"))
    if variant == "road_4":
        angles, lengths = angles.reshape(-1, 2, group), lengths.reshape(-1, 2, group)
        return lengths[:, 0] * np.cos(angles[:, 0]), lengths[:, 1] * np.sin(angles[:, 1])
    if variant == "road_1":
        angles, lengths = (np.tile(each.reshape(-1, group // 2), 2) for each in (angles, lengths))
    angles, lengths = angles.reshape(-1, group), lengths.reshape(-1, group)
    return lengths * np.cos(angles), lengths * np.sin(angles)


KIND = Kind(
    peft_type="ROAD",
    title=_TITLE,
    change=_change,
    parts=("road_theta", "road_alpha"),
    needed=("road_theta", "road_alpha"),
    fields=("variant", "init_weights"),
    numbers=("group_size",),
)
