"""A new adapter for a module, ready to be trained."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from torch import nn

from lora_export.errors import InputRefused
from lora_export.layers.module_tensors import as_array, named_tensors, specs
from lora_export.lora import Adapter, LoraPair, new_pair
from lora_export.plan import Layout, TensorSpec


def create_adapter(
    module: nn.Module,
    *,
    targets: Literal["all-linear"] | Sequence[str],
    rank: int,
    alpha: float,
    seed: int,
    name: str = "default",
    rslora: bool = False,
    modules_to_save: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Adapter:
    """Create an adapter for this module: A is Kaiming-uniform and B is zero, so that it changes nothing until trained.

    `targets` are module names or their endings (`query` matches every `….query`), or "all-linear": every
    linear layer and packed attention projection, except a Hugging Face model's output embeddings.
    `modules_to_save` names modules, such as a classification head, that are trained and saved in full; `exclude`
    names layers that get no pair. The scale is alpha / rank, or alpha / √rank with `rslora`.
    Raises InputRefused with every name that matches nothing, and the nearest names that would.
    """
    if rank < 1 or not math.isfinite(alpha) or alpha <= 0:
        raise InputRefused(f"rank {rank} and alpha {alpha}: both must be positive")
    linear = {_pair_name(spec.name): spec for spec in specs(module) if _is_linear(spec)}
    wanted = () if targets == "all-linear" else tuple([targets] if isinstance(targets, str) else targets)
    modules = [path for path, _ in module.named_modules() if path]
    _refuse_unmatched(wanted, linear, "linear layer", modules)
    _refuse_unmatched(modules_to_save, modules, "module", modules)
    _refuse_unmatched(exclude, modules, "module", modules)

    saved, excluded = _prefixes(modules_to_save, modules), _prefixes(exclude, modules)
    matched = [path for path in linear if targets == "all-linear" or _matches(path, wanted)]
    left_out = _output_embeddings(module) if targets == "all-linear" else set()
    chosen = [
        path for path in matched if path not in left_out and not linear[path].name.startswith((*saved, *excluded))
    ]
    if not chosen:
        raise InputRefused("no linear layer is left to adapt")
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    saved_tensors = (entry for entry in named_tensors(module) if entry.name.startswith(saved))
    return Adapter(
        name=name,
        format="new",
        pairs=_new_pairs({path: linear[path] for path in chosen}, rank=rank, scale=scale, seed=seed),
        replaced={entry.name: as_array(entry.tensor) for entry in saved_tensors},
        layouts={path: linear[path].layout.value for path in chosen},
        targets=wanted if wanted and chosen == matched else tuple(chosen),
        metadata={"r": rank, "lora_alpha": alpha, "use_rslora": rslora},
    )


def full_rank_layers(adapter: Adapter) -> list[str]:
    """The layers with fewer rows or columns than their rank, in words: A and B have more numbers than they need."""
    return [
        f"`{name}` is {pair.shape[0]} × {pair.shape[1]}, its rank {pair.rank}"
        for name, pair in adapter.pairs.items()
        if pair.rank > min(pair.shape)
    ]


def _new_pairs(linear: dict[str, TensorSpec], *, rank: int, scale: float, seed: int) -> dict[str, LoraPair]:
    rng = np.random.default_rng(seed)
    pairs: dict[str, LoraPair] = {}
    for path, spec in linear.items():
        out_features, in_features = spec.matrix
        pairs[path] = new_pair((out_features, in_features), rank=rank, scale=scale, rng=rng)
    return pairs


def _is_linear(spec: TensorSpec) -> bool:
    return spec.layout in (Layout.OUT_IN, Layout.IN_OUT) and len(spec.shape) == 2  # a convolution has more dimensions


def _pair_name(weight: str) -> str:
    """The name of a pair for this weight: its module's name, or the weight's own where a module has several."""
    return weight.removesuffix(".weight").removesuffix(".in_proj_weight")


def _matches(path: str, names: Iterable[str]) -> bool:
    return any(f".{path}".endswith(f".{name}") for name in names)


def _prefixes(names: Sequence[str], modules: Iterable[str]) -> tuple[str, ...]:
    """The prefixes of all tensor names in the modules that these names match."""
    return tuple(f"{path}." for path in modules if _matches(path, names))


def _refuse_unmatched(names: Iterable[str], paths: Iterable[str], what: str, modules: Sequence[str]) -> None:
    paths = list(paths)
    endings = sorted({path.rpartition(".")[2] for path in paths} | set(paths))
    problems = []
    for name in names:
        if any(_matches(path, [name]) for path in paths):
            continue
        nearest = difflib.get_close_matches(name, endings, n=3, cutoff=0.5) or endings[:3]
        exists = "is no" if any(_matches(path, [name]) for path in modules) else "matches no"
        problems.append(f"`{name}` {exists} {what}; the nearest: {', '.join(nearest) or 'none'}")
    if problems:
        raise InputRefused("; ".join(problems))


def _output_embeddings(module: nn.Module) -> set[str]:
    """The names of a Hugging Face model's output embeddings, which PEFT's "all-linear" leaves out too."""
    if not callable(getattr(module, "get_output_embeddings", None)):
        return set()
    head = module.get_output_embeddings()  # type: ignore[operator]
    return {path for path, child in module.named_modules() if head is not None and child is head}
