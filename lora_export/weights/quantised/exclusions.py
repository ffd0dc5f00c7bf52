"""How the config of a quantised model states that some of its layers are floats.

Each library has a list of its own. A list that a loader has by default is replaced by one in the config: the float
layers of the base are then listed, too. Source: transformers 5.24, compressed-tensors 0.20 and gptqmodel 7.7.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from lora_export.weights.quantised.new_grid import FINE_BITS

Stated = Mapping[str, Any]  # a quantization_config


# (what is stated, modules that are floats now, those that were floats before, those of 8 bits now) -> what it is then
class Exclude(Protocol):
    def __call__(
        self, stated: Stated, modules: Sequence[str], floats: Iterable[str], finer: Sequence[str] = (), /
    ) -> dict[str, Any]: ...


OUTPUT_EMBEDDINGS = "lm_head"  # of a tied model it is no tensor of the checkpoint


def excluded_by(*keys: str, replaces_default: bool = False) -> Exclude:
    """A list of modules under one of these keys, the first where the config has none."""

    def exclude(
        stated: Stated, modules: Sequence[str], floats: Iterable[str], _finer: Sequence[str] = ()
    ) -> dict[str, Any]:
        key = next((key for key in keys if stated.get(key)), keys[0])
        before = stated.get(key) or ([*floats, OUTPUT_EMBEDDINGS] if replaces_default else [])
        if not modules:
            return dict(stated)
        return {**stated, key: list(dict.fromkeys([*before, *modules]))}

    return exclude


def excluded_by_patterns(
    stated: Stated, modules: Sequence[str], _: Iterable[str], finer: Sequence[str] = ()
) -> dict[str, Any]:
    """gptqmodel's `dynamic`: patterns of names, of which the first that fits decides."""
    exclusions: dict[str, Any] = {f"-:^{re.escape(module)}$": {} for module in modules}
    exclusions |= {f"+:^{re.escape(module)}$": {"bits": FINE_BITS} for module in finer}
    return {**stated, "dynamic": exclusions | dict(stated.get("dynamic") or {})}


def excluded_of_compressed(
    stated: Stated, modules: Sequence[str], floats: Iterable[str], finer: Sequence[str] = ()
) -> dict[str, Any]:
    """`ignore`, and a group of 8 bits as the one group of fewer; the library prefers names to classes."""
    found, groups = excluded_by("ignore")(stated, modules, floats), dict(stated.get("config_groups") or {})
    own = [group for group in groups.values() if finer and 0 < _bits(group) < FINE_BITS]
    if len(own) == 1:
        weights = {**own[0]["weights"], "num_bits": FINE_BITS}
        name = next(name for number in itertools.count() if (name := f"group_{number}") not in groups)
        found["config_groups"] = groups | {name: {**own[0], "weights": weights, "targets": list(finer)}}
    return found


def _bits(group: Any) -> int:
    """How many bits the integers of a group have; 0 for other groups."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or weights.get("type", "int") != "int":
        return 0
    return int(weights.get("num_bits") or 0)


def excluded_of_modelopt(
    stated: Stated, modules: Sequence[str], floats: Iterable[str], _finer: Sequence[str] = ()
) -> dict[str, Any]:
    """`ignore` in config.json, `exclude_modules` in modelopt's own file, where it is a part of it."""
    own = stated.get("quantization")
    if isinstance(own, dict):
        return {**stated, "quantization": excluded_by("exclude_modules")(own, modules, floats)}
    return excluded_by("ignore", "exclude_modules")(stated, modules, floats)
