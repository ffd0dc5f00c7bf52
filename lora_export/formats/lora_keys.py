"""The keys of adapters that are one file of tensors: trainers spell the same parts of a pair in many ways.

The part of a key after the module's name states what the tensor is. All spellings are known to every format of this
kind; the formats differ in what comes before (see `kohya.py`, `comfyui.py`, `diffusers.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class KeyPart(StrEnum):
    """What a tensor is to the change of its module."""

    A = "A"
    B = "B"
    MID = "lora_mid"  # LoCon's core of a Tucker decomposition, between B and A
    ALPHA = "alpha"
    MAGNITUDE = "lora_magnitude_vector"  # DoRA's, as PEFT stores it
    DORA_SCALE = "dora_scale"  # DoRA's, as LyCORIS stores it
    B_BIAS = "bias of B"
    CHANGE = "diff"  # the whole change of a weight
    BIAS_CHANGE = "diff_b"  # the whole change of a bias
    NORM_CHANGE = "w_norm"
    NORM_BIAS_CHANGE = "b_norm"
    LOHA_W1_A = "hada_w1_a"
    LOHA_W1_B = "hada_w1_b"
    LOHA_W2_A = "hada_w2_a"
    LOHA_W2_B = "hada_w2_b"
    LOHA_T1 = "hada_t1"
    LOHA_T2 = "hada_t2"
    LOKR_W1 = "lokr_w1"
    LOKR_W1_A = "lokr_w1_a"
    LOKR_W1_B = "lokr_w1_b"
    LOKR_W2 = "lokr_w2"
    LOKR_W2_A = "lokr_w2_a"
    LOKR_W2_B = "lokr_w2_b"
    LOKR_T2 = "lokr_t2"


OWN_NAMES = [part for part in KeyPart if re.fullmatch(r"(hada|lokr)_\w+|diff(_b)?|[wb]_norm|lora_mid|dora_scale", part)]
ENDINGS = [
    (re.compile(r"\.(lora_down|lora\.down|lora_linear_layer\.down|lora_A(\.default)?)\.weight|\.lora_A"), KeyPart.A),
    (re.compile(r"\.(lora_up|lora\.up|lora_linear_layer\.up|lora_B(\.default)?)\.weight|\.lora_B"), KeyPart.B),
    (re.compile(r"\.lora_(B(\.default)?|up)\.bias"), KeyPart.B_BIAS),
    (re.compile(r"(\.lora|\.lora_linear_layer)?\.alpha"), KeyPart.ALPHA),
    (re.compile(r"\.lora_magnitude_vector(\.default)?(\.weight)?"), KeyPart.MAGNITUDE),
    *((re.compile(rf"\.{re.escape(part)}(\.weight)?"), part) for part in OWN_NAMES),
]
# diffusers' oldest form: the pairs belong to the processor of an attention, not to its layers.
PROCESSOR_ENDING = re.compile(
    r"(\.processor)?\.(?P<layer>to_\w+?)_lora\.(?:(?P<side>down|up)\.weight|(?P<alpha>alpha))"
)
MOST_DOTS = 5  # in an ending; a hostile key may have a million
PARTS_OF_SIDES = {"down": KeyPart.A, "up": KeyPart.B, None: KeyPart.ALPHA}


def split_key(key: str) -> tuple[str, KeyPart] | None:
    """The module and the part that a key names; None for a key of another kind."""
    dots = [match.start() for match in re.finditer(r"\.", key)]
    for start in dots[-MOST_DOTS:]:
        ending = key[start:]
        for pattern, part in ENDINGS:
            if start and pattern.fullmatch(ending):
                return key[:start], part
        if found := PROCESSOR_ENDING.fullmatch(ending):
            layer = "to_out.0" if found["layer"] == "to_out" else found["layer"]
            return f"{key[:start]}.{layer}", PARTS_OF_SIDES[found["side"]]
    return None


@dataclass(frozen=True, eq=False)
class SortedKeys:
    """The keys of a file by the module that they belong to."""

    modules: Mapping[str, Mapping[KeyPart, str]] = field(default_factory=dict)  # module -> part -> key
    unknown: tuple[str, ...] = ()  # keys that name no module or no part
    duplicates: tuple[str, ...] = ()  # "key and key": two of one part of one module


def sort_keys(keys: Iterable[str], module_of: Callable[[str], str | None]) -> SortedKeys:
    """Sort keys by module. `module_of` is the module for what a key has before its ending; None where it is unknown."""
    modules: dict[str, dict[KeyPart, str]] = {}
    unknown, duplicates = [], []
    for key in keys:
        found = split_key(key)
        module = None if found is None else module_of(found[0])
        if found is None or module is None:
            unknown.append(key)
            continue
        parts = modules.setdefault(module, {})
        if found[1] in parts:
            duplicates.append(f"{parts[found[1]]} and {key}")
        parts.setdefault(found[1], key)
    return SortedKeys(modules, tuple(unknown), tuple(duplicates))


def has_pairs(keys: Iterable[str]) -> bool:
    """Whether one of the keys is a part of a change that an adapter stores. `alpha` alone is none."""
    return any(found is not None and found[1] is not KeyPart.ALPHA for found in map(split_key, keys))
