"""Adapters that are pairs of plain LoRA: what others contain more, and why it cannot be computed with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from lora_export.errors import InputRefused, listed
from lora_export.lora import Adapter


def refuse_beyond_pairs(adapters: Sequence[Adapter], what: str, *, whole_ok: bool = False) -> None:
    """Raise InputRefused for what no pair of plain LoRA expresses. The message names all of it.

    `what` is the subject of the message. With `whole_ok`, tensors that are saved whole are allowed beside the pairs.
    """
    problems = [f"{adapter.name}: {problem}" for adapter in adapters for problem in _beyond_pairs(adapter, whole_ok)]
    if problems:
        raise InputRefused(f"{what} can contain pairs of A and B alone. Nothing was written.", listed(problems))


def _beyond_pairs(adapter: Adapter, whole_ok: bool) -> Iterator[str]:
    dora = [module for module, pair in adapter.pairs.items() if pair.magnitude is not None]
    bare = [module for module, pair in adapter.pairs.items() if pair.as_stored]
    reasons: list[tuple[Iterable[str], str]] = [
        (dora, "has DoRA's magnitude, which rescales the whole weight"),
        (bare, "is a bare parameter (target_parameters), which has no layer of LoRA"),
        ([] if whole_ok else adapter.replaced, "is saved whole"),
        (adapter.biases, "has a bias of B"),
        (adapter.token_rows, "has trained rows of tokens"),
        (adapter.tied, "is tied to the input embeddings (ensure_weight_tying)"),
    ]
    for names, why in reasons:
        if names := list(names):
            first, *others = names
            yield f"{first}{f' (and {len(others)} more)' if others else ''} {why}"
    if not adapter.pairs:
        yield "it has no pair"
