"""PEFT's LoRA adapters: `adapter_config.json` and `adapter_model.safetensors`.

Everything that is special about PEFT stays in this file. Alpha and rank become one scale per pair, and wrapper prefixes
are removed. Every field of the config that changes the weights is either supported or refused by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, listed, refuse_unprintable
from lora_export.formats import expert_layouts
from lora_export.formats.expert_layouts import B_LAYOUT, UNSLOTH_LAYOUTS, nested_parameters
from lora_export.formats.patterns import Patterns
from lora_export.formats.read_options import DEFAULTS, ReadOptions
from lora_export.lora import Adapter, ExpertAxes, LoraPair, TokenRows, expert_name, is_weight_of, split_part
from lora_export.storage import json_files, safetensors_file

DESCRIPTION = "a folder with adapter_config.json and adapter_model.safetensors"

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
WRAPPER = "base_model.model."
SHOWN_TENSORS = 3  # names that a note lists
LAYOUTS = "lora_export.layouts"  # in the header of WEIGHTS: module -> "out_in" or "in_out"; PEFT ignores it

# Fields that the reader uses, or that do not affect the weights.
SUPPORTED = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
        *("auto_mapping", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save"),
        *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "bias"),
        *(
            "qalora_group_size",
            "lora_bias",
            "use_rslora",
            "use_dora",
            "init_lora_weights",
            "eva_config",
            "megatron_core",
            "ensure_weight_tying",
            "trainable_token_indices",
            "target_parameters",
            "velora_config",
            "monteclora_config",
            # These belong to `init_lora_weights`. PEFT leaves them beside `true` in an adapter that it has converted.
            "loftq_config",
            "corda_config",
            "lora_ga_config",
            B_LAYOUT,
            UNSLOTH_LAYOUTS,
        ),
    }
)
MERGE_IN_PEFT = (
    "PEFT cannot convert such an adapter to plain LoRA: merge it there (merge_and_unload, which changes the base in "
    "the same way), and use the merged model"
)
CONVERT_IN_PEFT = (
    "Convert the adapter to plain LoRA first (PEFT's save_pretrained with path_initial_model_for_weight_conversion)"
)
# Fields that change the merged weights. A true value is refused: a wrong merge is worse than none.
REFUSED_FIELDS = {
    "use_qalora": "QA-LoRA is not supported",
    "use_bdlora": "BD-LoRA is not supported",
    "layer_replication": "replicated layers share one base weight; they cannot be merged into it",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only; it cannot be merged",
    "arrow_config": "Arrow routes between adapters at run time; it cannot be merged",
    "megatron_config": "Megatron layers are not supported",
    "kasa_config": f"KaSA changes the base weights. {MERGE_IN_PEFT}",
}
SAFE_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # do not change the base weights

# Fields of a model's config that describe a new head.
HEAD_FIELDS = ("architectures", "id2label", "label2id", "problem_type", "pad_token_id")
# The types that PEFT writes. Another type would be misread.
FIELD_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "inference_mode"), (bool,)),
    **dict.fromkeys(("task_type", "base_model_name_or_path", "peft_version", "bias"), (str,)),
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save"), (str, list)),
    "target_parameters": (list,),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (dict,)),
    "layers_to_transform": (int, list),
    "trainable_token_indices": (list, dict),
}
BIASES = (None, "none", "all", "lora_only")

SMALLEST_SCALE, LARGEST_SCALE = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))

# Kinds of keys in the file of weights
A, B, B_BIAS, WHOLE = "A.weight", "B.weight", "B.bias", "whole"
MAGNITUDE, EMBEDDING, ROWS, UNUSED = "magnitude", "embedding", "rows", "unused"
PARAMETER = "parameter"
LOW_RANK_KEY = re.compile(
    r"(?P<module>.+)\.lora_(?P<side>[AB]|magnitude_vector|embedding_[AB])"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<what>weight|bias))?"
)
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


def recognises(path: Path) -> bool:
    """Whether the folder contains PEFT's config. MLX's file of the same name has no `peft_type`."""
    try:
        return "peft_type" in json_files.read_json(path / ADAPTER_CONFIG)
    except InputRefused:
        return (path / ADAPTER_CONFIG).exists()  # it is damaged; `read` reports how


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read a PEFT adapter. Raises InputRefused with everything that is wrong with it."""
    config = _config(path / ADAPTER_CONFIG)
    if not (path / WEIGHTS).exists():
        if (path / PICKLE).exists():
            raise InputRefused(
                f"{path / PICKLE} is a pickle, which can run code when it is opened. Load it with PEFT where you trust "
                f"it and save it again with safe_serialization=True"
            )
        raise InputRefused(f"{path} has no {WEIGHTS}")
    file = safetensors_file.open_file(path / WEIGHTS)
    keys = _keys_by_kind(file, config)
    pairs, biases = _read_pairs(file, keys, config, options)
    rows = _read_token_rows(file, keys[ROWS], config)
    replaced = {tensor: file.read(key) for tensor, key in keys[WHOLE].items()}
    tied = _tied(pairs, replaced, config)
    sha256 = _sha256([path / ADAPTER_CONFIG, path / WEIGHTS])
    if not file.unchanged():
        raise InputRefused(f"{file.path} changed while it was being read")
    return Adapter(
        name=name,
        format="peft",
        pairs=pairs,
        replaced=replaced,
        biases=biases,
        token_rows=rows,
        layouts=_layouts(file, pairs, config),
        experts=_expert_axes(file, keys, config, pairs),
        tied=tied,
        targets=_targets(config),
        spelling={
            **{f"{module}.bias": key for module, key in keys[B_BIAS].items()},
            **keys[ROWS],
            **keys[WHOLE],
            **keys[B],
            **keys[A],
        },
        metadata=_metadata(path, config),
        notes=_notes(keys, config, tied),
        sha256=sha256,
    )


