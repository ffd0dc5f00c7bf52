"""The facts on which rules depend: of the adapter, of each of its changes, and of the base. They are a closed set.

A fact whose value is not known is None: no rule that depends on it is decided. A fact of a format that has no such
thing, as the alpha of PEFT's config in a file of kohya's, is not known either.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from lora_export.formats.gguf import GGUF_ROWS
from lora_export.formats.writing import alpha_of, why_no_low_rank
from lora_export.lora import Adapter, LoraPair, split_component, split_part
from lora_export.names.table import is_embedding
from lora_export.pairs.open_shape import OpenPair, known_shape
from lora_export.pairs.structured import HadamardPair, KroneckerPair, WholePair
from lora_export.storage import json_files

Fact: TypeAlias = bool | int | float | str | tuple[str, ...] | None
KnownFacts: TypeAlias = Mapping[str, Fact]

OF_ADAPTER = {
    "format": "the format of its files",
    "tensor_file": "the suffix of PEFT's file of tensors",
    "declared_rank": "the largest rank of PEFT's config, with its patterns",
    "whole_alpha": "whether lora_alpha is a whole number, as JSON writes it",
    "declared_bias": "`bias` of PEFT's config",
    "targets": "how PEFT's config has target_modules: `list`, `text` or empty",
    "added_tokens": "how many tokens added_tokens.json adds to the vocabulary of the base",
    "several_alphas": "whether scale × rank differs between its pairs",
    "several_ranks": "whether the rank differs between its pairs",
    "several_scales": "whether the scale differs between its pairs",
}
OF_CHANGE = {
    "part": "`pair`, `whole` (a tensor), `rows` (of tokens) or `addition` (to a bias or a vector)",
    "kind": "LoRA, DoRA, LoHa, ...; empty where it is no pair",
    "key": "its key in the file",
    "leaf": "the last part of the module's name",
    "low_rank": "whether it is A and B, or can be written as A and B alone",
    "scale": "the factor on B A",
    "config_scale": "whether the scale is lora_alpha / r of PEFT's config",
    "rank_scale": "whether the scale is lora_alpha / the pair's own rank",
    "own_alpha": "whether the alpha is another than lora_alpha of PEFT's config",
    "config_rank": "whether the rank is `r` of PEFT's config",
    "embedding": "whether it is a table of embeddings",
    "expert": "whether it is an expert",
    "kernel": "how many entries the kernel has; 1 for a linear layer",
    "siblings": "the last parts of the names of all changes of the same parent",
    "in_base": "whether the base has a tensor of this name, or of the name without its first part",
    "repeats_base": "whether the tensor is the base's own",
}
OF_BASE = {
    "model_type": "the type of the model",
    "tied": "whether the output embedding is the input embedding",
    "same_architecture": "whether an adapter in GGUF has the architecture that llama.cpp gives the base",
}
NEED_BASE = frozenset({*OF_BASE, "in_base", "repeats_base"})
STRUCTURED_KINDS: Mapping[type[LoraPair], str] = {
    HadamardPair: "LoHa",
    KroneckerPair: "LoKr",
    WholePair: "whole change",
}


@dataclass(frozen=True)
class Base:
    """What is known of a base: its config, the names of its tensors, and the adapter's tensors that are its own."""

    config: Mapping[str, Any] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()
    tied: bool | None = None  # whether its config ties the output embedding; None: not known
    repeated: frozenset[str] = frozenset()
    merging: Mapping[str, Any] = field(default_factory=dict)  # the options that a merge of the adapter into it needs
    file: str = ""  # of a file that gets no tensor which it lacks: a head of its own needs the checkpoint
    instead: Mapping[str, str] = field(default_factory=dict)  # repair that does not know its architecture -> another

    @property
    def vocabulary(self) -> int:
        """The number of its tokens; 0 where its config does not state it."""
        return int(_text_config(self.config).get("vocab_size") or 0)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def peft_config(adapter: Adapter, folder: Path | None) -> Mapping[str, Any]:
    """PEFT's config as a runtime reads it; empty for adapters of other formats or in memory."""
    path = None if folder is None else (folder if folder.is_dir() else folder.parent) / "adapter_config.json"
    if adapter.format != "peft" or path is None or not path.is_file():
        return {}
    return json_files.read_json(path)


def facts_of_adapter(adapter: Adapter, config: Mapping[str, Any], folder: Path | None, base: Base | None) -> KnownFacts:
    """The facts that hold for the whole adapter."""
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()] if "r" in config else []
    pairs = adapter.pairs.values()
    targets = config.get("target_modules")
    alphas = {alpha_of(pair.scale, pair.rank) for pair in pairs if pair.rank}
    values: dict[str, Fact] = {
        "format": adapter.format,
        "tensor_file": _suffix(folder) if adapter.format == "peft" and folder is not None else None,
        "declared_rank": max(ranks, default=None),
        "whole_alpha": isinstance(config["lora_alpha"], int) if "lora_alpha" in config else None,
        "declared_bias": (config.get("bias") or "none") if config else None,
        "targets": (type(targets).__name__.replace("str", "text") if targets else "") if config else None,
        "added_tokens": _added_tokens(folder, base),
        "several_alphas": len(alphas) > 1,
        "several_ranks": len({pair.rank for pair in pairs}) > 1,
        "several_scales": len({pair.scale for pair in pairs}) > 1,
    }
    return values


