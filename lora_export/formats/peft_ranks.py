"""Write an adapter whose modules have different ranks, in PEFT's format: with `rank_pattern` and `alpha_pattern`.

Each pair has the scale 1, so each alpha is the rank. Whole tensors are written where PEFT looks for them: those of a
module without a pair under `modules_to_save`, the bias of a layer as `bias` saves it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.formats import peft
from lora_export.formats.peft_keys import OUT_PROJ, WRAPPER
from lora_export.formats.peft_records import LAYOUTS
from lora_export.lora import Adapter


def write_any_ranks(
    adapter: Adapter, folder: Path, *, metadata: Mapping[str, str] | None = None, **config: Any
) -> None:
    """Write an adapter of pairs of scale 1 and whole tensors. `config` holds further fields of its config.

    The caller stages `folder`. `metadata` is added to the header of the file of tensors. Raises ValueError for what
    such a file cannot hold: another scale, DoRA, bare parameters, additions to biases, or rows of tokens.
    """
    beyond = adapter.biases or adapter.token_rows
    if beyond or any(p.scale != 1 or p.magnitude is not None or p.as_stored for p in adapter.pairs.values()):
        raise ValueError(f"a PEFT adapter of scale 1 cannot hold everything in {adapter.name}")
    ranks = _ranks(adapter)
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(name)}": rank for name, rank in sorted(ranks.items()) if rank != usual}
    of_layers = [name for name in adapter.replaced if name.rpartition(".")[0] in adapter.pairs]
    saved = sorted({name.rpartition(".")[0] for name in adapter.replaced if name not in of_layers})
    transposed = any(layout == "in_out" for layout in adapter.layouts.values())
    fields = {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": _targets(adapter),
        "modules_to_save": saved or None,
        "bias": "lora_only" if of_layers else "none",
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "use_dora": False,
        "ensure_weight_tying": bool(adapter.tied),
        "inference_mode": True,
        "init_lora_weights": True,
        **{key: value for key, value in adapter.metadata.items() if key in ("task_type", "base_model_name_or_path")},
        **config,
    }
    tensors = peft.pair_tensors(adapter)
    for name, value in adapter.replaced.items():
        module, _, kind = name.rpartition(".")
        tensors[f"{WRAPPER}{module}.base_layer.{kind}" if name in of_layers else WRAPPER + name] = value
    layouts = {LAYOUTS: json.dumps(dict(adapter.layouts), sort_keys=True)} if adapter.layouts else {}
    peft.write_files(folder, tensors, fields, {**layouts, **(metadata or {})})


def name_in_patterns(adapter: Adapter, module: str) -> str:
    """The name by which PEFT looks up the rank of a module: that of the attention for its output projection."""
    return module.removesuffix(".out_proj") if OUT_PROJ in adapter.spelled(module) else module


def _ranks(adapter: Adapter) -> dict[str, int]:
    """The rank of each name that PEFT looks up."""
    ranks: dict[str, int] = {}
    for module, pair in adapter.pairs.items():
        name = name_in_patterns(adapter, module)
        if ranks.setdefault(name, pair.rank) != pair.rank:
            raise ValueError(f"{name} has pairs of rank {ranks[name]} and {pair.rank}; PEFT has one rank for both")
    return ranks


def _targets(adapter: Adapter) -> list[str]:
    """The names for PEFT: endings where the adapter knows them and they name all its modules, else whole names.

    PEFT finds a tied module by that to which it is tied.
    """
    names = sorted(name for name in _ranks(adapter) if name not in adapter.tied)
    endings = adapter.targets
    known = all(any(f".{name}".endswith(f".{ending}") for ending in endings) for name in names)
    return sorted(endings) if endings and known else names