def write(adapter: Adapter, folder: Path, *, rank: int, alpha: float, targets: Iterable[str], **config: Any) -> None:
    """Write an adapter of one rank and scale as PEFT does. `config` holds further fields of its config.

    The caller stages `folder`. `alpha` is the value that the scale of the pairs was computed from. Raises ValueError
    for an adapter that such a file cannot hold: another rank or scale, DoRA on some layers only, biases, or token rows.
    """
    expected = (rank, _scale(rank, alpha, config))
    dora = {pair.magnitude is not None for pair in adapter.pairs.values()}
    if (
        adapter.biases
        or adapter.token_rows
        or len(dora) > 1
        or any((pair.rank, pair.scale) != expected for pair in adapter.pairs.values())
    ):
        raise ValueError(f"a PEFT adapter of rank {rank} and alpha {alpha} cannot hold everything in {adapter.name}")
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapter.replaced}) or None,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": True in dora,
        **config,
    }
    layouts = {LAYOUTS: json.dumps(dict(adapter.layouts), sort_keys=True)} if adapter.layouts else {}
    write_files(folder, pair_tensors(adapter) | {WRAPPER + k: v for k, v in adapter.replaced.items()}, fields, layouts)


def write_files(
    folder: Path, tensors: Mapping[str, NDArray[Any]], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Write the two files of a PEFT adapter. `metadata` is added to the header of the tensors' file."""
    safetensors_file.write(folder / WEIGHTS, dict(sorted(tensors.items())), {"format": "pt", **metadata})
    json_files.write_json(folder / ADAPTER_CONFIG, config, sort_keys=True)


def pair_tensors(adapter: Adapter) -> dict[str, NDArray[Any]]:
    """The pairs of an adapter as tensors, under PEFT's keys."""
    tensors: dict[str, NDArray[Any]] = {}
    for name, pair in adapter.pairs.items():
        module = name.removesuffix(".out_proj") + OUT_PROJ if OUT_PROJ in adapter.spelled(name) else name
        a, b = ("lora_embedding_A", "lora_embedding_B") if pair.embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{WRAPPER}{module}.{a}": pair.a, f"{WRAPPER}{module}.{b}": pair.b}
        if pair.magnitude is not None:
            key = f"{WRAPPER}{module}.lora_magnitude_vector"
            tensors[key] = pair.magnitude.reshape(_magnitude_shape(pair.b))
    return tensors


# --- the config ---------------------------------------------------------------------------------


def _config(path: Path) -> dict[str, Any]:
    """Read the config and refuse what is not supported. The tables of patterns become `Patterns`."""
    config = json_files.read_json(path)
    if config.get("peft_type") != "LORA":
        raise InputRefused(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is supported")
    if refused := _refused_fields(config):
        raise InputRefused(f"{path}: " + "; ".join(refused))
    for name in ("r", "lora_alpha"):
        _must_be_positive(path, name, config.get(name))
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        for pattern, value in patterns.items():
            _must_be_positive(path, f"{name}[{pattern!r}]", value)
        config[name] = Patterns(patterns, source=f"{path}: {name}")
    return config


def _refused_fields(config: Mapping[str, Any]) -> list[str]:
    """Every field that is not supported, and why."""
    refused = [f"{field}: {why}" for field, why in REFUSED_FIELDS.items() if config.get(field)]
    unknown = [
        field for field, value in config.items() if value and field not in SUPPORTED and field not in REFUSED_FIELDS
    ]
    if unknown:
        refused.append(f"unknown fields: {', '.join(sorted(unknown))}")
    init = config.get("init_lora_weights", True)
    if init not in SAFE_INITS:
        remedy = MERGE_IN_PEFT if init == "loftq" else CONVERT_IN_PEFT
        refused.append(
            f"init_lora_weights is {init!r}, which changes the base weights: W + sBA on the original base is wrong. "
            f"{remedy}"
        )
    if config.get("use_dora") and config.get("lora_bias"):
        refused.append("use_dora and lora_bias: PEFT allows only one of them")
    refused += [
        f"{field} is {config[field]!r}; its type must be {' or '.join(kind.__name__ for kind in types)}"
        for field, types in FIELD_TYPES.items()
        if config.get(field) is not None and not isinstance(config[field], types)
    ]
    if config.get("bias") not in BIASES:
        refused.append(f"bias is {config['bias']!r}; it must be none, all or lora_only")
    return refused


def _must_be_positive(path: Path, name: str, value: Any) -> None:
    # There is no default: a missing alpha would silently become another scale.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise InputRefused(f"{path}: {name} is {value!r}; it must be a positive number")


# --- the keys of the file of weights ------------------------------------------------------------


def _keys_by_kind(file: safetensors_file.TensorFile, config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Sort the file's keys by kind, and by the module or tensor that they belong to.

    An embedding's A and B are under A and B like others. Its A is also under EMBEDDING. Those of a bare parameter
    (`target_parameters`) are under the name of the parameter, which PARAMETER maps to its full name.
    """
    refuse_unprintable(file.entries, f"the header of {file.path}")
    _refuse_mixed_wrapping(file)
    kinds = (A, B, B_BIAS, MAGNITUDE, EMBEDDING, ROWS, WHOLE, UNUSED, PARAMETER)
    table: dict[str, dict[str, str]] = {kind: {} for kind in kinds}
    adapters: set[str] = set()
    unknown: list[str] = []
    duplicates: list[str] = []
    for key in file.entries:
        name = key.removeprefix(WRAPPER)
        low_rank, rows = LOW_RANK_KEY.fullmatch(name), ROWS_KEY.fullmatch(name)
        if any(config.get(field) and pattern.fullmatch(name) for field, pattern in OF_THE_TRAINER.items()):
            kind, owner = UNUSED, name
        elif rows:
            kind, owner = ROWS, f"{rows['module']}.weight"
        elif low_rank:
            kind, owner = _low_rank_kind(low_rank), low_rank["module"].replace(OUT_PROJ, ".out_proj")
        else:
            kind, owner = WHOLE, name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        adapters |= {match["adapter"] or "" for match in (rows or low_rank,) if match and kind != UNUSED}
        if kind not in table or (kind == WHOLE and _is_unknown(owner, config)):
            unknown.append(key)
        elif owner in table[kind]:
            if kind != WHOLE or not _are_equal(file, key, table[kind][owner]):
                duplicates.append(f"{table[kind][owner]} and {key}")
        else:
            table[kind][owner] = key
            if low_rank and low_rank["side"] == "embedding_A":
                table[EMBEDDING][owner] = key
    if len(adapters) > 1:
        names = ", ".join(adapter or "one without a name" for adapter in sorted(adapters))
        raise InputRefused(f"{file.path} contains several adapters: {names}")
    if unknown:
        raise InputRefused(f"{file.path}: unknown kinds of tensors: {', '.join(sorted(unknown))}")
    if duplicates:
        raise InputRefused(
            f"{file.path} contains one tensor under two names, with different values: {'; '.join(duplicates)}"
        )
    _name_parameters(table, config, file.path)
    return table


def _name_parameters(table: dict[str, dict[str, str]], config: Mapping[str, Any], path: Path) -> None:
    """Move the pairs of bare parameters from the name of their module to that of the parameter.

    The file names the module alone. Raises InputRefused where it does not tell which parameter of it is meant.
    """
    targets = config.get("target_parameters") or ()
    modules = config.get("target_modules")
    for module in [name for name in table[A] if not name.endswith(INNER)] if targets else ():
        if isinstance(modules, list) and any(f".{module}".endswith(f".{target}") for target in modules):
            continue  # PEFT refuses to adapt a module and one of its parameters
        owned = {target.rpartition(".")[2] for target in targets}
        named = [name for name in owned if any(f".{module}.{name}".endswith(f".{target}") for target in targets)]
        nested = [module]  # from outside to inside
        while nested[-1] + INNER in table[A]:
            nested.append(nested[-1] + INNER)
        if not named and len(nested) == 1:
            continue
        names = nested_parameters(module, named, len(nested))
        if names is None:
            raise InputRefused(
                f"{path}: {len(named)} parameters of {module} are in target_parameters ({', '.join(sorted(named))}), "
                f"the file has {len(nested)} {'pair' if len(nested) == 1 else 'pairs'} for it, and does not record "
                "which pair is whose. Merge the adapter with PEFT (merge_and_unload)"
            )
        for wrapped, name in zip(nested, reversed(names), strict=True):
            pair = name.removesuffix(".weight")
            table[PARAMETER][pair] = name
            for kind in (A, B):
                if wrapped in table[kind]:
                    table[kind][pair] = table[kind].pop(wrapped)


def _is_unknown(tensor: str, config: Mapping[str, Any]) -> bool:
    """Whether a whole tensor has a name of LoRA's parameters, and is no part of a module that the config declares."""
    parts = tensor.split(".")
    of_lora = any(part.startswith("lora_") or part == "token_adapter" for part in parts)
    return of_lora and not _declared(tensor, config)


def _are_equal(file: safetensors_file.TensorFile, one: str, other: str) -> bool:
    """PEFT saves a bias that `bias` and `modules_to_save` both name twice."""
    return np.array_equal(file.read(one), file.read(other))


def _refuse_mixed_wrapping(file: safetensors_file.TensorFile) -> None:
    bare = sorted(key for key in file.entries if not key.startswith(WRAPPER))
    if bare and len(bare) != len(file.entries):
        raise InputRefused(f"{file.path}: some keys start with `{WRAPPER}`, these do not: {', '.join(bare)}")


def _low_rank_kind(match: re.Match[str]) -> str:
    """The kind of a key of LoRA's own. Empty where its parameter and its suffix do not belong together."""
    side, what = match["side"], match["what"]
    if side == "magnitude_vector":
        return MAGNITUDE if what != "bias" else ""
    if side.startswith("embedding_"):
        return f"{side[-1]}.weight" if what is None else ""
    return f"{side}.{what}"


# --- its tensors --------------------------------------------------------------------------------


def _read_pairs(
    file: safetensors_file.TensorFile,
    keys: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any],
    options: ReadOptions,
) -> tuple[dict[str, LoraPair], dict[str, NDArray[np.float32]]]:
    """Return the pairs, and what is added to biases. Raises InputRefused with everything that is wrong with them."""
    problems = [f"{module}: lora_A without lora_B" for module in keys[A] if module not in keys[B]]
    problems += [f"{module}: lora_B without lora_A" for module in keys[B] if module not in keys[A]]
    problems += [f"{module}: a bias of lora_B without lora_B" for module in keys[B_BIAS] if module not in keys[B]]
    problems += [f"{module}: a magnitude without lora_A" for module in keys[MAGNITUDE] if module not in keys[A]]
    pairs: dict[str, LoraPair] = {}
    for module in keys[A]:
        if module in keys[B]:
            try:
                pairs |= _pairs_of(module, file, keys, config, options)
            except InputRefused as error:
                problems.append(f"{module}: {error}")
    for name, key in [*keys[B_BIAS].items(), *keys[WHOLE].items()]:
        tensor = file.read(key)
        bad = tensor.size - np.count_nonzero(np.isfinite(tensor.astype(np.float64)))
        if bad:
            what = f"{name}: the bias of B" if name in keys[B_BIAS] else f"{name}:"
            problems.append(f"{what} holds {bad} values that are not finite (NaN or infinity)")
    if not file.entries:
        problems.append("it contains no tensor")
    if problems:
        raise InputRefused(f"{file.path} is refused:", listed(sorted(problems), len(problems)))
    biases = {
        module: np.float32(pairs[module].scale) * file.read(key).astype(np.float32)
        for module, key in keys[B_BIAS].items()
    }
    return pairs, biases


def _read_token_rows(
    file: safetensors_file.TensorFile, keys: Mapping[str, str], config: Mapping[str, Any]
) -> dict[str, TokenRows]:
    """Return the rows of trained tokens, by tensor. Only the config records which rows they are.

    Raises InputRefused with everything that is wrong with them.
    """
    indices = config.get("trainable_token_indices") or {}
    by_tensor = _indices_by_tensor(indices, keys)
    without_rows = _names_without_rows(indices, keys)
    found, problems = {}, []
    if isinstance(indices, list) and len(keys) != 1:
        owners = ", ".join(keys) or "no module"
        problems.append(f"trainable_token_indices is a list, and the file contains rows for {owners}")
    # PEFT saves one table of rows for the modules of a tied model.
    tied = [name for name in without_rows if len(keys) == 1 and indices[name] in by_tensor.values()]
    if len(tied) < len(without_rows):
        names = ", ".join(indices)
        problems.append(f"trainable_token_indices names {names}, and the file contains rows for {', '.join(keys)}")
    for tensor, key in keys.items():
        own = by_tensor.get(tensor)
        if own is None:
            problems.append(f"{tensor}: the config does not record which rows these are")
        elif not isinstance(own, list) or not all(type(index) is int and abs(index) < 1 << 62 for index in own):
            problems.append(f"{tensor}: its trainable_token_indices are not a list of integers")
        else:
            try:
                found[tensor] = TokenRows(np.array(own, np.int64), file.read(key), tuple(tied))
            except InputRefused as error:
                problems.append(f"{tensor}: {error}")
    if problems:
        raise InputRefused(f"{file.path} is refused:", listed(sorted(problems), len(problems)))
    return found


def _indices_by_tensor(indices: Any, tensors: Iterable[str]) -> dict[str, Any]:
    """A list is for the input embeddings, whatever their name in the model. A table names its modules."""
    if isinstance(indices, list):
        return dict.fromkeys(tensors, indices)
    return {tensor: own for name, own in indices.items() for tensor in tensors if is_weight_of(tensor, name)}


def _names_without_rows(indices: Any, tensors: Iterable[str]) -> list[str]:
    """The modules that a table names, and for which the file contains no rows."""
    names = indices if isinstance(indices, dict) else {}
    return [name for name in names if not any(is_weight_of(tensor, name) for tensor in tensors)]


def _of_module(module: str, config: Mapping[str, Any], patterns: str, default: str) -> Any:
    """The value of the first pattern in the file that matches the module, as in PEFT; else the default."""
    return next(iter(config[patterns].values(module)), config[default])


def _targeted(module: str, keys: Mapping[str, Mapping[str, str]]) -> str:
    """The name that PEFT matches patterns with.

    For an attention's output projection, it is the attention's; for a bare parameter, it is the parameter's.
    """
    if OUT_PROJ in keys[A][module]:
        return module.removesuffix(".out_proj")
    return keys[PARAMETER].get(module, module)


def _pairs_of(
    module: str,
    file: safetensors_file.TensorFile,
    keys: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any],
    options: ReadOptions,
) -> dict[str, LoraPair]:
    """The pair of a module; of a stacked parameter, the pair of each expert."""
    a, b = file.read(keys[A][module]), file.read(keys[B][module])
    targeted = _targeted(module, keys)
    rank = _of_module(targeted, config, "rank_pattern", "r")
    alpha = _of_module(targeted, config, "alpha_pattern", "lora_alpha")
    scale = _scale(rank, alpha, config)
    if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:  # the change would be zero or infinite
        raise InputRefused(f"lora_alpha {alpha:g} and rank {rank} make a scale of {scale:g}, which float32 cannot hold")
    pairs = None
    if module in keys[PARAMETER] and expert_layouts.is_flat(a, b, rank):
        order = expert_layouts.b_layout(keys[PARAMETER][module], config, options.moe_b_layout)
        pairs = expert_layouts.flat_pairs(a, b, rank, scale, order)
    elif expert_layouts.is_stacked(module, a, b):
        if a.shape[1] != rank:
            raise InputRefused(
                f"A {a.shape} and B {b.shape}: the rank of each expert is {a.shape[1]}, the config's is {rank}, and "
                "nothing states which of them alpha was divided by. Correct r or rank_pattern in adapter_config.json"
            )
        pairs = expert_layouts.stacked_pairs(a, b, scale)
    if pairs is None:
        return {module: _pair(module, a, b, rank, scale, file, keys, config)}
    if module in keys[MAGNITUDE] or module in keys[B_BIAS]:
        raise InputRefused("a magnitude or a bias beside the pairs of experts is not supported")
    return {expert_name(module, expert): pair for expert, pair in enumerate(pairs)}


def _pair(
    module: str,
    a: NDArray[Any],
    b: NDArray[Any],
    rank: int,
    scale: float,
    file: safetensors_file.TensorFile,
    keys: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any],
) -> LoraPair:
    embedding = module in keys[EMBEDDING]
    if embedding is not (".lora_embedding_B" in keys[B][module]):
        raise InputRefused("one of lora_A and lora_B is an embedding's, the other is not")
    if a.ndim != b.ndim or not 2 <= a.ndim <= 5:
        raise InputRefused(f"A {a.shape}, B {b.shape}: no linear layer, convolution or embedding has such shapes")
    if a.ndim > 2 and a.shape[0] == rank and b.shape[1] < rank and rank % b.shape[1] == 0:
        raise InputRefused(
            f"A {a.shape}, B {b.shape}: the convolution has {rank // b.shape[1]} groups. PEFT's A mixes the channels "
            "of all groups, which no weight of a grouped convolution can do: it cannot be merged"
        )
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise InputRefused(f"A {a.shape} and B {b.shape} disagree with the config's rank {rank}")
    magnitude = _magnitude(module, file, keys, config, b)
    return LoraPair(
        a=a, b=b, scale=scale, magnitude=magnitude, embedding=embedding, as_stored=module in keys[PARAMETER]
    )


