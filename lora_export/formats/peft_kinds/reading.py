"""The files of an adapter of any kind but LoRA: keys, config, whole tensors, and the change of each module."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, refuse_unprintable
from lora_export.formats.adapter_files import (
    TensorSource,
    hash_of_unchanged,
    read_floats,
    refuse_problems,
    unwrapped,
)
from lora_export.formats.peft_config import checked_config, is_declared, targets_of, value_for_module
from lora_export.formats.peft_keys import ADAPTER_CONFIG, ROWS_KEY, WRAPPER, is_of_trainer, whole_name
from lora_export.formats.peft_kinds.kind import Kind, ModuleChange, Stored
from lora_export.formats.peft_records import layouts_of, metadata_of, notes_of_alphas, read_token_rows
from lora_export.lora import Adapter, LoraPair, TokenRows, is_weight_of

ROOT = "base_model."  # before the names of shared tensors
_ALPHAS = "alpha_pattern"
_INTEGERS = ("indices", "_size")  # in the names of what may have them


@functools.cache
def _rows() -> Mapping[str, Any]:
    return tomllib.loads(Path(__file__).with_name("kinds.toml").read_text(encoding="utf-8"))


@functools.cache
def kinds() -> Mapping[str, Kind]:
    """The kinds, by PEFT's names."""
    return {name: Kind(**row) for name, row in _rows()["kinds"].items()}


def read(folder: Path, name: str, config: dict[str, Any], file: TensorSource) -> Adapter:
    """Read an adapter of the kind that its config names. Raises InputRefused with everything that is wrong with it."""
    source, kind = str(folder / ADAPTER_CONFIG), _kind_of(config, folder / ADAPTER_CONFIG)
    config = checked_config(config, source, kind.config_fields)
    keys = _sorted_keys(file, kind, config)
    changes, problems = _changes(file, keys, kind, config)
    rows = read_token_rows(file, keys.rows, config)
    replaced = {tensor: file.read(key) for tensor, key in keys.whole.items()}
    for module, change in changes.items():
        replaced |= {f"{module}.{parameter}": value for parameter, value in change.replaced.items()}
        rows |= {} if change.rows is None else {f"{module}.weight": change.rows}
    rows = _without_repeated_rows(rows, config)
    problems += [
        f"{tensor} holds {bad} values that are not finite (NaN or infinity)"
        for tensor, value in replaced.items()
        if (bad := value.size - np.count_nonzero(np.isfinite(value.astype(np.float64))))
    ]
    problems += [kind.shared_alone] if keys.shared and not keys.parts else []
    refuse_problems(file, problems if file.entries else ["it contains no tensor"])
    pairs = {module: change.pair for module, change in changes.items() if change.pair is not None}
    return Adapter(
        name=name,
        format="peft",
        pairs=pairs,
        replaced=replaced,
        biases={module: np.asarray(each.bias, np.float32) for module, each in changes.items() if each.bias is not None},
        token_rows=rows,
        layouts=layouts_of(file, pairs, config),
        targets=targets_of(config) if pairs else (),
        saved_whole=config["modules_to_save"],
        spelling=keys.spelling,
        scale_source=f"{kind.title}, by {ADAPTER_CONFIG}",
        metadata=metadata_of(folder, config),
        notes=(
            *(notes_of_alphas({module: module for module in keys.parts}, config) if _ALPHAS in kind.patterns else ()),
            *(
                f"{tensor} is saved whole, and the config does not declare it: it replaces the base's tensor"
                for tensor in keys.whole
                if not is_declared(tensor, config)
            ),
        ),
        sha256=hash_of_unchanged(file, folder / ADAPTER_CONFIG),
    )


def _without_repeated_rows(rows: Mapping[str, TokenRows], config: Mapping[str, Any]) -> dict[str, TokenRows]:
    """The rows of each table once: of tied ones PEFT saves them under all names. The targeted name comes first."""
    targets = config.get("target_modules") or ()
    targeted = [targets] if isinstance(targets, str) else targets
    found: dict[str, TokenRows] = {}
    for tensor in sorted(rows, key=lambda tensor: not any(is_weight_of(tensor, target) for target in targeted)):
        own, module = rows[tensor], tensor.removesuffix(".weight")
        same = [name for name, each in found.items() if np.array_equal(own.values, each.values)]
        if same and np.array_equal(own.indices, found[same[0]].indices):
            found[same[0]] = replace(found[same[0]], tied=(*found[same[0]].tied, module))
        else:
            found[tensor] = own
    return found


