"""The tensors of an adapter, each with the base tensor that it changes, or with the reason why it fits none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, Misfit
from lora_export.lora import Adapter, LoraPair, TokenRows, is_weight_of
from lora_export.pairs import open_shape
from lora_export.pairs.open_shape import known_shape
from lora_export.plan.match_names import BaseTensors, Prefix, apart_or_both, weight_of
from lora_export.plan.stored_region import StoredRegion, overlapping
from lora_export.plan.types import Layout, LayoutSource, TensorSpec, Term

NO_WEIGHT = "the base has no weight for"
ITS_ROWS = "of which the adapter replaces rows"  # of a table that the base lacks


@dataclass(frozen=True, eq=False)
class Match:
    """One pair, bias, whole tensor or set of rows of an adapter, and the base tensor that it changes."""

    weight: str
    adapter: str
    prefix: Prefix
    term: Term | None = None
    shift: NDArray[np.float32] | None = None
    whole: NDArray[Any] | None = None
    rows: TokenRows | None = None
    repeated_by: tuple[str, ...] = ()  # tensors that the adapter changes equally, since they are tied


def match_adapter(
    adapter: Adapter, strength: float, prefix: Prefix, base: BaseTensors, *, may_add: bool
) -> tuple[list[Match], list[Misfit]]:
    """Every tensor of an adapter, as one that fits the base or one that does not."""
    matches: list[Match] = []
    misfits: list[Misfit] = []

    def sort(name: str, weight: str | None, problem: str, **change: Any) -> None:
        if weight is None or problem:
            misfits.append(Misfit(adapter.name, adapter.spelled(name), problem))
        else:
            matches.append(Match(weight, adapter.name, prefix, **change))

    for module, stored in adapter.pairs.items():
        weight = weight_of(prefix.to_base(module), base)
        if weight is None and _repeats(module, adapter, prefix, base):
            continue
        try:
            pair, problem = stored if weight is None else _laid_on(stored, base[weight]), ""
        except InputRefused as error:
            pair, problem = stored, str(error)
        problem = problem or _pair_problem(prefix.to_base(module) or module, weight, pair, base)
        repeated_by = tuple(f"{prefix.to_base(head) or head}.weight" for head in adapter.tied_to(module))
        term = Term(adapter.name, module, pair, strength, rslora=bool(adapter.metadata.get("use_rslora")))
        sort(module, weight, problem, term=term, repeated_by=repeated_by)
        bias = _bias_of(prefix.to_base(module) or module, base)
        if pair.bias is not None and bias in base and not problem:
            own = pair.bias.for_weight(base[bias].shape)
            why = "" if own.shape == base[bias].shape else f"{bias} is {base[bias].shape}, and the change {own.shape}"
            sort(f"{module}.bias", bias, why, term=Term(adapter.name, module, own, strength))
    for module, change in adapter.biases.items():
        if _is_packed(prefix.to_base(module), base) and not change.any():
            continue  # PEFT saves it, and never trains it
        bias = _bias_of(prefix.to_base(module) or module, base)
        sort(f"{module}.bias", bias, _bias_problem(bias, change, base), shift=np.float32(strength) * change)
    for tensor, change in adapter.added.items():
        name = prefix.to_base(tensor) or tensor
        sort(tensor, name, _vector_problem(name, change, base), shift=np.float32(strength) * change)
    for tensor, value in adapter.replaced.items():
        name = prefix.to_base(tensor) or tensor
        target = name if name in base else tensor
        if target not in base and _repeats(tensor.removesuffix(".weight"), adapter, prefix, base):
            continue
        sort(tensor, target, _replacement_problem(target, value, base, may_add=may_add), whole=value)
    for tensor, rows in adapter.token_rows.items():
        name = prefix.to_base(tensor) or tensor
        for table in (name, *_tied_tables(rows, base)):
            sort(tensor, table, _rows_problem(table, rows, base), rows=rows)
    return matches, misfits


def _laid_on(pair: LoraPair, spec: TensorSpec) -> LoraPair:
    """The pair in the shape of the weight, as far as it fits."""
    of_layer = pair.of_layer(transposed=spec.layout.is_transposed, embedding=spec.layout is Layout.EMBEDDING)
    return with_kernel_of(spec, of_layer.for_weight(resolved(spec, pair).matrix))


def with_kernel_of(spec: TensorSpec, pair: LoraPair) -> LoraPair:
    """A pair whose file has no kernel, or one that differs by axes of size 1, with the kernel that the base has."""
    return open_shape.with_kernel_like(spec.matrix, pair) if spec.layout.is_matrix else pair


def _repeats(module: str, adapter: Adapter, prefix: Prefix, base: BaseTensors) -> bool:
    """Whether a module repeats the change of another one, whose weight the base has: the two are tied."""
    return module in adapter.tied and weight_of(prefix.to_base(adapter.tied[module]), base) is not None


def _tied_tables(rows: TokenRows, base: BaseTensors) -> list[str]:
    """The further tables that get the same rows, where the base stores them: a tied model may store one table."""
    return [name for name in base for module in rows.tied if is_weight_of(name, module)]


def resolved(spec: TensorSpec, pair: LoraPair) -> TensorSpec:
    """The spec with its layout, where only the pair tells an embedding from a linear layer."""
    is_open = spec.layout in (Layout.MATRIX, Layout.UNKNOWN) or spec.layout_source is not LayoutSource.BASE
    if pair.embedding and is_open:
        return replace(spec, layout=Layout.EMBEDDING, layout_source=LayoutSource.BASE)
    return replace(spec, layout=Layout.OUT_IN) if spec.layout is Layout.MATRIX else spec


# --- Why a tensor does not fit; an empty string where it does ---


def _pair_problem(module: str, weight: str | None, pair: LoraPair, base: BaseTensors) -> str:
    if weight is None:
        return base.stored_as(f"{module}.weight") or f"{NO_WEIGHT} {module}{base.nearest(module)}"
    spec = base[weight]
    if not spec.is_float:
        return (
            f"{weight} is {spec.dtype}: a quantised weight is never merged silently. Use the original float base, "
            "or dequantise this one first"
        )
    if spec.layout is Layout.OTHER:
        return f"{weight} {spec.shape} is not the weight of a linear layer, a convolution or an embedding"
    spec = resolved(spec, pair)
    if spec.layout is Layout.UNKNOWN:
        fits = known_shape(pair) in (spec.shape, spec.shape[::-1], ())  # () is open, as its layout is
        return "" if fits else f"{weight} is {spec.shape}, the adapter was trained on {pair.shape} (out, in)"
    if pair.embedding is not (spec.layout is Layout.EMBEDDING):
        kinds = ("a linear layer", "an embedding") if pair.embedding else ("an embedding", "a linear layer")
        return f"{weight} is the weight of {kinds[0]}, the adapter was trained on {kinds[1]}"
    if spec.matrix != pair.shape:
        view = "(width, rows)" if pair.embedding else "(out, in)"
        shape = str(pair.shape).replace("(0,", "(any,").replace(" 0", " any")
        return f"{weight} is {spec.matrix} {view}, the adapter was trained on {shape}"
    return ""


def _is_packed(module: str | None, base: Mapping[str, TensorSpec]) -> bool:
    """Whether the weight of a module is the packed projection of nn.MultiheadAttention."""
    return (weight_of(module, base) or "").endswith(".in_proj_weight")


def _bias_of(module: str, base: Mapping[str, TensorSpec]) -> str:
    """The bias of a module; the name itself, where it is that of a part of a stored bias."""
    return module if module in base and base[module].region is not None else f"{module}.bias"


def _bias_problem(bias: str, change: NDArray[np.float32], base: Mapping[str, TensorSpec]) -> str:
    if _is_packed(bias.removesuffix(".bias"), base):
        return (
            "PEFT up to 0.21 does not use the bias of B at the packed projection of nn.MultiheadAttention, and here it "
            "is not zero: whether it belongs to the result is unknown"
        )
    if bias not in base:
        return f"the base has no {bias}, which the adapter changes"
    if base[bias].shape != change.shape:
        return f"the base's {bias} has shape {base[bias].shape}, the adapter adds {change.shape}"
    return ""


def _vector_problem(name: str, change: NDArray[np.float32], base: BaseTensors) -> str:
    if name not in base:
        return f"the base has no {name}, which the adapter changes{base.nearest(name)}"
    if base[name].shape != change.shape or not base[name].is_float:
        return f"{name} is {base[name].shape} {base[name].dtype}, the adapter adds {change.shape} to it"
    return ""


def _rows_problem(name: str, rows: TokenRows, base: BaseTensors) -> str:
    if name not in base:
        return base.stored_as(name) or f"the base has no {name}, {ITS_ROWS}{base.nearest(name)}"
    shape = base[name].shape
    if not base[name].is_float or len(shape) != 2 or shape[1:] != rows.values.shape[1:]:
        return f"{name} is {shape} {base[name].dtype}, the adapter replaces rows of {rows.values.shape[1]} floats"
    if rows.indices.max() >= shape[0]:
        return f"{name} has {shape[0]} rows, the adapter replaces row {rows.indices.max()}"
    return ""


def _replacement_problem(name: str, value: NDArray[Any], base: BaseTensors, *, may_add: bool) -> str:
    if name not in base:
        return "" if may_add else f"the base has no {name}, which the adapter replaces{base.nearest(name)}"
    if base[name].shape != value.shape:
        return f"{name} is {base[name].shape}, the adapter replaces it with {value.shape}"
    return ""


# --- A base with fewer words: the adapter was trained after new words were added to the model ---


def resizing_remedy(adapters: Sequence[Adapter], prefixes: Sequence[Prefix], base: Mapping[str, TensorSpec]) -> str:
    """What to do where the tables of an adapter have another number of rows than the base's; empty where none has."""
    for adapter, prefix in zip(adapters, prefixes, strict=True):
        for tensor, rows in _tables(adapter, prefix, base):
            own = base[tensor].shape[0]
            if rows == own:
                continue
            sizes = f"{adapter.name} was trained with {rows:,} words, and {tensor} has {own:,}."
            if rows > own and tensor not in [prefix.to_base(name) or name for name in adapter.replaced]:
                return f"{sizes} The adapter has no rows for the new words: save it with save_embedding_layers=True"
            return (
                f"{sizes} Resize the base first: load it in transformers, resize_token_embeddings({rows}), "
                "save_pretrained. Its tokenizer needs the new words too"
            )
    return ""