def _magnitude(
    module: str,
    file: safetensors_file.TensorFile,
    keys: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any],
    b: NDArray[Any],
) -> NDArray[Any] | None:
    """DoRA's magnitudes (out,). PEFT saves those of a convolution as (1, out, 1...)."""
    key = keys[MAGNITUDE].get(module)
    if (key is not None) is not bool(config.get("use_dora")):
        raise InputRefused(
            "the config sets use_dora, but lora_magnitude_vector is missing"
            if key is None
            else "lora_magnitude_vector is present, but the config does not set use_dora"
        )
    if key is None:
        return None
    magnitude = file.read(key)
    if magnitude.shape != _magnitude_shape(b):
        raise InputRefused(f"the magnitude is {magnitude.shape}, B {b.shape} needs {_magnitude_shape(b)}")
    return magnitude.reshape(-1)


def _magnitude_shape(b: NDArray[Any]) -> tuple[int, ...]:
    return (b.shape[0],) if b.ndim == 2 else (1, b.shape[0], *b.shape[2:])


def _scale(rank: int, alpha: float, config: Mapping[str, Any]) -> float:
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


# --- what the adapter records beside its tensors ------------------------------------------------


def _notes(
    keys: Mapping[str, Mapping[str, str]], config: Mapping[str, Any], tied: Mapping[str, str]
) -> tuple[str, ...]:
    """Choices of this reader that may surprise the user."""
    notes = [
        f"{module}: PEFT up to 0.21 adds the output projection's change twice when it runs or merges such an "
        "attention; here it is added once"
        for module, key in keys[A].items()
        if OUT_PROJ in key
    ]
    # PEFT saves its patterns sorted. Where several match, it may have trained with another one.
    notes += [
        f"{module}: several patterns of alpha_pattern match it; the first one in the file is used, as PEFT does"
        for module in keys[A]
        if len(set(config["alpha_pattern"].values(_targeted(module, keys)))) > 1
    ]
    notes += [
        f"{tensor} is saved whole, and the config does not declare it: it replaces the base's tensor"
        for tensor in keys[WHOLE]
        if not _declared(tensor, config) and tensor.removesuffix(".weight") not in keys[A]
    ]
    notes += [
        f"{tensor} is saved whole beside the pair that changes it, as PEFT does with embeddings: it replaces the "
        "base's tensor, and the pair is added to it"
        for tensor in keys[WHOLE]
        if tensor.removesuffix(".weight") in keys[A]
    ]
    notes += [
        f"{head} and {table} are tied and have one pair: PEFT up to 0.21 adds its change twice when it merges; here it "
        "is added once"
        for head, table in tied.items()
    ]
    if keys[UNUSED]:
        unused = list(keys[UNUSED])
        more = f" and {len(unused) - SHOWN_TENSORS} more" if len(unused) > SHOWN_TENSORS else ""
        notes.append(f"tensors that only training uses are left out: {', '.join(unused[:SHOWN_TENSORS])}{more}")
    return tuple(notes)


