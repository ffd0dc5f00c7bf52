"""PEFT's folders, of adapters in any format: every pair with its own rank and alpha.

Scales become `alpha / rank`. Stacked parameters are written as PEFT from 0.19 does (`target_parameters`); projections
of experts that have a tensor for each expert in transformers 4 are written so, or stacked as SGLang reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats import WriteOptions
from lora_export.formats.adapter_files import base_config
from lora_export.formats.expert_layouts import (
    EXPERTS,
    REGISTRATION_ORDER,
    are_alike,
    expert_stacks,
    nested_parameters,
    projections_of,
    stacked_factors,
    unknown_axes,
)
from lora_export.formats.peft_keys import ADAPTER_CONFIG, OUT_PROJ, WEIGHTS, WRAPPER, magnitude_shape
from lora_export.formats.peft_lost_layers import notes_on_lost_layers
from lora_export.formats.peft_records import LAYOUTS
from lora_export.formats.writing import (
    alpha_of,
    beyond_pairs,
    pair_factors,
    refuse_inexpressible,
    smallest_dtype,
    usual_and_patterns,
)
from lora_export.lora import Adapter, ExpertAxes, LoraPair, split_part
from lora_export.names.families import PROJECTIONS, is_turned, model_types
from lora_export.options.spelling import command
from lora_export.storage import json_files, safetensors_file

ALLOWED = frozenset({"magnitude", "replaced", "token_rows", "tied"})
KEPT_FACTS = ("task_type", "base_model_name_or_path")
# With one of these tasks, PEFT takes each module whose name ends so for saved whole, and finds no tensor missing.
HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)
}  # fmt: skip
NO_MODULES = "dummy-target-modules"  # PEFT refuses an empty list, and takes its defaults for none
NEW_PEFT = "0.19.0"  # the first whose axes of stacked parameters are those that are written


def write(adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:
    """Write an adapter as PEFT does into a folder."""
    config = base_config(None, options.reading) or {}
    types = model_types(config)
    problems = beyond_pairs(adapter, ALLOWED)
    plain, parameters = _split(adapter, types, problems)
    stacks: dict[str, list[LoraPair]] = {}  # a projection -> the pairs of all experts
    if options.stacked_experts:
        plain, stacks = _stacked(replace(adapter, pairs=plain), problems)
    if len({pair.magnitude is not None for pair in (*plain.values(), *_experts_of(parameters))}) > 1:
        problems.append("DoRA on some layers; PEFT has it on all or none")
    problems += _different_ranks(adapter, plain)
    nested = _nested(parameters, problems)
    refuse_inexpressible(adapter, "peft", problems)
    tensors = _pair_tensors(replace(adapter, pairs=plain))
    for name, experts in stacks.items():
        a, b = map(_shared, stacked_factors(experts))
        tensors |= {f"{WRAPPER}{name}.lora_A.weight": a, f"{WRAPPER}{name}.lora_B.weight": b}
    for name, key in nested.items():
        tensors[f"{WRAPPER}{key}.lora_A.weight"] = np.concatenate([pair.a for pair in parameters[name]])
        by_rank = np.stack([pair.b for pair in parameters[name]], axis=2)  # (out, rank, experts)
        tensors[f"{WRAPPER}{key}.lora_B.weight"] = by_rank.reshape(by_rank.shape[0], -1)
    dtype = smallest_dtype(pair_factors((*plain.values(), *_experts_of(parameters), *_experts_of(stacks))))
    tensors = {key: value.astype(dtype) for key, value in tensors.items()}
    firsts = {
        **{name_in_patterns(adapter, name): pair for name, pair in plain.items()},
        **{name: experts[0] for name, experts in (parameters | stacks).items()},
    }
    fields = _config(adapter, firsts, sorted(parameters), dora=any(p.magnitude is not None for p in plain.values()))
    of_peft = {ExpertAxes.BY_CLASS, ExpertAxes.TRANSPOSED} & set(adapter.experts.values())
    version = adapter.metadata.get("peft_version")
    if parameters or isinstance(version, str):
        fields["peft_version"] = version if isinstance(version, str) and (of_peft or not parameters) else NEW_PEFT
    tensors |= _whole_tensors(adapter, fields)
    layouts = {name: layout for name, layout in adapter.layouts.items() if name in plain}
    _write_files(path, tensors, fields, layouts, {})
    return notes_on_lost_layers(plain, config)


def write_any_ranks(adapter: Adapter, folder: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write an adapter of pairs of scale 1 and whole tensors, with their types.

    Each alpha is the rank. The caller stages `folder`. `metadata` is added to the header of the file of tensors. Raises
    InputRefused for flattened names, and ValueError for what such a file cannot hold: another scale, DoRA, bare
    parameters, additions to vectors, rows of tokens, and two ranks where PEFT has one.
    """
    if adapter.flattened:
        raise InputRefused(
            f"`_` stands for the dots in the adapter's names, such as {next(iter(adapter.pairs))}: PEFT finds no "
            f"module by them. Convert each adapter first: `{command('convert', 'ADAPTER', to='peft', base='BASE')}`"
        )
    beyond = {kind for kind, names in adapter.beyond_pairs.items() if names} - {"replaced", "tied"}
    problems = _different_ranks(adapter, adapter.pairs)
    if beyond or problems or any(pair.scale != 1 for pair in adapter.pairs.values()):
        raise ValueError(f"a PEFT adapter of scale 1 cannot hold everything in {adapter.name}")
    facts = {key: value for key, value in adapter.metadata.items() if key in KEPT_FACTS}
    plain = replace(adapter, metadata=facts)
    named_pairs = {name_in_patterns(adapter, name): pair for name, pair in adapter.pairs.items()}
    fields = _config(plain, named_pairs, [], dora=False)
    tensors = _pair_tensors(adapter) | _whole_tensors(plain, fields)
    _write_files(folder, tensors, fields, adapter.layouts, metadata or {})


