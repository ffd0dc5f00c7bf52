"""How families of models name and store the projections of their experts, and which axes a pair of one has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lora_export.lora import ExpertAxes
from lora_export.names.families import column

_STORED = column("experts")
# Model types of transformers whose class of experts sets `is_transposed`, and further ones that store (in, out) too.
# `tests/names/test_experts.py` derives both again from the installed transformers.
TRANSPOSED_CLASSES = frozenset(kind for kind, entry in _STORED.items() if entry.get("is_transposed"))
STORED_IN_OUT = frozenset(kind for kind, entry in _STORED.items() if entry["stored"] == "in_out")
ALTERNATING = frozenset(kind for kind, entry in _STORED.items() if entry.get("gate_up") == "alternating")
# The names of one projection: Mixtral's (SGLang's too), and those of most others.
PROJECTIONS = {"gate": ("w1", "gate_proj"), "up": ("w3", "up_proj"), "down": ("w2", "down_proj")}
PROJECTION_OF = {name: projection for projection, names in PROJECTIONS.items() for name in names}


def is_turned(axes: ExpertAxes, wanted: ExpertAxes, model_types: Collection[str]) -> bool | None:
    """Whether the pair of an expert is transposed to have other axes. None where nothing tells.

    `model_types` are those of the base's config; none where it is unknown.
    """
    if axes is wanted:
        return False
    one, other = (_differs_from_stored(each, model_types) for each in (axes, wanted))
    return None if one is None or other is None else one is not other


def _differs_from_stored(axes: ExpertAxes, model_types: Collection[str]) -> bool | None:
    """Whether the product of a pair with these axes is the transpose of the stored expert."""
    if axes in (ExpertAxes.STORED, ExpertAxes.TRANSPOSED):
        return axes is ExpertAxes.TRANSPOSED
    known = {ExpertAxes.BY_CLASS: TRANSPOSED_CLASSES, ExpertAxes.OUT_IN: STORED_IN_OUT}.get(axes)
    return None if known is None or not model_types else not known.isdisjoint(model_types)


def model_types(config: Mapping[str, Any]) -> set[str]:
    """The model types of a config and of its parts."""
    found, parts = set(), [config]
    while parts:
        part = parts.pop()
        if isinstance(part.get("model_type"), str):
            found.add(part["model_type"])
        parts += [value for value in part.values() if isinstance(value, Mapping)]
    return found
