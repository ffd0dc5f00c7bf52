"""The keys of a PEFT adapter's tensors: their kinds, and the modules and parameters that they belong to."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, count, refuse_unprintable
from lora_export.formats.adapter_files import TensorSource, unwrapped
from lora_export.formats.expert_layouts import nested_parameters
from lora_export.formats.patterns import Patterns
from lora_export.formats.peft_config import is_declared
from lora_export.options.spelling import named

ADAPTER_CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
WRAPPER = "base_model.model."
SCALE_IN_B = {"lora_export": "scale in B"}  # in the header of a file with PEFT's keys and no config (see `openvino`)
# Kinds of keys in the file of weights
A, B, B_BIAS, WHOLE = "A.weight", "B.weight", "B.bias", "whole"
MAGNITUDE, EMBEDDING, ROWS, UNUSED = "magnitude", "embedding", "rows", "unused"
PARAMETER = "parameter"
Keys = Mapping[str, Mapping[str, str]]  # kind -> module or tensor -> key
LOW_RANK_KEY = re.compile(
    r"(?P<module>.+)\.lora_(?P<side>[AB]|magnitude_vector|embedding_[AB])"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<what>weight|bias))?"
)
SAVED_KEY = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)(?P<rest>\..+)")
ROWS_KEY = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?")
# What a trainer saves for itself: the field of the config that explains it -> its keys. A merge does not use them.
OF_THE_TRAINER = {
    "velora_config": re.compile(r".+\.lora_velora_embed(\.[^.]+)?"),
    "monteclora_config": re.compile(
        r".+\.lora_monteclora_sampler\.([^.]+\.)?(std_prior|expert_weights_prior|gaussian_var_prior|expert_weights)"
    ),
    "modules_to_save": re.compile(r".+\.original_module\..+"),  # the base's own tensors, as they were
}
INNER = ".base_layer"  # where PEFT puts a pair of a parameter, inside of the pair of another one of the same module
OUT_PROJ = ".base_layer.out_proj"  # where PEFT puts the output projection of nn.MultiheadAttention


def keys_by_kind(file: TensorSource, config: Mapping[str, Any], chosen: str = "") -> dict[str, dict[str, str]]:
    """Sort the file's keys by kind, and by the module or tensor that they belong to.

    Of several adapters in the file, the keys of the `chosen` one are sorted, and those without an adapter's name.
    An embedding's A and B are under A and B like others. Its A is also under EMBEDDING. Those of a bare parameter
    (`target_parameters`) are under the name of the parameter, which PARAMETER maps to its full name.
    """
    refuse_unprintable(file.entries, f"the header of {file.path}")
    bare = sorted(key for key in file.entries if not unwrapped(key).startswith(WRAPPER))
    if bare and len(bare) != len(file.entries):
        raise InputRefused(f"{file.path}: some keys start with `{WRAPPER}`, these do not: {', '.join(bare)}")
    kinds = (A, B, B_BIAS, MAGNITUDE, EMBEDDING, ROWS, WHOLE, UNUSED, PARAMETER)
    table: dict[str, dict[str, str]] = {kind: {} for kind in kinds}
    unknown, duplicates = [], []
    for key, name in _names_by_key(file, config, chosen).items():
        low_rank, rows = LOW_RANK_KEY.fullmatch(name), ROWS_KEY.fullmatch(name)
        if is_of_trainer(name, config):
            kind, owner = UNUSED, name
        elif rows:
            kind, owner = ROWS, f"{rows['module']}.weight"
        elif low_rank:
            kind, owner = _low_rank_kind(low_rank), low_rank["module"].replace(OUT_PROJ, ".out_proj")
        else:
            kind, owner = WHOLE, whole_name(name)
        if kind not in table or (kind == WHOLE and _is_unknown(owner, config)):
            unknown.append(key)
        elif owner in table[kind]:
            # PEFT saves a bias that `bias` and `modules_to_save` both name twice.
            if kind != WHOLE or not np.array_equal(file.read(key), file.read(table[kind][owner])):
                duplicates.append(f"{table[kind][owner]} and {key}")
        else:
            table[kind][owner] = key
            if low_rank and low_rank["side"] == "embedding_A":
                table[EMBEDDING][owner] = key
    if unknown:
        raise InputRefused(f"{file.path}: unknown kinds of tensors: {', '.join(sorted(unknown))}")
    if duplicates:
        raise InputRefused(
            f"{file.path} contains one tensor under two names, with different values: {'; '.join(duplicates)}"
        )
    _name_parameters(table, config, file.path)
    return table


def whole_name(name: str) -> str:
    """The name in the base of a whole tensor, without the modules that PEFT puts around its module."""
    for wrapper in (".token_adapter.base_layer.", ".base_layer.", ".modules_to_save."):
        name = name.replace(wrapper, ".")
    return name


def is_of_trainer(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is one that a trainer saves for itself, and that a merge does not use."""
    return any(config.get(field) and pattern.fullmatch(name) for field, pattern in OF_THE_TRAINER.items())


def _copies_of_outer_modules(saved: re.Match[str]) -> Iterator[str]:
    """The names that a saved tensor has in the copy of each module around it, where that is saved, too."""
    parts = saved["module"].split(".")
    for end in range(1, len(parts)):
        outer, inner = ".".join(parts[:end]), ".".join(parts[end:])
        yield f"{outer}.modules_to_save.{saved['adapter']}.{inner}{saved['rest']}"