def _tables(adapter: Adapter, prefix: Prefix, base: Mapping[str, TensorSpec]) -> Iterator[tuple[str, int]]:
    """Tables of words of the base that the adapter changes, with the rows that they had in training.

    A table is a tensor that the adapter has a pair of embeddings for, or replaces by one of as many columns.
    """
    for module, pair in adapter.pairs.items():
        weight = weight_of(prefix.to_base(module), base)
        if weight is not None and pair.embedding and weight in base and base[weight].shape[1:] == pair.shape[:1]:
            yield weight, pair.shape[1]
    for name, value in adapter.replaced.items():
        tensor = prefix.to_base(name) or name
        if tensor in base and value.ndim == 2 and base[tensor].shape[1:] == value.shape[1:]:
            yield tensor, value.shape[0]


# --- Why tensors of adapters cannot change the same base tensor together, or one that has two names ---


def conflicts(matches: Sequence[Match]) -> list[Misfit]:
    """The conflicts among matches of one base tensor.

    Whole tensors conflict where they differ or others add to them, rows where two adapters replace the same one, pairs
    where one rescales the sum or they were trained on different kinds of layers, shifts of a bias with any pair of it.
    """
    found = (*_of_wholes(matches), *_of_rows(matches), *_of_pairs(matches), *_of_shifts(matches))
    return [replace(misfit, is_conflict=True) for misfit in found]


