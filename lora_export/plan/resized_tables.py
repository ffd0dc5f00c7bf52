"""Why an adapter does not fit a base with fewer words: it was trained after new words were added to the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lora_export.lora import Adapter
from lora_export.plan.match_names import Prefix, weight_of
from lora_export.plan.types import TensorSpec


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
