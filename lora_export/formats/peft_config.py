"""The config of a PEFT adapter: every field that changes the weights is supported, or refused by name."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import WRAPPERS, positive_number, unwrapped
from lora_export.formats.patterns import Patterns
from lora_export.lora import ModuleEndings, ParameterEnding

# `of_every_kind` and `of_lora` are fields that the readers use, or that do not affect the weights. Some belong to
# `init_lora_weights`, such as `loftq_config`: PEFT leaves them beside `true` in an adapter that it has converted.
# `refused_of_lora` change the merged weights. A true value is refused: a wrong merge is worse than none. `types` are
# those that PEFT writes: another one would be misread.
_TABLE = json.loads(Path(__file__).with_name("peft_config.json").read_text("utf-8"))
OF_EVERY_KIND = frozenset(_TABLE["of_every_kind"])
SUPPORTED = OF_EVERY_KIND | frozenset(_TABLE["of_lora"])
REFUSED_FIELDS: Mapping[str, str] = _TABLE["refused_of_lora"]
_TYPES: Mapping[str, type] = {kind.__name__: kind for kind in (bool, str, int, list, dict)}
FIELD_TYPES = {field: tuple(map(_TYPES.__getitem__, names)) for field, names in _TABLE["types"].items()}
MERGE_IN_PEFT = (
    "PEFT cannot convert such an adapter to plain LoRA: merge it there (merge_and_unload, which changes the base in "
    "the same way), and use the merged model"
)
CONVERT_IN_PEFT = (
    "Convert the adapter to plain LoRA first (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
)
# What PEFT's conversion refuses (patterns, with rsLoRA alone), or leaves out of the file: it keeps A and B.
LOST_IN_CONVERSION = ("use_dora", "modules_to_save", "trainable_token_indices")
SAFE_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # do not change the base weights
NAMES = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")  # lists of names, or None
NOT_OF_ALORA = (  # PEFT makes no such adapters, or what they mean depends on its version
    "use_dora", "lora_bias", "velora_config", "monteclora_config", "target_parameters", "ensure_weight_tying"
)  # fmt: skip
LARGEST_TOKEN, LONGEST_INVOCATION = 1 << 31, 512  # a graph has a matrix of the square of its length
BIASES = re.compile(r"none|all|\w{1,20}_only")
SMALLEST_SCALE, LARGEST_SCALE = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


class ConfigFields(NamedTuple):
    """The fields that the config of a kind of adapter may have."""

    supported: frozenset[str]
    numbers: tuple[str, ...] = ()  # there is no default: a missing alpha would silently become another scale
    patterns: tuple[str, ...] = ()  # tables of patterns of modules
    signed: frozenset[str] = frozenset()  # numbers and patterns that may be negative: PEFT subtracts the change then
    refused: Mapping[str, str] = {}  # field -> why a true value is refused


OF_LORA = ConfigFields(
    SUPPORTED,
    ("r", "lora_alpha"),
    ("rank_pattern", "alpha_pattern"),
    frozenset({"lora_alpha", "alpha_pattern"}),
    REFUSED_FIELDS,
)


def checked_config(config: dict[str, Any], source: str, fields: ConfigFields = OF_LORA) -> dict[str, Any]:
    """The fields of a config of PEFT, checked; the tables of patterns become `Patterns`.

    `source` is what contains them. Raises InputRefused with what is not supported.
    """
    config = {name: _with_integers(value) for name, value in config.items()}
    refused = _refused_fields(config, fields) + (_refused_of_lora(config) if fields is OF_LORA else [])
    if refused:
        raise InputRefused(f"{source}: " + "; ".join(refused))
    for name in fields.numbers:
        _refuse_other_number(source, name, config.get(name), is_signed=name in fields.signed)
    for name in fields.patterns:
        patterns = config.get(name) or {}
        for pattern, value in patterns.items():
            _refuse_other_number(source, f"{name}[{pattern!r}]", value, is_signed=name in fields.signed)
            if wrappers := [wrapper for wrapper in WRAPPERS if wrapper in pattern]:
                raise InputRefused(f"{source}: {name}[{pattern!r}] names {wrappers[0]}, which no module of a base has")
        config[name] = Patterns(patterns, source=f"{source}: {name}")
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        if isinstance(config.get(name), list):
            config[name] = [unwrapped(each) for each in config[name]]
    config["modules_to_save"] = ModuleEndings(config.get("modules_to_save") or ())  # of one string its letters, as PEFT
    return config


def _with_integers(value: Any) -> Any:
    """A value whose whole numbers are integers: JSON has one kind of numbers, and a rank of 4.0 is 4."""
    if isinstance(value, dict):
        return {key: _with_integers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_integers(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse_other_number(source: str, name: str, value: Any, *, is_signed: bool) -> None:
    """Raise InputRefused unless it is a positive number, or a negative one where it may be."""
    if not is_signed:
        positive_number(source, name, value, sys.float_info.max)
    elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) <= sys.float_info.max:
        raise InputRefused(f"{source}: {name} is {value!r}; it must be a number other than 0")


def _refused_of_lora(config: Mapping[str, Any]) -> list[str]:
    """What a config of LoRA has that is not supported, and why."""
    refused, init = [], config.get("init_lora_weights", True)
    if init not in SAFE_INITS:
        has_patterns = config.get("use_rslora") and (config.get("rank_pattern") or config.get("alpha_pattern"))
        loses = any(map(config.get, LOST_IN_CONVERSION)) or config.get("bias", "none") != "none"
        remedy = MERGE_IN_PEFT if init == "loftq" or has_patterns or loses else CONVERT_IN_PEFT
        refused.append(
            f"init_lora_weights is {init!r}, which changes the base weights: W + sBA on the original base is wrong. "
            f"{remedy}"
        )
    if config.get("use_dora") and config.get("lora_bias"):
        refused.append("use_dora and lora_bias: PEFT allows only one of them")
    return refused + _refused_of_alora(config)


def _refused_of_alora(config: Mapping[str, Any]) -> list[str]:
    """What an activated LoRA has that it cannot have, and why."""
    tokens = config.get("alora_invocation_tokens")
    if not tokens or not isinstance(tokens, list):
        return []
    refused = [f"alora_invocation_tokens and {field}: not supported" for field in NOT_OF_ALORA if config.get(field)]
    if len(tokens) > LONGEST_INVOCATION:
        refused.append(f"alora_invocation_tokens has {len(tokens):,} tokens; up to {LONGEST_INVOCATION} are supported")
    elif not all(type(token) is int and 0 <= token < LARGEST_TOKEN for token in tokens):
        refused.append(f"alora_invocation_tokens is {tokens!r}; it must have the ids of tokens")
    return refused


def _refused_fields(config: Mapping[str, Any], fields: ConfigFields) -> list[str]:
    """Every field that is not supported, and why."""
    refused = [f"{field}: {why}" for field, why in fields.refused.items() if config.get(field)]
    known = fields.supported | fields.refused.keys()
    unknown = [field for field, value in config.items() if value and field not in known]
    if unknown:
        refused.append(f"unknown fields: {', '.join(sorted(unknown))}")
    refused += [
        f"{field} is {config[field]!r}; its type must be {' or '.join(kind.__name__ for kind in types)}"
        for field, types in {**FIELD_TYPES, **dict.fromkeys(fields.patterns, (dict,))}.items()
        if config.get(field) is not None and not isinstance(config[field], types)
    ]
    lists = {field: config[field] for field in NAMES if isinstance(config.get(field), list)}
    refused += [
        f"{field} has {each!r}; it must have names"
        for field, names in lists.items()
        for each in names
        if not isinstance(each, str)
    ]
    if isinstance(bias := config.get("bias"), str) and not BIASES.fullmatch(bias):
        refused.append(f"bias is {bias!r}; it must be none, all or lora_only")
    return refused


def value_for_module(module: str, config: Mapping[str, Any], patterns: str, default: str) -> Any:
    """The value of the first pattern in the file that matches the module, as in PEFT; else the default."""
    return next(iter(config[patterns].values(module)), config[default])


def adapter_scale(rank: float, alpha: float, config: Mapping[str, Any]) -> float:
    """The factor of B A. Raises InputRefused where float32 cannot hold it: the change would be zero or infinite."""
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    if not SMALLEST_SCALE <= abs(scale) <= LARGEST_SCALE:
        raise InputRefused(
            f"lora_alpha {alpha:g} and rank {rank:g} make a scale of {scale:g}, which float32 cannot hold"
        )
    return scale


def is_declared(tensor: str, config: Mapping[str, Any]) -> bool:
    """Whether a config declares that this tensor is saved whole."""
    if tensor.rpartition(".")[2] == "bias" and config.get("bias", "none") != "none":
        return True
    saved: ModuleEndings | None = config.get("modules_to_save")
    return bool(saved and saved.module_around(tensor))


def targets_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The targeted names, if the config is a plain list: no pattern, no chosen layers, no excluded modules."""
    parameters = [
        target.removesuffix(".weight") if target.endswith(".weight") else ParameterEnding(target)
        for target in config.get("target_parameters") or ()
    ]
    targets = config.get("target_modules") or ([] if parameters else None)
    if config.get("layers_to_transform") is not None or config.get("exclude_modules") or not isinstance(targets, list):
        return ()
    return (*map(str, targets), *parameters)