def _write_files(
    folder: Path,
    tensors: Mapping[str, NDArray[Any]],
    config: Mapping[str, Any],
    layouts: Mapping[str, str],
    metadata: Mapping[str, str],
) -> None:
    """Write the two files of a PEFT adapter. `layouts` and `metadata` are in the header of the tensors' file."""
    recorded = {LAYOUTS: json.dumps(dict(layouts), sort_keys=True)} if layouts else {}
    header = {"format": "pt", **recorded, **metadata}
    safetensors_file.write(folder / WEIGHTS, dict(sorted(tensors.items())), header)
    json_files.write_json(folder / ADAPTER_CONFIG, config, sort_keys=True)


def _pair_tensors(adapter: Adapter) -> dict[str, NDArray[Any]]:
    """The pairs of an adapter as tensors, under PEFT's keys."""
    tensors: dict[str, NDArray[Any]] = {}
    for name, pair in adapter.pairs.items():
        module = name.removesuffix(".out_proj") + OUT_PROJ if OUT_PROJ in adapter.spelled(name) else name
        a, b = ("lora_embedding_A", "lora_embedding_B") if pair.embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{WRAPPER}{module}.{a}": pair.a, f"{WRAPPER}{module}.{b}": pair.b}
        if pair.magnitude is not None:
            key = f"{WRAPPER}{module}.lora_magnitude_vector"
            tensors[key] = pair.magnitude.reshape(magnitude_shape(pair.b))
    return tensors


def _experts_of(parameters: Mapping[str, list[LoraPair]]) -> list[LoraPair]:
    return [pair for pairs in parameters.values() for pair in pairs]