def _layouts(
    file: safetensors_file.TensorFile, pairs: Mapping[str, LoraPair], config: Mapping[str, Any]
) -> dict[str, str]:
    """How the weights that the adapter was trained on are stored, where that is recorded.

    PEFT sets `fan_in_fan_out` at a Conv1D. False is no evidence: it is the default, and PEFT writes one value for all
    modules.
    """
    if LAYOUTS in file.metadata:
        layouts = json_files.parse_json(file.metadata[LAYOUTS].encode(), f"{LAYOUTS} in the header of {file.path}")
        wrong = [name for name, layout in layouts.items() if layout not in ("out_in", "in_out")]
        if wrong:
            raise InputRefused(f"{file.path}: {LAYOUTS} must map modules to out_in or in_out: {', '.join(wrong)}")
        return layouts
    layouts = {module: "out_in" for module, pair in pairs.items() if pair.as_stored and not split_part(module)[1]}
    if config.get("fan_in_fan_out"):
        layouts |= {module: "in_out" for module, pair in pairs.items() if pair.a.ndim == 2 and not pair.embedding}
    return layouts


def _expert_axes(
    file: safetensors_file.TensorFile,
    keys: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any],
    pairs: Mapping[str, LoraPair],
) -> dict[str, ExpertAxes]:
    """How the pairs of experts relate to the stacked parameters of these."""
    return {
        module: ExpertAxes.OUT_IN if len(file.entries[key].shape) == 3 else expert_layouts.flat_axes(config)
        for module, key in keys[A].items()
        if expert_name(module, 0) in pairs
    }


