"""The pairs of experts by projection, whatever the layout that the adapter has them in."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from lora_export.lora import Adapter, ExpertAxes, LoraPair, split_part
from lora_export.names.experts import ALTERNATING, PROJECTION_OF, is_turned
from lora_export.names.row_orders import two_blocks
from lora_export.options.spelling import named

_MODULE = re.compile(r"(?P<owner>.+\.experts)\.(?P<number>\d+)\.(?P<last>[^.]+)")


@dataclass
class ExpertStacks:
    """The pairs of an adapter: those of experts by module and projection, and the others."""

    plain: dict[str, LoraPair] = field(default_factory=dict)
    stacks: dict[tuple[str, str], dict[int, LoraPair]] = field(default_factory=dict)  # (module, gate|up|down) -> pairs
    names: dict[tuple[str, str], str] = field(default_factory=dict)  # the last part of its name in the adapter
    problems: list[str] = field(default_factory=list)

    def arrays(self, key: tuple[str, str]) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """A (experts, rank, in) and B (experts, out, rank) of a projection. None where its pairs make no stack."""
        pairs = self.stacks[key]
        if sorted(pairs) != list(range(len(pairs))) or len({(pair.shape, pair.rank) for pair in pairs.values()}) != 1:
            return None
        ordered = [pairs[number] for number in range(len(pairs))]
        return np.stack([pair.a for pair in ordered]), np.stack([pair.b for pair in ordered])


def expert_stacks(adapter: Adapter, model_types: Collection[str]) -> ExpertStacks:
    """The pairs of an adapter, with those of experts as (out, in). `model_types` are those of the base's config.

    What is not known, and what is no projection of an expert, is in `problems`.
    """
    found = ExpertStacks()
    for name, pair in adapter.pairs.items():
        owner, index = split_part(name)
        match = _MODULE.fullmatch(name)
        if match is not None and match["last"] in PROJECTION_OF:
            _put(found, match["owner"], match["last"], int(match["number"]), pair)
        elif index.isdecimal():
            axes = adapter.experts.get(owner, ExpertAxes.STORED)
            _put_part(found, name, owner, int(index), pair, axes, model_types)
        elif index:
            found.problems.append(f"{name}: the pair of a part of a tensor")
        elif pair.as_stored:
            found.problems.append(f"{name}: the pair of a bare parameter")
        else:
            found.plain[name] = pair
    return found


def _put(found: ExpertStacks, owner: str, last: str, number: int, pair: LoraPair) -> None:
    key = owner, PROJECTION_OF[last]
    found.stacks.setdefault(key, {})[number] = replace(pair, as_stored=False)
    found.names[key] = last


def _put_part(
    found: ExpertStacks,
    name: str,
    parameter: str,
    number: int,
    pair: LoraPair,
    axes: ExpertAxes,
    model_types: Collection[str],
) -> None:
    owner, _, last = parameter.rpartition(".")
    turned = is_turned(axes, ExpertAxes.OUT_IN, model_types)
    if turned is None:
        found.problems.append(
            f"{name}: how the base stores its experts is not known. State it: {named('base', 'CHECKPOINT')}"
        )
        return
    pair = pair.turned if turned else pair
    if last in PROJECTION_OF:
        _put(found, owner, last, number, pair)
    elif last != "gate_up_proj" or pair.b.shape[0] % 2:
        found.problems.append(f"{name}: no projection of an expert whose name is known")
    else:
        alternate = not ALTERNATING.isdisjoint(model_types)
        gate, up = np.split(pair.b[two_blocks(pair.b.shape[0])] if alternate else pair.b, 2)
        _put(found, owner, "gate_proj", number, replace(pair, b=gate))
        _put(found, owner, "up_proj", number, replace(pair, b=up))
