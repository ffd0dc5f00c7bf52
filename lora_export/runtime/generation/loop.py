"""The loop of generation: a prompt, and then token after token until each text has ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_export.runtime.generation.decoder import Decoder
from lora_export.runtime.generation.sampling import Sampling

OnToken = Callable[[int, int], None]  # receives the number of the prompt and the token


@dataclass(frozen=True)
class TextLimits:
    """When a text ends: with one of these tokens, which belong to it, or when it has so many new tokens."""

    end_tokens: Collection[int]
    new_tokens: int
    padding: int = 0  # the token before shorter prompts; its value has no effect


def generate_tokens(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    limits: TextLimits,
    sampling: Sampling,
    on_token: OnToken,
    *,
    adapter: str | None = None,
    adapter_ids: Sequence[int] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, which are passed to `on_token` as they are chosen.

    The prompts run as one batch, padded on the left, or, where the graph takes no padding, in batches of one length.
    """
    ids = list(adapter_ids or [0] * len(prompts))
    generators = sampling.generators(len(prompts))
    texts: list[list[int]] = [[] for _ in prompts]
    for rows in _batches(prompts, takes_padding=decoder.takes_padding):
        run = decoder.start(len(rows), adapter, [ids[row] for row in rows])
        tokens, mask = _padded([prompts[row] for row in rows], limits.padding)
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        going = np.ones(len(rows), bool)
        for _ in range(limits.new_tokens):
            chosen = sampling.choose(run.step(tokens, mask, positions), [generators[row] for row in rows])
            for place in np.flatnonzero(going):
                token = int(chosen[place])
                texts[rows[place]].append(token)
                on_token(rows[place], token)
                going[place] = token not in limits.end_tokens
            if not going.any():
                break
            tokens = np.where(going, chosen, limits.padding)[:, None]
            mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)
            positions = positions[:, -1:] + 1
    return texts


def _batches(prompts: Sequence[Sequence[int]], *, takes_padding: bool) -> list[list[int]]:
    """The numbers of the prompts that run together."""
    if takes_padding:
        return [list(range(len(prompts)))]
    by_length: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(number)
    return list(by_length.values())


def _padded(prompts: Sequence[Sequence[int]], padding: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The prompts as one array with padding on the left, and its mask."""
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), padding, np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return tokens, mask
