"""LoRA on experts: how trainers lay the pairs of many experts out in one A and one B.

Flat (PEFT's `target_parameters`): A (experts * rank, in), B (out, experts * rank). The columns of B are ordered by rank
first (PEFT) or by expert first (Unsloth before 2026.9.6). Stacked (Megatron-Bridge): A (experts, rank, in),
B (experts, out, rank). Shared (SGLang, Miles, Tinker): as stacked, and the first size of A or of B may be 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray
from packaging.version import InvalidVersion, Version

from lora_export.errors import InputRefused
from lora_export.lora import ExpertAxes, LoraPair
from lora_export.names.families import column
from lora_export.options.spelling import named

# The order in which every class of transformers registers the stacked parameters of its experts. PEFT wraps a module
# once for each parameter, in this order, from inside to outside. The files do not record it.
REGISTRATION_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
EXPERTS = "experts"  # the name of a module that holds stacked parameters
SWAPPED_SINCE = Version("0.19")  # PEFT takes the last axis of a stacked parameter as the inputs since then

# Unsloth patches these families, so that B is ordered by expert first. It did not always record that.
UNSLOTH_FAMILIES = frozenset(column("unsloth"))
FAMILY = re.compile(r"transformers\.models\.(\w+)")
UNSLOTH_LAYOUTS = "unsloth_fused_expert_lora"
B_LAYOUT = "lora_B_layout"


class BLayout(StrEnum):
    """The order of the columns of a flat B."""

    RANK_MAJOR = "rank_major"  # column rank * experts + expert
    GROUPED_BY_EXPERT = "grouped_by_expert"  # column expert * rank + rank index


def is_flat(a: NDArray[Any], b: NDArray[Any], rank: int) -> bool:
    """Whether A and B hold the pairs of several experts, side by side."""
    return a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] != rank and a.shape[0] % rank == 0


def is_stacked(module: str, a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether A and B are (experts, rank, in) and (experts, out, rank), where one of the first sizes may be 1.

    Those of a convolution are (rank, in, kernel) and (out, rank, 1). No convolution is inside a module called experts.
    """
    if a.ndim != 3 or b.ndim != 3 or EXPERTS not in module.split("."):
        return False
    return a.shape[1] == b.shape[2] and (a.shape[0] == b.shape[0] or 1 in (a.shape[0], b.shape[0]))


def flat_pairs(a: NDArray[Any], b: NDArray[Any], rank: int, scale: float, layout: BLayout) -> list[LoraPair]:
    """The pair of each expert. A is (experts * rank, in), B is (out, experts * rank)."""
    count = a.shape[0] // rank
    of_a = a.reshape(count, rank, -1)
    if layout is BLayout.RANK_MAJOR:
        of_b = np.moveaxis(b.reshape(-1, rank, count), 2, 0)
    else:
        of_b = np.moveaxis(b.reshape(-1, count, rank), 1, 0)
    return stacked_pairs(of_a, of_b, scale)


def stacked_pairs(a: NDArray[Any], b: NDArray[Any], scale: float) -> list[LoraPair]:
    """The pair of each expert. A is (experts or 1, rank, in), B is (experts or 1, out, rank)."""
    count = max(a.shape[0], b.shape[0])
    return [
        LoraPair(a=a[expert % a.shape[0]], b=b[expert % b.shape[0]], scale=scale, as_stored=True)
        for expert in range(count)
    ]


def flat_axes(config: Mapping[str, Any]) -> ExpertAxes:
    """How flat pairs relate to the stacked parameter, by the version of PEFT that trained them."""
    try:
        release = Version(str(config.get("peft_version", ""))).release[:2]
    except InvalidVersion:
        return ExpertAxes.UNKNOWN
    return ExpertAxes.BY_CLASS if release >= SWAPPED_SINCE.release else ExpertAxes.TRANSPOSED


def b_layout(parameter: str, config: Mapping[str, Any], stated: str) -> BLayout:
    """The order of the columns of a parameter's B: stated by the user, or recorded in the config.

    Raises InputRefused where the config records an unknown order, contradicts `stated`, or leaves the order open.
    """
    recorded = _recorded_layout(parameter, config)
    if recorded is not None and recorded not in tuple(BLayout):
        raise InputRefused(f"{B_LAYOUT} is {recorded!r}; it must be {' or '.join(BLayout)}")
    if stated and recorded not in (None, stated):
        raise InputRefused(f"{named('moe_b_layout')} is {stated}, but adapter_config.json records {recorded}")
    if stated or recorded:
        return BLayout(stated or recorded)
    if _may_be_grouped(config):
        raise InputRefused(
            "Unsloth trained it, and adapter_config.json does not record the order of the columns of B. Unsloth before "
            f"2026.9.6 grouped them by expert. State the order by {named('moe_b_layout', 'grouped_by_expert')} or "
            f"{named('moe_b_layout', 'rank_major')}"
        )
    return BLayout.RANK_MAJOR


def _recorded_layout(parameter: str, config: Mapping[str, Any]) -> Any:
    table = config.get(UNSLOTH_LAYOUTS)
    table = table.get("parameters") if isinstance(table, Mapping) else None
    for name, fields in table.items() if isinstance(table, Mapping) else ():
        if f".{parameter}".endswith(f".{name}") and isinstance(fields, Mapping) and fields.get(B_LAYOUT) is not None:
            return fields[B_LAYOUT]
    return config.get(B_LAYOUT)


def _may_be_grouped(config: Mapping[str, Any]) -> bool:
    trained = config.get("auto_mapping")
    if not isinstance(trained, Mapping) or not trained.get("unsloth_fixed"):
        return False
    family = FAMILY.search(str(trained.get("parent_library", "")))
    return family is None or family[1] in UNSLOTH_FAMILIES


def nested_parameters(module: str, targeted: list[str], count: int) -> list[str] | None:
    """The parameters of a module whose pairs are nested in each other, from inside to outside.

    `targeted` are the last parts of the names that the config targets, `count` how many pairs the module has. None
    where the files do not determine which pair belongs to which parameter.
    """
    if len(targeted) != count or (count > 1 and not set(targeted) <= set(REGISTRATION_ORDER)):
        return None
    ordered = sorted(targeted, key=REGISTRATION_ORDER.index) if count > 1 else targeted
    return [f"{module}.{name}" for name in ordered]