def _split(
    adapter: Adapter, types: set[str], problems: list[str]
) -> tuple[dict[str, LoraPair], dict[str, list[LoraPair]]]:
    """The pairs of modules, and those of all experts of a stacked parameter, with PEFT's axes."""
    projections = projections_of(adapter)
    plain: dict[str, LoraPair] = {}
    parameters: dict[str, dict[int, LoraPair]] = {}
    for name, pair in adapter.pairs.items():
        owner, index = split_part(name)
        if not index:
            if pair.as_stored:
                problems.append(f"{name}: the pair of a bare parameter")
            plain[name] = pair
        elif not index.isdecimal():
            problems.append(f"{name}: the pair of a part of a tensor")
        elif owner in projections:
            module, _, last = owner.rpartition(".")
            plain[f"{module}.{index}.{last}"] = replace(pair, as_stored=False)
        else:
            axes = adapter.experts.get(owner, ExpertAxes.STORED)
            # An older PEFT's own axes stay: its version is written too.
            own_axes = ExpertAxes.BY_CLASS if axes is ExpertAxes.TRANSPOSED else axes
            turned = is_turned(own_axes, ExpertAxes.BY_CLASS, types)
            if turned is None:
                problems.append(unknown_axes(name))
                continue
            parameters.setdefault(owner, {})[int(index)] = pair.turned if turned else pair
    problems += [
        f"{name}: experts of different shapes, ranks or scales, or without a pair"
        for name, pairs in parameters.items()
        if not are_alike(pairs)
    ]
    return plain, {name: [pairs[n] for n in sorted(pairs)] for name, pairs in parameters.items()}


def _nested(parameters: Mapping[str, list[LoraPair]], problems: list[str]) -> dict[str, str]:
    """Parameter -> the module of its keys: the first that a module registers is the innermost."""
    by_module: dict[str, list[str]] = {}
    for name in parameters:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    keys: dict[str, str] = {}
    for module, names in by_module.items():
        lasts = [name.rpartition(".")[2] for name in names]
        ordered = nested_parameters(module, lasts, len(lasts))
        if ordered is None:
            unknown = sorted(set(lasts) - set(REGISTRATION_ORDER))
            problems += [f"{module}.{last}: the order of the parameters of its module is not known" for last in unknown]
        keys |= {name: module + ".base_layer" * depth for depth, name in enumerate(reversed(ordered or []))}
    return keys


def _stacked(adapter: Adapter, problems: list[str]) -> tuple[dict[str, LoraPair], dict[str, list[LoraPair]]]:
    """The pairs without those of single experts, and these stacked by projection."""
    found = expert_stacks(adapter, ())
    stacks = {f"{owner}.{PROJECTIONS[kind][0]}": pairs for owner, kind, pairs in found.whole()}
    problems += found.problems
    return found.plain, stacks


def _shared(stack: NDArray[np.float32]) -> NDArray[np.float32]:
    """One factor, where all experts have the same."""
    return stack[:1] if len(stack) > 1 and (stack == stack[:1]).all() else stack


def name_in_patterns(adapter: Adapter, module: str) -> str:
    """The name by which PEFT looks up the rank of a module: that of the attention for its output projection."""
    return module.removesuffix(".out_proj") if OUT_PROJ in adapter.spelled(module) else module


def _different_ranks(adapter: Adapter, pairs: Mapping[str, LoraPair]) -> list[str]:
    """The modules for which PEFT has one rank and alpha, and the adapter has several."""
    kinds: dict[str, set[tuple[int, float]]] = {}
    for name, pair in pairs.items():
        kinds.setdefault(name_in_patterns(adapter, name), set()).add((pair.rank, pair.scale))
    return [f"{name}: pairs of different ranks or scales" for name, found in kinds.items() if len(found) > 1]


