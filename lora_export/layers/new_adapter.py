"""A new adapter for a module, ready to be trained: from random numbers, or from the weights themselves.

PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024) split W into W - s·B₀A₀ and s·B₀A₀, and train the second part. Here
W stays as it is: the pair that is trained has a frozen one beside it, (A₀, B₀, -s), so that a layer computes
W x + s·B A x - s·B₀A₀ x. This is what PEFT computes with the weights that it changes, needs no second copy of them, and
rounds nothing. What is saved is a plain pair of twice the rank, for the unchanged W: B A - B₀A₀ = [B | -B₀] [A; A₀].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lora_export.errors import InputRefused, listed
from lora_export.formats.patterns import Patterns
from lora_export.layers.adapter_targets import AdaptableWeight, AdaptableWeights, matches_ending, nearest
from lora_export.layers.frozen_linear import is_4bit
from lora_export.layers.module_tensors import as_array, input_embeddings, named_tensors, oriented
from lora_export.lora import Adapter, LoraPair, TokenRows, expert_name, new_pair
from lora_export.options.spelling import named
from lora_export.options.train import AdapterChoice, Init, TrainedBiases
from lora_export.plan import Layout


def create_adapter(
    module: nn.Module,
    *,
    targets: Literal["all-linear"] | Sequence[str],
    rank: int,
    alpha: float,
    seed: int,
    name: str = "default",
    target_pattern: str = "",
    target_parameters: Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dora: bool = False,
    dropout: float = 0.0,
    bias: TrainedBiases = AdapterChoice.bias,
    modules_to_save: Sequence[str] = (),
    token_indices: Sequence[int] = (),
    exclude: Sequence[str] = (),
    linear_only: bool = False,
) -> Adapter:
    """Create an adapter for this module that changes nothing until it is trained.

    A is Kaiming-uniform and B is zero; of an embedding, A is zero and B is normal, as in PEFT.

    `targets` are module names or their endings (`query` matches every `….query`), or "all-linear": every
    linear layer and packed attention projection, except a Hugging Face model's output embeddings. Convolutions and
    embeddings are adapted where they are named, unless `linear_only`. `target_pattern` is a regular expression for
    whole names. `target_parameters` are endings of stacked parameters (experts, ., .): each expert gets a pair.
    `modules_to_save` names modules, such as a classification head, that are trained and saved in full, with those whose
    whole names end so, as in PEFT; `exclude` names layers that get no pair. `token_indices` are rows of the input
    embeddings that are trained alone.

    The scale is alpha / rank, or alpha / √rank with `rslora`. `rank_pattern` and `alpha_pattern` map regular
    expressions to other ranks and alphas: the first that matches the end of a layer's name counts, as in PEFT. With
    `dora`, each pair gets the lengths of its weight's outputs. `bias` names the biases that are trained: those of the
    adapted layers, or all. `dropout` is recorded for `attach`.
    Raises InputRefused with every name that matches nothing, and the nearest names that would.
    """
    shapes = _Shapes(rank, alpha, rank_pattern or {}, alpha_pattern or {}, rslora=rslora)
    if not 0 <= dropout < 1:
        raise InputRefused(f"dropout {dropout}: it must be from 0 to below 1")
    weights = AdaptableWeights(module)
    wanted = () if targets == "all-linear" else tuple([targets] if isinstance(targets, str) else targets)
    weights.refuse_unmatched(modules_to_save, weights.modules, "module")
    weights.refuse_unmatched(exclude, weights.modules, "module")
    matched = weights.chosen(
        "all-linear" if targets == "all-linear" else wanted, target_pattern, target_parameters, linear_only=linear_only
    )
    saved, excluded = _saved_prefixes(modules_to_save, weights.modules), _prefixes(exclude, weights.modules)
    chosen = {path: one for path, one in matched.items() if not one.spec.name.startswith((*saved, *excluded))}
    if not chosen and not token_indices:
        raise InputRefused("no layer is left to adapt")
    if dora and (stacked := [name for name, one in chosen.items() if one.is_stacked]):
        raise InputRefused(f"DoRA has no meaning for stacked parameters: {', '.join(stacked)}")
    shapes.refuse_unmatched(chosen)
    trained = _trained_tensors(module, chosen, saved, bias)
    named_alone = wanted and chosen.keys() == matched.keys() and not (target_pattern or target_parameters)
    recorded: dict[str, Any] = {"bias": bias} if bias != "none" else {}
    recorded |= {"lora_dropout": dropout} if dropout else {}
    return Adapter(
        name=name,
        format="new",
        pairs=dict(_new_pairs(chosen, shapes, seed=seed, dora=dora)),
        replaced=trained,
        token_rows=_token_rows(module, token_indices) if token_indices else {},
        layouts={path: one.stored_layout for path, one in chosen.items() if one.is_linear},
        targets=wanted if named_alone else tuple(chosen),
        metadata={"r": rank, "lora_alpha": alpha, "use_rslora": rslora, **recorded},
    )


def full_rank_layers(adapter: Adapter) -> dict[str, str]:
    """The layers with fewer rows or columns than their rank, each in words.

    A and B have more numbers than they need.
    """
    return {
        name: f"`{name}` is {pair.shape[0]} × {math.prod(pair.shape[1:])}, its rank {pair.rank}"
        for name, pair in adapter.pairs.items()
        if pair.rank > min(pair.shape[0], math.prod(pair.shape[1:]))
    }


def tensors_of(module: nn.Module, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """All tensors of the modules to save that these names, or their endings, match."""
    return _tensors_below(module, _saved_prefixes(names, [path for path, _ in module.named_modules() if path]))


def _tensors_below(module: nn.Module, prefixes: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    found = {entry.name: entry.tensor for entry in named_tensors(module) if entry.name.startswith(prefixes)}
    if packed := [name for name, tensor in found.items() if is_4bit(tensor)]:
        raise InputRefused("weights in 4 bits are not trained as a whole:", listed(packed))
    return {name: as_array(tensor) for name, tensor in found.items()}


class _Shapes:
    """The rank and the scale of each layer."""

    def __init__(self, rank: int, alpha: float, ranks: Mapping[str, int], alphas: Mapping[str, float], *, rslora: bool):
        """Raises InputRefused for numbers that are not positive."""
        if rank < 1 or not 0 < alpha < math.inf:
            raise InputRefused(f"rank {rank} and alpha {alpha}: both must be positive")
        wrong = [f"the rank of `{pattern}` is {value}" for pattern, value in ranks.items() if value < 1]
        others = [
            f"the alpha of `{pattern}` is {value}" for pattern, value in alphas.items() if not 0 < value < math.inf
        ]
        if wrong := wrong or others:
            raise InputRefused(f"{', '.join(wrong)}: it must be positive")
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.tables = {
            what: (Patterns(table, source=f"the {what} pattern"), table)
            for what, table in {"rank": ranks, "alpha": alphas}.items()
        }

    def refuse_unmatched(self, names: Iterable[str]) -> None:
        names = list(names)
        problems = [
            f"the {what} pattern `{pattern}` matches the name of no adapted layer; the nearest: "
            f"{nearest(pattern, names)}"
            for what, (_, table) in self.tables.items()
            for pattern in table
            if not (what == "alpha" and pattern in self.tables["rank"][1])  # named once
            if not any(Patterns({pattern: 0}, source=f"the {what} pattern").values(name) for name in names)
        ]
        if problems:
            raise InputRefused("; ".join(problems))

    def of(self, name: str) -> tuple[int, float]:
        rank = int(self._value("rank", name, self.rank))
        alpha = self._value("alpha", name, self.alpha)
        return rank, alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def _value(self, what: str, name: str, default: float) -> float:
        return float(next(iter(self.tables[what][0].values(name)), default))


def _new_pairs(
    chosen: Mapping[str, AdaptableWeight], shapes: _Shapes, *, seed: int, dora: bool
) -> Iterator[tuple[str, LoraPair]]:
    rng = np.random.default_rng(seed)
    for path, one in chosen.items():
        rank, scale = shapes.of(path)
        options: dict[str, Any] = {"rank": rank, "scale": scale, "rng": rng}
        if one.is_stacked:
            for expert in range(one.spec.shape[0]):
                yield expert_name(path, expert), _expert_pair(one, options)
            continue
        is_table = one.spec.layout is Layout.EMBEDDING
        shape, lengths = one.spec.shape if is_table else one.spec.matrix, one.lengths if dora else None
        yield path, new_pair(shape, **options, magnitude=lengths, embedding=is_table)


def _expert_pair(one: AdaptableWeight, options: Mapping[str, Any]) -> LoraPair:
    """As stored. Some classes of transformers store an expert (in, out); PEFT's A is the factor of its inputs too."""
    first, second = one.spec.shape[1:]
    transposed = bool(getattr(one.owner, "is_transposed", False))
    pair = new_pair((second, first) if transposed else (first, second), **options)
    a, b = (pair.b.T, pair.a.T) if transposed else (pair.a, pair.b)
    return LoraPair(a=a, b=b, scale=pair.scale, as_stored=True)


