"""Adapters that are pairs of plain LoRA: what others contain more, and why it cannot be computed with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_export.errors import InputRefused, listed
from lora_export.lora import Adapter

WHY = {  # what no pair of plain LoRA expresses
    "magnitude": "has DoRA's magnitude, which rescales the whole weight",
    "as_stored": "is a bare parameter (target_parameters), which has no layer of LoRA",
    "replaced": "is saved whole",
    "biases": "has a bias of B",
    "added": "has a change of a vector, such as the weight of a norm",
    "token_rows": "has trained rows of tokens",
    "tied": "is tied to the input embeddings (ensure_weight_tying)",
}


def refuse_beyond_pairs(adapters: Sequence[Adapter], what: str, *, whole_ok: bool = False) -> None:
    """Raise InputRefused for what no pair of plain LoRA expresses. The message names all of it.

    `what` is the subject of the message. With `whole_ok`, tensors that are saved whole are allowed beside the pairs.
    """
    problems = [f"{adapter.name}: {problem}" for adapter in adapters for problem in _beyond_pairs(adapter, whole_ok)]
    if problems:
        raise InputRefused(f"{what} can contain pairs of A and B alone. Nothing was written.", listed(problems))


def _beyond_pairs(adapter: Adapter, whole_ok: bool) -> Iterator[str]:
    for kind, names in adapter.beyond_pairs.items():
        if names and not (whole_ok and kind == "replaced"):
            first, *others = names
            yield f"{first}{f' (and {len(others)} more)' if others else ''} {WHY[kind]}"
    if not adapter.pairs:
        yield "it has no pair"