def broken_ties(by_weight: Mapping[str, Sequence[Match]], base: BaseTensors) -> Iterator[Misfit]:
    """Changes of a tensor that is stored once under several names, where a name's own tensor does not change.

    If the parameters were trained apart, they would be two tensors. Rows of tokens are allowed: where parameters are
    tied, PEFT trains them for both.
    """
    for weight, matches in by_weight.items():
        aliases = base[weight].aliases if weight in base else ()
        unchanged = [
            alias
            for alias in aliases
            if alias not in by_weight and not all(alias in match.repeated_by for match in matches)
        ]
        if unchanged and any(match.rows is None for match in matches):
            why = (
                f"{weight} is {' and '.join(unchanged)} too (the header of the file ties them), which the adapter does "
                f"not change. {apart_or_both(can_untie=base.can_untie)}"
            )
            yield Misfit(matches[0].adapter, weight, why)


def overlapping_parts(by_weight: Mapping[str, Sequence[Match]], base: Mapping[str, TensorSpec]) -> Iterator[Misfit]:
    """Changes of parts of a stored tensor that are changes of the whole, or of an overlapping part, too.

    They are spelled differently: one adapter has q, k and v, another one a fused q|k|v.
    """
    parts: dict[str, dict[str, StoredRegion]] = {}
    for weight in by_weight:
        if weight in base and (region := base[weight].region) is not None:
            parts.setdefault(base[weight].stored_name, {})[weight] = region
    for tensor, regions in parts.items():
        wholes = [(weight, tensor) for weight in regions] if tensor in by_weight else []
        for weight, other in (*wholes, *overlapping(regions)):
            why = (
                f"{by_weight[weight][0].adapter} changes {weight}, and {by_weight[other][0].adapter} changes "
                f"{other}, which has entries of it. Merge one adapter, then the other into the result"
            )
            yield Misfit(by_weight[weight][0].adapter, weight, why)