def _trained_tensors(
    module: nn.Module, chosen: Mapping[str, AdaptableWeight], saved: tuple[str, ...], bias: TrainedBiases
) -> dict[str, NDArray[Any]]:
    """The tensors of saved modules, and the biases. As in PEFT, "all" is each parameter with `bias` in its name."""
    owners = {id(one.owner) for one in chosen.values()}
    return _tensors_below(module, saved) | {
        entry.name: as_array(entry.tensor)
        for entry in named_tensors(module)
        if (isinstance(entry.tensor, nn.Parameter) and bias == "all" and "bias" in entry.name)
        or (bias == "lora_only" and id(entry.owner) in owners and entry.attribute == "bias")
    }


def _token_rows(module: nn.Module, indices: Sequence[int]) -> dict[str, TokenRows]:
    """Rows of the input embeddings: those of a Hugging Face model, or the only table of another module."""
    tables = {path: part for path, part in module.named_modules() if isinstance(part, nn.Embedding)}
    if (own := input_embeddings(module)) is not None:
        tables = {path: part for path, part in tables.items() if part is own}
    if len(tables) != 1:
        found = ", ".join(tables) or "none"
        raise InputRefused(f"rows of tokens are trained in the one table of input embeddings; the module has {found}")
    ((path, table),) = tables.items()
    rows = table.weight.shape[0]
    if outside := [index for index in indices if not 0 <= index < rows]:
        raise InputRefused(f"there is no row {outside[0]} in {path}, which has {rows} rows")
    values = as_array(table.weight[list(indices)].float())
    return {f"{path}.weight": TokenRows(np.array(indices, np.int64), values)}


def _prefixes(names: Sequence[str], modules: Iterable[str]) -> tuple[str, ...]:
    """The prefixes of all tensor names in the modules that these names match."""
    return tuple(f"{path}." for path in modules if matches_ending(path, names))


def saved_modules(names: Sequence[str], modules: Sequence[str]) -> tuple[str, ...]:
    """The modules that these names, or their endings, match, and those whose names end with one of theirs.

    PEFT saves the latter too: DistilBERT's pre_classifier with its classifier.
    """
    chosen = tuple(path for path in modules if matches_ending(path, names))
    return tuple(path for path in modules if path.endswith(chosen))


def _saved_prefixes(names: Sequence[str], modules: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{path}." for path in saved_modules(names, modules))


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