def _config(adapter: Adapter, pairs: Mapping[str, LoraPair], parameters: list[str], *, dora: bool) -> dict[str, Any]:
    """The config, with what the most pairs have as its rank and alpha, and patterns for the others.

    PEFT joins gate and up of an expert for transformers 5: it doubles rank and alpha, with rsLoRA √2 times the scale.
    """
    of_experts = any(f".{EXPERTS}." in name for name in pairs.keys() - {*parameters})
    rslora = bool(adapter.metadata.get("use_rslora")) and not of_experts
    alphas = {name: alpha_of(pair.scale, math.sqrt(pair.rank) if rslora else pair.rank) for name, pair in pairs.items()}
    rank, rank_pattern = usual_and_patterns({name: pair.rank for name, pair in pairs.items()})
    alpha, alpha_pattern = usual_and_patterns(
        {name: int(alpha) if alpha == int(alpha) and alpha < 1 << 53 else alpha for name, alpha in alphas.items()}
    )
    modules = sorted(name for name in pairs if name not in parameters and name not in adapter.tied)
    known = modules and all(any(f".{name}".endswith(f".{ending}") for ending in adapter.targets) for name in modules)
    ends = [target for target in adapter.targets if any(f".{name}".endswith(f".{target}") for name in modules)]
    heads = adapter.tied.keys() & pairs.keys()  # PEFT ties a head by itself only to a table called embed_tokens
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted({*(ends if known else modules), *heads}) if pairs else NO_MODULES,
        **({"target_parameters": parameters} if parameters else {}),
        "modules_to_save": None,
        "bias": adapter.metadata.get("bias", "none"),
        "fan_in_fan_out": any(layout == "in_out" for layout in adapter.layouts.values()),
        "use_rslora": rslora,
        "lora_dropout": adapter.metadata.get("lora_dropout", 0.0),
        "use_dora": dora,
        "ensure_weight_tying": bool(adapter.tied),
        "inference_mode": True,
        "init_lora_weights": True,
        **{key: adapter.metadata[key] for key in KEPT_FACTS if isinstance(adapter.metadata.get(key), str)},
    }


def _head_around(module: str, heads: tuple[str, ...]) -> str:
    """The outermost module of this path whose name ends as a head's does, which PEFT looks for; empty without one."""
    parts = module.split(".")
    return next((".".join(parts[: place + 1]) for place, part in enumerate(parts) if part.endswith(heads)), "")


def _whole_tensors(adapter: Adapter, fields: dict[str, Any]) -> dict[str, NDArray[Any]]:
    """Whole tensors and rows of tokens under PEFT's keys; what the config has to name of them is added to `fields`."""
    tensors: dict[str, NDArray[Any]] = {}
    saved = set()
    parts = [name.rpartition(".")[::2] for name in adapter.replaced]
    whole = {module for module, kind in parts if "bias" not in kind} | adapter.pairs.keys()
    with_rows = {
        module for name, rows in adapter.token_rows.items() for module in (name.removesuffix(".weight"), *rows.tied)
    }
    if any(module not in whole for module, _ in parts):
        fields["bias"] = "all"  # biases alone: of a module to save, PEFT loads every tensor
    for name, value in adapter.replaced.items():
        module, _, kind = name.rpartition(".")
        attention = module.removesuffix(".out_proj")
        if module != attention and attention in adapter.pairs:  # PEFT wraps both layers of an attention
            tensors[f"{WRAPPER}{attention}{OUT_PROJ}.base_layer.{kind}"] = value
        elif module in adapter.pairs:
            tensors[f"{WRAPPER}{module}.base_layer.{kind}"] = value
        elif module in with_rows:  # PEFT refuses rows of a module to save
            tensors[f"{WRAPPER}{module}.token_adapter.base_layer.{kind}"] = value
        else:
            saved |= set() if "bias" in name and fields["bias"] == "all" else {module}
            tensors[WRAPPER + name] = value
        if module in adapter.pairs and kind == "bias" and fields["bias"] == "none":
            fields["bias"] = "lora_only"
    heads = HEADS_OF_TASKS.get(fields.get("task_type", ""), ())
    has_head = any(_head_around(module, heads) for module in saved)
    if heads and (not has_head or any(_head_around(module, heads) for module in adapter.pairs)):
        heads = ()
        del fields["task_type"]  # PEFT would look for a head that is not there
    fields["modules_to_save"] = sorted({_head_around(module, heads) or module for module in saved}) or None
    table: dict[str, list[int]] = {}
    for name, rows in adapter.token_rows.items():
        module = name.removesuffix(".weight")
        tensors[f"{WRAPPER}{module}.token_adapter.trainable_tokens_delta"] = rows.values
        table |= dict.fromkeys((module, *rows.tied), rows.indices.tolist())
    if table:
        fields["trainable_token_indices"] = table
    unnamed = [name for name in adapter.replaced if "." not in name]
    if unnamed:
        raise InputRefused(f"{', '.join(unnamed)}: PEFT has no place for a parameter without a module")
    return tensors
