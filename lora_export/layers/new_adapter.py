"""Adapters from modules: a new one to be trained, how much that trains, and what training made of it."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from lora_export.errors import InputRefused
from lora_export.layers.branched import Branch, attached_in, attachment_of, factors_of, part_of
from lora_export.layers.module_tensors import as_array, places_in, slots_of, specs
from lora_export.lora import Adapter, LoraPair, fresh_pair
from lora_export.plan import Layout, TensorSpec


def fresh_adapter(
    module: nn.Module,
    *,
    targets: Literal["all-linear"] | Sequence[str],
    rank: int,
    alpha: float,
    seed: int,
    name: str = "default",
    rslora: bool = False,
    whole: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Adapter:
    """A new adapter for this module: A Kaiming-uniform, B zero, so that it is the identity until it is trained.

    `targets` are module names or their endings (`query` means every `….query`), or "all-linear": every
    linear layer and packed attention projection, except a Hugging Face model's output embeddings.
    `whole` names modules, such as a classification head, that are trained as a whole; `exclude` names
    layers to leave alone. The scale is alpha / rank, or alpha / √rank with `rslora`.
    Raises InputRefused with every name that matches nothing, and the nearest that would.
    """
    if rank < 1 or not math.isfinite(alpha) or alpha <= 0:
        raise InputRefused(f"rank {rank} and alpha {alpha}: both must be positive")
    tensors = specs(module)
    linear = {_module_of(spec.name): spec for spec in tensors if _is_linear(spec)}
    wanted = () if targets == "all-linear" else tuple([targets] if isinstance(targets, str) else targets)
    modules = [path for path, _ in module.named_modules() if path]
    _refuse_unmatched(wanted, linear, "linear layer", modules)
    _refuse_unmatched(whole, modules, "module", modules)
    _refuse_unmatched(exclude, modules, "module", modules)

    saved = _below(whole, modules)
    replaced = {place.name: as_array(place.tensor) for place in places_in(module) if place.name.startswith(saved)}
    excluded = _below(exclude, modules)
    left_out = {path for path, spec in linear.items() if spec.name.startswith((*saved, *excluded))}
    if targets == "all-linear":
        left_out |= _output_embeddings(module)
    matched = [path for path in linear if targets == "all-linear" or _matches(path, wanted)]
    chosen = [path for path in matched if path not in left_out]
    if not chosen:
        raise InputRefused("no linear layer is left to adapt")

    rng = np.random.default_rng(seed)
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    pairs: dict[str, LoraPair] = {}
    for path in chosen:
        out_features, in_features = linear[path].matrix
        pairs[path] = fresh_pair((out_features, in_features), rank=rank, scale=scale, rng=rng)
    return Adapter(
        name=name,
        format="fresh",
        pairs=pairs,
        replaced=replaced,
        targets=wanted if wanted and chosen == matched else tuple(chosen),
        metadata={"r": rank, "lora_alpha": alpha, "use_rslora": rslora},
    )


def _is_linear(spec: TensorSpec) -> bool:
    return spec.layout in (Layout.OUT_IN, Layout.IN_OUT) and len(spec.shape) == 2  # not a convolution's


def _module_of(weight: str) -> str:
    """The name that a pair has for this weight: its module's, or its own where that would not be clear."""
    return weight.removesuffix(".weight").removesuffix(".in_proj_weight")


def _matches(path: str, names: Iterable[str]) -> bool:
    return any(f".{path}".endswith(f".{name}") for name in names)


def _below(names: Sequence[str], modules: Iterable[str]) -> tuple[str, ...]:
    """What the names of all tensors of these modules start with."""
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
    """The output head of a Hugging Face model with one, which PEFT's "all-linear" leaves alone too."""
    if not callable(getattr(module, "get_output_embeddings", None)):
        return set()
    head = module.get_output_embeddings()  # type: ignore[operator]
    return {path for path, child in module.named_modules() if head is not None and child is head}


@dataclass(frozen=True)
class ParameterCount:
    """How many of a module's parameters an optimiser would train."""

    trained: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trained / self.total if self.total else 0.0
        return f"trainable parameters: {self.trained:,} of {self.total:,} ({share:.3g} %)"


def trainable(module: nn.Module) -> ParameterCount:
    """Count the parameters that require gradients, and all of them. A tied tensor counts once."""
    sizes = [(parameter.requires_grad, parameter.numel()) for parameter in module.parameters()]
    return ParameterCount(sum(size for trained, size in sizes if trained), sum(size for _, size in sizes))


def read_back(module: nn.Module, like: Adapter) -> Adapter:
    """The adapter `like` with the A, B and whole tensors that now stand in the module, as after training.

    Raises InputRefused where that adapter is not attached, or a value is not finite.
    """
    pairs, replaced = dict(like.pairs), dict(like.replaced)
    found = False
    for owner in attached_in(module):
        attachment = attachment_of(owner)
        for branch in attachment.branches:
            if branch.adapter == like.name:
                pairs[branch.module] = _read_pair(owner, branch, like.pairs[branch.module])
                found = True
        for whole in attachment.wholes:
            if whole.tensor and whole.adapter == like.name:
                replaced[whole.tensor] = as_array(slots_of(owner, whole.attribute)[whole.attribute])
                found = True
    if not found:
        raise InputRefused(f"the adapter {like.name} is not attached to this module")
    return dataclasses.replace(like, pairs=pairs, replaced=replaced, sha256="")


def _read_pair(owner: nn.Module, branch: Branch, like: LoraPair) -> LoraPair:
    a, b = map(as_array, factors_of(owner, branch))
    magnitude = as_array(part_of(owner, "lora_magnitude", branch)) if branch.dora else None
    try:
        return dataclasses.replace(like, a=a, b=b, magnitude=magnitude)
    except InputRefused as error:
        raise InputRefused(f"{branch.module}: {error}") from error