def _tied(
    pairs: Mapping[str, LoraPair], replaced: Mapping[str, NDArray[Any]], config: Mapping[str, Any]
) -> dict[str, str]:
    """The output embeddings whose pair is that of the input embeddings: PEFT ties them with `ensure_weight_tying`."""
    if not config.get("ensure_weight_tying"):
        return {}

    def are_tied(head: str, table: str) -> bool:
        one, other = pairs[head], pairs[table].transposed
        own, its = (replaced.get(f"{module}.weight") for module in (head, table))
        has_equal_pair = one.scale == other.scale and np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b)
        return has_equal_pair and (own is None or (its is not None and np.array_equal(own, its)))

    tables = [module for module, pair in pairs.items() if pair.embedding and pair.magnitude is None]
    heads = [module for module, pair in pairs.items() if not pair.embedding and pair.magnitude is None]
    return {head: table for table in tables for head in heads if are_tied(head, table)}


def _declared(tensor: str, config: Mapping[str, Any]) -> bool:
    module, _, kind = tensor.rpartition(".")
    if kind == "bias" and config.get("bias", "none") != "none":
        return True
    return any(f".{saved}." in f".{module}." for saved in config.get("modules_to_save") or ())


def _targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The targeted names, if the config is a plain list: no pattern, no chosen layers, no excluded modules."""
    parameters = [target.removesuffix(".weight") for target in config.get("target_parameters") or ()]
    targets = config.get("target_modules") or ([] if parameters else None)
    if config.get("layers_to_transform") is not None or config.get("exclude_modules") or not isinstance(targets, list):
        return ()
    return tuple(map(str, [*targets, *parameters]))


def _metadata(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("task_type", "base_model_name_or_path", "peft_version")
    metadata = {name: config.get(name) for name in names if config.get(name)}
    metadata |= {"r": config["r"], "lora_alpha": config["lora_alpha"], "use_rslora": bool(config.get("use_rslora"))}
    model_config = path / "config.json"  # some trainers, ours too, save the model's config beside the adapter
    if model_config.is_file():
        model = json_files.read_model_config(model_config)
        metadata["model_config"] = {key: model[key] for key in HEAD_FIELDS if model.get(key) is not None}
    return metadata


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