def _kind_of(config: Mapping[str, Any], path: Path) -> Kind:
    peft_type = config.get("peft_type")
    if why := _rows()["not_saved"].get(str(peft_type)):
        raise InputRefused(
            f"{path}: peft_type is {peft_type!r}, which is not supported: {why}, and the file does not hold them. "
            "Merge it with PEFT (merge_and_unload), and use the merged model"
        )
    if why := _rows()["not_weights"].get(str(peft_type)):
        raise InputRefused(
            f"{path}: peft_type is {peft_type!r}, which cannot be merged into weights: {why}. Run it with PEFT "
            "(PeftModel.from_pretrained)"
        )
    if not isinstance(peft_type, str) or peft_type not in kinds():
        known = ", ".join(["LORA", *sorted(kinds())])
        raise InputRefused(
            f"{path}: peft_type is {peft_type!r}, which is not supported; supported are {known}. Merge it with "
            "PEFT (merge_and_unload), and use the merged model"
        )
    return kinds()[peft_type]


# --- Keys ---


@dataclass
class _Keys:
    """The keys of a file, by what they name."""

    parts: dict[str, dict[str, str]] = field(default_factory=dict)  # module -> part -> key
    shared: dict[str, str] = field(default_factory=dict)  # name -> key
    whole: dict[str, str] = field(default_factory=dict)  # tensor -> key
    rows: dict[str, str] = field(default_factory=dict)  # tensor -> key

    @property
    def spelling(self) -> dict[str, str]:
        return {**self.whole, **self.rows, **{module: next(iter(own.values())) for module, own in self.parts.items()}}


def _sorted_keys(file: TensorSource, kind: Kind, config: Mapping[str, Any]) -> _Keys:
    refuse_unprintable(file.entries, f"the header of {file.path}")
    keys, unknown, duplicates = _Keys(), [], []
    endings = sorted((f".{part}" for part in kind.parts), key=len, reverse=True)
    own_parts = {step for part in (*kind.parts, *kind.shared) for step in part.split(".")[:1]}
    for key in file.entries:
        name = unwrapped(key)
        shared, name = name.removeprefix(ROOT), name.removeprefix(WRAPPER)
        ending = next((each for each in endings if name.endswith(each) and len(name) > len(each)), "")
        if is_of_trainer(name, config):
            continue
        if shared.partition(".")[0] in kind.shared:
            table, owner = keys.shared, shared
        elif ending:
            table, owner = keys.parts.setdefault(name.removesuffix(ending), {}), ending[1:]
        elif rows := ROWS_KEY.fullmatch(name):
            table, owner = keys.rows, f"{rows['module']}.weight"
        else:
            table, owner = keys.whole, whole_name(name)
            if own_parts & set(owner.split(".")) and not is_declared(owner, config):
                unknown.append(key)
                continue
        if owner in table and not (table is keys.whole and np.array_equal(file.read(key), file.read(table[owner]))):
            duplicates.append(f"{table[owner]} and {key}")
        table[owner] = key
    if unknown:
        raise InputRefused(f"{file.path}: unknown kinds of tensors for {kind.title}: {', '.join(sorted(unknown))}")
    if duplicates:
        raise InputRefused(f"{file.path} contains one tensor under two names: {'; '.join(duplicates)}")
    return keys


# --- Changes ---


def _changes(
    file: TensorSource, keys: _Keys, kind: Kind, config: Mapping[str, Any]
) -> tuple[dict[str, ModuleChange], list[str]]:
    """The change of each module, and a line for everything that is wrong."""
    shared = {name: _read(file, name, key) for name, key in keys.shared.items()}
    changes, problems = {}, []
    for module, own in keys.parts.items():
        if missing := [part for part in (kind.parts if kind.needed is None else kind.needed) if part not in own]:
            problems.append(f"{module}: {' and '.join(missing)} missing")
            continue
        values = {default: value_for_module(module, config, each, default) for each, default in kind.patterns.items()}
        try:
            parts = {part: _read(file, part, key) for part, key in own.items()}
            change = kind.function(Stored(parts, {**config, **values}, shared, module, len(keys.parts), kind.title))
        except InputRefused as error:
            problems.append(f"{module}: {error}")
            continue
        changes[module] = ModuleChange(change) if isinstance(change, LoraPair) else change
    return changes, problems


def _read(file: TensorSource, name: str, key: str) -> NDArray[Any]:
    return file.read(key) if any(each in name for each in _INTEGERS) else read_floats(file, key)
