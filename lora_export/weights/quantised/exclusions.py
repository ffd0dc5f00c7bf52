"""How the config of a quantised model states that some of its layers are floats.

Each library has a list of its own. A list that a loader has by default is replaced by one in the config: the float
layers of the base are then listed, too. Source: transformers 5.24, compressed-tensors 0.20 and gptqmodel 7.7.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Stated = Mapping[str, Any]  # a quantization_config
# (what is stated, the modules that are floats now, the modules that were floats before) -> what is stated then
Exclude = Callable[[Stated, Sequence[str], Iterable[str]], dict[str, Any]]

OUTPUT_EMBEDDINGS = "lm_head"  # of a tied model it is no tensor of the checkpoint


def excluded_by(*keys: str, replaces_default: bool = False) -> Exclude:
    """A list of modules under one of these keys, the first where the config has none."""

    def exclude(stated: Stated, modules: Sequence[str], floats: Iterable[str]) -> dict[str, Any]:
        key = next((key for key in keys if stated.get(key)), keys[0])
        before = stated.get(key) or ([*floats, OUTPUT_EMBEDDINGS] if replaces_default else [])
        return {**stated, key: list(dict.fromkeys([*before, *modules]))}

    return exclude


def excluded_by_patterns(stated: Stated, modules: Sequence[str], _: Iterable[str]) -> dict[str, Any]:
    """gptqmodel's `dynamic`: patterns of names, of which the first that fits decides."""
    exclusions: dict[str, Any] = {f"-:^{re.escape(module)}$": {} for module in modules}
    return {**stated, "dynamic": exclusions | dict(stated.get("dynamic") or {})}


def excluded_of_modelopt(stated: Stated, modules: Sequence[str], floats: Iterable[str]) -> dict[str, Any]:
    """`ignore` in config.json, `exclude_modules` in modelopt's own file, where it is a part of it."""
    own = stated.get("quantization")
    if isinstance(own, dict):
        return {**stated, "quantization": excluded_by("exclude_modules")(own, modules, floats)}
    return excluded_by("ignore", "exclude_modules")(stated, modules, floats)