def _what_depends(pair: LoraPair) -> str:
    return f"{pair.kind}'s change follows from the weight" if pair.needs_weight else "DoRA rescales the whole sum"


def _of_wholes(matches: Sequence[Match]) -> Iterator[Misfit]:
    owner, whole = next(((match, match.whole) for match in matches if match.whole is not None), (None, None))
    if owner is None or whole is None:
        return
    name, first = owner.weight, owner.adapter
    have_whole = {match.adapter for match in matches if match.whole is not None}
    for other in matches:
        if other.whole is not None:
            if not np.array_equal(other.whole, whole):
                why = f"{first} also replaces {name}, with other values. Merge only one of these adapters"
                yield Misfit(other.adapter, name, why)
        elif other.adapter not in have_whole:
            # What an adapter adds to its own whole tensor is no conflict: PEFT saves embeddings that it adapts, and
            # biases beside `lora_bias`.
            does = "adds to it" if other.rows is None else "replaces rows of it"
            why = f"{first} replaces the whole {name}, and {other.adapter} {does}. Merge only one of these adapters"
            yield Misfit(first, name, why)


def _of_rows(matches: Sequence[Match]) -> Iterator[Misfit]:
    with_rows = [(match, match.rows) for match in matches if match.rows is not None]
    owners: dict[int, str] = {}
    for match, rows in with_rows:
        shared = sorted(set(rows.indices.tolist()) & owners.keys())
        if shared:
            why = f"{owners[shared[0]]} also replaces rows of {match.weight}, for example row {shared[0]}"
            yield Misfit(match.adapter, match.weight, f"{why}. Merge only one of these adapters")
        owners |= dict.fromkeys(rows.indices.tolist(), match.adapter)
    if with_rows:
        owner = with_rows[0][0]
        for other in matches:
            if other.term is not None:
                why = f"{owner.adapter} replaces rows of {owner.weight}, and {other.adapter} adds to it"
                why += ". Merge only one of these adapters"
                if other.adapter == owner.adapter:
                    why = f"{owner.adapter} replaces rows of {owner.weight}, and adds to it: no merge does both"
                yield Misfit(owner.adapter, owner.weight, why)


def _of_pairs(matches: Sequence[Match]) -> Iterator[Misfit]:
    terms = [match.term for match in matches if match.term is not None]
    for term in terms[1:]:
        name, first = matches[0].weight, terms[0]
        if first.pair.embedding is not term.pair.embedding:
            kinds = {True: "an embedding", False: "a linear layer"}
            why = (
                f"{term.adapter} was trained with {name} as {kinds[term.pair.embedding]}, "
                f"{first.adapter} as {kinds[first.pair.embedding]}"
            )
            yield Misfit(term.adapter, name, why)
        elif deciding := next((one.pair for one in (first, term) if one.pair.depends_on_weight), None):
            yield Misfit(term.adapter, name, _in_either_order(first.adapter, term.adapter, name, deciding))


def _of_shifts(matches: Sequence[Match]) -> Iterator[Misfit]:
    """A pair of a bias scales it, so that what is added before differs from what is added after."""
    first = next((match.term for match in matches if match.term is not None), None)
    for other in matches:
        if first is not None and other.shift is not None:
            why = _in_either_order(first.adapter, other.adapter, other.weight, first.pair)
            yield Misfit(other.adapter, other.weight, why)


def _in_either_order(one: str, other: str, weight: str, deciding: LoraPair) -> str:
    return (
        f"{one} and {other} both change {weight}, and {_what_depends(deciding)}, so the result depends on their order. "
        "To choose an order, merge one adapter, then the other into the result"
    )
