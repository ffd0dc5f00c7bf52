"""LoRA on experts: how trainers lay the pairs of many experts out in one A and one B, and these pairs by projection.

Flat (PEFT's `target_parameters`): A (experts * rank, in), B (out, experts * rank). The columns of B are ordered by rank
first (PEFT) or by expert first (Unsloth before 2026.9.6). Stacked (Megatron-Bridge): A (experts, rank, in),
B (experts, out, rank). Shared (SGLang, Miles, Tinker): as stacked, and the first size of A or of B may be 1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.lora import Adapter, ExpertAxes, LoraPair, split_part
from lora_export.names.families import ALTERNATING, PROJECTION_OF, column, is_turned
from lora_export.names.row_orders import two_blocks
from lora_export.options.spelling import named

# The order in which every class of transformers registers the stacked parameters of its experts. PEFT wraps a module
# once for each parameter, in this order, from inside to outside. The files do not record it.
REGISTRATION_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
EXPERTS = "experts"  # the name of a module that holds stacked parameters
SWAPPED_SINCE = (0, 19)  # PEFT takes the last axis of a stacked parameter as the inputs since then

# Unsloth patches these families, so that B is ordered by expert first. It did not always record that.
UNSLOTH_FAMILIES = frozenset(column("unsloth"))
FAMILY = re.compile(r"transformers\.models\.(\w+)")
UNSLOTH_LAYOUTS = "unsloth_fused_expert_lora"
B_LAYOUT = "lora_B_layout"
_MODULE = re.compile(r"(?P<owner>.+\.experts)\.(?P<number>\d+)\.(?P<last>[^.]+)")


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
    from packaging.version import InvalidVersion, Version  # few adapters have stacked parameters

    try:
        release = Version(str(config.get("peft_version", ""))).release[:2]
    except InvalidVersion:
        return ExpertAxes.UNKNOWN
    return ExpertAxes.BY_CLASS if release >= SWAPPED_SINCE else ExpertAxes.TRANSPOSED


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


# --- The pairs of an adapter by projection, whatever their layout ---


@dataclass
class ExpertStacks:
    """The pairs of an adapter: those of experts by module and projection, and the others."""

    plain: dict[str, LoraPair] = field(default_factory=dict)
    stacks: dict[tuple[str, str], dict[int, LoraPair]] = field(default_factory=dict)  # (module, gate|up|down) -> pairs
    names: dict[tuple[str, str], str] = field(default_factory=dict)  # the last part of its name in the adapter
    problems: list[str] = field(default_factory=list)

    def put(self, owner: str, last: str, number: int, pair: LoraPair) -> None:
        key = owner, PROJECTION_OF[last]
        self.stacks.setdefault(key, {})[number] = replace(pair, as_stored=False)
        self.names[key] = last

    def whole(self) -> Iterator[tuple[str, str, list[LoraPair]]]:
        """The module, projection and pairs of each stack. Those that are not alike become problems."""
        for (owner, kind), pairs in self.stacks.items():
            if are_alike(pairs):
                yield owner, kind, [pairs[number] for number in range(len(pairs))]
            else:
                self.problems.append(f"{owner}: experts of different shapes, ranks or scales, or without a pair")


def are_alike(pairs: Mapping[int, LoraPair]) -> bool:
    """Whether every expert has a pair, and all have one rank, scale and shape."""
    kinds = {(pair.rank, pair.scale, pair.shape) for pair in pairs.values()}
    return sorted(pairs) == list(range(len(pairs))) and len(kinds) == 1


def stacked_factors(pairs: Sequence[LoraPair]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A (experts, rank, in) and B (experts, out, rank)."""
    return np.stack([pair.a for pair in pairs]), np.stack([pair.b for pair in pairs])


def expert_stacks(adapter: Adapter, model_types: Collection[str]) -> ExpertStacks:
    """The pairs of an adapter, with those of experts as (out, in). `model_types` are those of the base's config.

    What is not known, and what is no projection of an expert, is in `problems`.
    """
    found = ExpertStacks()
    for name, pair in adapter.pairs.items():
        owner, index = split_part(name)
        match = _MODULE.fullmatch(name)
        if match is not None and match["last"] in PROJECTION_OF:
            found.put(match["owner"], match["last"], int(match["number"]), pair)
        elif index.isdecimal():
            axes = adapter.experts.get(owner, ExpertAxes.STORED)
            _put_part(found, name, pair, is_turned(axes, ExpertAxes.OUT_IN, model_types), model_types)
        elif index:
            found.problems.append(f"{name}: the pair of a part of a tensor")
        elif pair.as_stored:
            found.problems.append(f"{name}: the pair of a bare parameter")
        else:
            found.plain[name] = pair
    return found


def projections_of(adapter: Adapter) -> set[str]:
    """The stacks of an adapter that PEFT has as a layer for each expert, which no stacked parameter holds.

    down_proj beside gate_up_proj is a stacked parameter too. Beside gate_proj and up_proj it has a tensor for each.
    """
    return {
        name
        for name, axes in adapter.experts.items()
        if axes is ExpertAxes.OUT_IN and f"{name.rpartition('.')[0]}.gate_up_proj" not in adapter.experts
    }


def unknown_axes(name: str) -> str:
    """The problem of an expert whose axes nothing tells."""
    return f"{name}: how the base stores its experts is not known. State it: {named('base', 'CHECKPOINT')}"


def _put_part(
    found: ExpertStacks, name: str, pair: LoraPair, turned: bool | None, model_types: Collection[str]
) -> None:
    parameter, index = split_part(name)
    owner, _, last = parameter.rpartition(".")
    pair = pair.turned if turned else pair
    if turned is None:
        found.problems.append(unknown_axes(name))
    elif last in PROJECTION_OF:
        found.put(owner, last, int(index), pair)
    elif last != "gate_up_proj" or pair.b.shape[0] % 2:
        found.problems.append(f"{name}: no projection of an expert whose name is known")
    else:
        alternate = not ALTERNATING.isdisjoint(model_types)
        gate, up = np.split(pair.b[two_blocks(pair.b.shape[0])] if alternate else pair.b, 2)
        found.put(owner, "gate_proj", int(index), replace(pair, b=gate))
        found.put(owner, "up_proj", int(index), replace(pair, b=up))