def _names_by_key(file: TensorSource, config: Mapping[str, Any], chosen: str) -> dict[str, str]:
    """The names in the file by their keys, without those of other adapters than the `chosen` one.

    The state of a model names its adapters in every key, and has several. Raises InputRefused where none is chosen of
    these, or one that the file lacks.
    """
    names = {key: unwrapped(key).removeprefix(WRAPPER) for key in file.entries}
    owners: dict[str, str] = {}
    for key, name in names.items():
        match = ROWS_KEY.fullmatch(name) or LOW_RANK_KEY.fullmatch(name)
        if match and not is_of_trainer(name, config):
            owners[key] = match["adapter"] or ""
    adapters, present = set(owners.values()), set(names.values())
    for key, name in names.items():
        if (saved := SAVED_KEY.fullmatch(name)) and saved["adapter"] in adapters:
            owners[key], names[key] = saved["adapter"], saved["module"] + saved["rest"]
        elif saved and any(copy in present for copy in _copies_of_outer_modules(saved)):
            raise InputRefused(
                f"{file.path}: {saved['module']} is saved inside of another saved module, and PEFT keeps two copies of "
                "it. Train with a `modules_to_save` that names one of the two."
            )
    if adapters and (len(adapters) > 1 or chosen) and chosen not in adapters - {""}:
        shown = ", ".join(adapter or "one without a name" for adapter in sorted(adapters))
        choice = f"it has no {chosen}" if chosen else f"choose one: {named('stored_adapter', max(adapters))}"
        raise InputRefused(f"{file.path} contains {count(len(adapters), 'adapter')}: {shown}; {choice}")
    return {key: name for key, name in names.items() if len(adapters) < 2 or owners.get(key, chosen) == chosen}


def _name_parameters(table: dict[str, dict[str, str]], config: Mapping[str, Any], path: Path) -> None:
    """Name the pairs of bare parameters, of which the file names the module. Raises InputRefused where it is open."""
    targets = config.get("target_parameters") or ()
    is_named = _named_modules(config.get("target_modules"), path)
    for module in [name for name in table[A] if not name.endswith(INNER)] if targets else ():
        if is_named(module):
            continue  # PEFT refuses to adapt a module and one of its parameters
        own = _named_parameters(module, targets)
        nested = [module]  # from outside to inside
        while nested[-1] + INNER in table[A]:
            nested.append(nested[-1] + INNER)
        if not own and len(nested) == 1:
            continue
        # A target that names the module is there. One that is a bare name may be that of another module's parameter.
        stated = _named_parameters(module, [target for target in targets if "." in target])
        names = nested_parameters(module, own, len(nested)) or nested_parameters(module, stated, len(nested))
        if names is None:
            raise InputRefused(
                f"{path}: {len(own)} parameters of {module} are in target_parameters ({', '.join(sorted(own))}), "
                f"the file has {len(nested)} {'pair' if len(nested) == 1 else 'pairs'} for it, and does not record "
                "which pair is whose. Merge the adapter with PEFT (merge_and_unload)"
            )
        for wrapped, name in zip(nested, reversed(names), strict=True):
            pair = name.removesuffix(".weight")
            table[PARAMETER][pair] = name
            for kind in (A, B):
                if wrapped in table[kind]:
                    table[kind][pair] = table[kind].pop(wrapped)


def _named_modules(targets: Any, path: Path) -> Callable[[str], bool]:
    """Whether `target_modules` names a module: by the end of its name, or by a pattern of the whole."""
    if isinstance(targets, list):
        return lambda module: any(f".{module}".endswith(f".{target}") for target in targets)
    if isinstance(targets, str):
        with contextlib.suppress(InputRefused):  # a pattern that is not matched here tells nothing
            patterns = Patterns({targets: True}, source=f"{path}: target_modules", whole=True)
            return lambda module: bool(patterns.values(module))
    return lambda _: False


def _named_parameters(module: str, targets: Iterable[str]) -> list[str]:
    """The last parts of the names of the parameters that a module would have for these targets."""
    names = (
        target.rpartition(".")[2]
        for target in targets
        if f".{module}.{target.rpartition('.')[2]}".endswith(f".{target}")
    )
    return sorted(set(names))


def _is_unknown(tensor: str, config: Mapping[str, Any]) -> bool:
    """Whether a whole tensor has a name of LoRA's parameters, and is no part of a module that the config declares."""
    parts = tensor.split(".")
    of_lora = any(part.startswith("lora_") or part == "token_adapter" for part in parts)
    return of_lora and not is_declared(tensor, config)


def _low_rank_kind(match: re.Match[str]) -> str:
    """The kind of a key of LoRA's own. Empty where its parameter and its suffix do not belong together."""
    side, what = match["side"], match["what"]
    if side == "magnitude_vector":
        return MAGNITUDE if what != "bias" else ""
    if side.startswith("embedding_"):
        return f"{side[-1]}.weight" if what is None else ""
    return f"{side}.{what}"


def targeted_name(module: str, keys: Keys) -> str:
    """The name that PEFT matches with patterns: of an output projection its attention's, of a parameter its own."""
    if OUT_PROJ in keys[A][module]:
        return module.removesuffix(".out_proj")
    return keys[PARAMETER].get(module, module)


def magnitude_shape(b: NDArray[Any]) -> tuple[int, ...]:
    """The shape in which PEFT saves DoRA's magnitudes beside B (out, rank, 1...)."""
    return (b.shape[0],) if b.ndim == 2 else (1, b.shape[0], *b.shape[2:])
