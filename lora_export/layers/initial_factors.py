"""Pairs that start from the weights themselves: PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024).

Both split W into W - s·B₀A₀ and s·B₀A₀, and train the second part. Here W stays as it is: the pair that is trained has
a frozen one beside it, (A₀, B₀, -s), so that a layer computes W x + s·B A x - s·B₀A₀ x. This is what PEFT computes with
the weights that it changes, needs no second copy of them, and rounds nothing.

What is saved is a plain pair of twice the rank, for the unchanged W: B A - B₀A₀ = [B | -B₀] [A; A₀].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from lora_export.errors import InputRefused, listed
from lora_export.layers.adapter_targets import AdaptableWeight, AdaptableWeights
from lora_export.layers.module_tensors import as_array, oriented
from lora_export.layers.new_adapter import full_rank_layers
from lora_export.lora import Adapter, LoraPair
from lora_export.options.spelling import named
from lora_export.options.train import Init

STARTING_POINT = "start"  # the name of the adapter of frozen pairs
SMALLEST = 1e-7  # of the largest singular value: fp32 cannot tell less from zero
OnLayer = Callable[[int, int], None]  # (layers done, layers in all)


def started_from_weights(
    module: torch.nn.Module, adapter: Adapter, init: Init, *, on_layer: OnLayer | None = None
) -> Adapter:
    """The adapter with A and B that come from the weights of its layers. Takes one decomposition for each layer.

    With "pissa", s·B A is made of the largest singular values of W, and A and B have equal shares of them. With
    "olora", B and A are the first columns of Q and rows of R, from W = Q R. A weight counts as (out, in · kernel).
    Raises InputRefused for a rank that is larger than a layer, for stacked parameters, and for weights with NaN.
    """
    if init == "default":
        return adapter
    if small := full_rank_layers(adapter):
        raise InputRefused(
            f"the weights have too few directions for their rank ({named('init', init)}):", listed(list(small.values()))
        )
    layers = AdaptableWeights(module).layers
    if stacked := [name for name in adapter.pairs if name not in layers]:
        raise InputRefused(
            f"only layers start from their weights ({named('init', init)}), not parts of:", listed(stacked)
        )
    pairs = {}
    for done, (name, pair) in enumerate(adapter.pairs.items(), 1):
        pairs[name] = _started(layers[name], pair, DECOMPOSITIONS[init])
        if on_layer is not None:
            on_layer(done, len(adapter.pairs))
    metadata = {**adapter.metadata, "init": init}
    return dataclasses.replace(adapter, pairs=pairs, metadata=metadata)


def _started(layer: AdaptableWeight, pair: LoraPair, factors_of: Callable[..., tuple[Tensor, Tensor]]) -> LoraPair:
    weight = oriented(layer.values, layer.spec.layout).float().flatten(1)  # (out, in * kernel)
    if not weight.isfinite().all():
        raise InputRefused(f"{layer.spec.name} has values that are not finite, and has no singular values then")
    a, b = factors_of(weight, pair.rank, pair.scale)
    return dataclasses.replace(pair, a=as_array(a).reshape(pair.a.shape), b=as_array(b).reshape(pair.b.shape))


def _largest_singular(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank), whose product times the scale is the nearest to W of this rank.

    Of the shorter side, the eigenvectors of W Wᵀ in fp64: as exact as a decomposition of W in fp32, and faster.
    """
    is_wide = weight.shape[0] <= weight.shape[1]
    short = (weight if is_wide else weight.T).double()
    squares, vectors = torch.linalg.eigh(short @ short.T)  # in rising order
    values, left = squares[-rank:].flip(0).clamp(min=0).sqrt(), vectors[:, -rank:].flip(1)
    has_direction = values > SMALLEST * values[0]  # the others are noise, and have no other side
    right = torch.where(has_direction[:, None], left.T @ short / values[:, None], 0.0)
    roots = torch.where(has_direction, values / scale, 0.0).sqrt()
    if not is_wide:
        left, right = right.T, left.T
    return (roots[:, None] * right).float(), (left * roots).float()


def _first_orthogonal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - one signature
    """A (rank, in) and B (out, rank). As in PEFT, the scale multiplies their product and does not divide it.

    The first columns of Q depend on as many columns of W alone.
    """
    q, _ = torch.linalg.qr(weight[:, :rank])
    return q.T @ weight, q


Decomposition = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]
DECOMPOSITIONS: Mapping[str, Decomposition] = {"pissa": _largest_singular, "olora": _first_orthogonal}


def frozen_start(started: Adapter) -> Adapter:
    """The adapter that takes away what `started` adds, to be attached frozen beside it."""
    pairs = {name: dataclasses.replace(pair, scale=-pair.scale) for name, pair in started.pairs.items()}
    return Adapter(name=STARTING_POINT, format="new", pairs=pairs, layouts=dict(started.layouts))


def as_plain_lora(trained: Adapter, started: Adapter) -> Adapter:
    """The change that training made, for the unchanged base: pairs of twice the rank, with the same scale.

    A pair that training left as it was has B = 0.
    """
    pairs = {name: _difference(pair, started.pairs[name]) for name, pair in trained.pairs.items()}
    rank, alpha = started.metadata["r"], started.metadata["lora_alpha"]
    factor = math.sqrt(2) if started.metadata.get("use_rslora") else 2
    init = f"{started.metadata['init']} of rank {rank}"
    metadata = {**trained.metadata, "r": 2 * rank, "lora_alpha": factor * alpha, "init": init}
    return dataclasses.replace(trained, pairs=pairs, metadata=metadata)


def _difference(trained: LoraPair, started: LoraPair) -> LoraPair:
    a = np.concatenate([trained.a, started.a])
    b = np.concatenate([trained.b, -started.b], axis=1)
    if np.array_equal(trained.a, started.a) and np.array_equal(trained.b, started.b):
        b = np.zeros_like(b)  # the product of equal halves would be rounded, and not be zero
    return dataclasses.replace(trained, a=a, b=b)