def _suffix(folder: Path) -> str:
    if folder.is_file():
        return folder.suffix
    files = filter(Path.is_file, folder.glob("adapter_model*"))
    return min((each.suffix for each in files), key=".bin".__eq__, default="")


def _added_tokens(folder: Path | None, base: Base | None) -> int | None:
    path = None if folder is None else folder / "added_tokens.json"
    if path is None or not path.is_file():
        return 0
    own = 0 if base is None else base.vocabulary
    return sum(isinstance(number, int) and number >= own for number in json_files.read_json(path).values())


def facts_of_base(adapter: Adapter, base: Base | None) -> KnownFacts:
    """The facts of the base; all of them None without one."""
    if base is None:
        return dict.fromkeys(OF_BASE)
    kind = _text_config(base.config).get("model_type") or base.config.get("model_type")
    row = GGUF_ROWS.get(str(base.config.get("model_type")), GGUF_ROWS.get(str(kind)))
    own = adapter.metadata.get("architecture")
    return {
        "model_type": kind,
        "tied": base.tied,
        "same_architecture": own is None or (None if row is None else row["architecture"] == own),
    }


def facts_of_changes(adapter: Adapter, config: Mapping[str, Any], base: Base | None) -> dict[str, KnownFacts]:
    """The facts of each change, by the name of its module or tensor."""
    found: dict[str, dict[str, Fact]] = {name: _of_pair(pair, config) for name, pair in adapter.pairs.items()}
    for part, names in (
        ("whole", adapter.replaced),
        ("rows", adapter.token_rows),
        ("addition", [*(f"{module}.bias" for module in adapter.biases), *adapter.added]),
    ):
        # A tensor that is saved whole beside the pair that changes it is another change.
        found |= {name: {"part": part, "kind": ""} for name in names}
    siblings: dict[str, set[str]] = defaultdict(set)
    for name in adapter.pairs:
        parent, _, leaf = module_of_change(name).rpartition(".")
        siblings[parent].add(leaf)
    return {
        name: dict.fromkeys(OF_CHANGE)
        | {
            "key": adapter.spelled(name),
            "leaf": module_of_change(name).rpartition(".")[2],
            "embedding": is_embedding(module_of_change(name)),
            "expert": bool(split_part(name)[1]) or ".experts." in name,
            "siblings": tuple(sorted(siblings[module_of_change(name).rpartition(".")[0]])),
            "in_base": _in_base(name, adapter, base),
            "repeats_base": None if base is None or not base.tensors else name in base.repeated,
        }
        | facts
        for name, facts in found.items()
    }


def module_of_change(name: str) -> str:
    """The module of a change, whose name may be that of a tensor, of a part of one, or in a component."""
    tensor = split_component(split_part(name)[0])[1]
    return tensor.removesuffix(".weight").removesuffix(".bias")


def _of_pair(pair: LoraPair, config: Mapping[str, Any]) -> dict[str, Fact]:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    root = math.sqrt if config.get("use_rslora") else float
    facts: dict[str, Fact] = {
        "part": "pair",
        "kind": _kind(pair, config),
        "low_rank": None if isinstance(pair, OpenPair) else pair.magnitude is None and not why_no_low_rank(pair),
        "scale": pair.scale,
        "kernel": math.prod(known_shape(pair)[2:]),
    }
    if not rank or not alpha:
        return facts
    return (
        facts
        | {
            "config_scale": math.isclose(pair.scale, alpha / rank),
            "rank_scale": math.isclose(pair.scale, alpha / pair.rank),
            "own_alpha": not math.isclose(pair.scale * root(pair.rank), alpha),
            "config_rank": pair.rank == rank,
        }
        | ({"embedding": True} if pair.embedding else {})
    )


def _kind(pair: LoraPair, config: Mapping[str, Any]) -> str:
    """The kind as it is in the file: PEFT's name for one of its other kinds, which may be read as A and B."""
    own = str(config.get("peft_type", "LORA"))
    return STRUCTURED_KINDS.get(type(pair), pair.kind if own == "LORA" else own)


def _in_base(name: str, adapter: Adapter, base: Base | None) -> bool | None:
    if base is None or not base.tensors or adapter.flattened:
        return None
    return any(each in base.tensors for each in _tensors_of(name))


def _tensors_of(name: str) -> Iterator[str]:
    """The names of its tensor; without the first part too, which a bare model's checkpoint lacks (`bert.`)."""
    owner = split_part(name)[0]
    for own in (owner, owner.partition(".")[2]):
        yield from (own, f"{own}.weight")
