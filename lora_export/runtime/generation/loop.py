"""The loop of generation: what is given first, and then token after token until each text has ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lora_export.runtime.generation.decoder import Decoder
from lora_export.runtime.generation.encoder_decoder import EncoderDecoderRun
from lora_export.runtime.generation.sampling import NO_RULES, Sampling, TokenRules

OnToken = Callable[[int, int], None]  # receives the number of the prompt and the token


class Run(Protocol):
    """One batch of texts, with its cache."""

    def step(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.floating]:
        """Run the next tokens; return the logits of the last one, [batch, vocabulary].

        `ids` and `positions` are [batch, tokens], `mask` [batch, all positions so far].
        """


@dataclass(frozen=True)
class TextLimits:
    """When a text ends: with one of these tokens, which belong to it, or when it has so many new tokens."""

    end_tokens: Collection[int]
    new_tokens: int
    padding: int = 0  # the token before shorter prompts; its value has no effect
    rules: TokenRules = NO_RULES


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
    batches = _batches(prompts, takes_padding=decoder.takes_padding)
    runs = ((rows, decoder.start(len(rows), adapter, [ids[row] for row in rows])) for rows in batches)
    return _in_batches(runs, prompts, limits, sampling, on_token)


def generate_from_encoder(
    run: EncoderDecoderRun,
    starts: Sequence[Sequence[int]],
    limits: TextLimits,
    sampling: Sampling,
    on_token: OnToken,
) -> list[list[int]]:
    """The new tokens of each row that the encoder has read, after the tokens with which its text starts.

    Texts that start with as many tokens run as one batch: the decoder takes no padding.
    """
    batches = _batches(starts, takes_padding=False)
    return _in_batches(
        [(rows, run if len(batches) == 1 else run.of_rows(rows)) for rows in batches],
        starts,
        limits,
        sampling,
        on_token,
    )


def _in_batches(
    runs: Iterable[tuple[Sequence[int], Run]],
    given: Sequence[Sequence[int]],
    limits: TextLimits,
    sampling: Sampling,
    on_token: OnToken,
) -> list[list[int]]:
    """The new tokens of each text. `runs` has the numbers of the texts of each batch, and its run."""
    generators = sampling.generators(len(given))
    texts: list[list[int]] = [[] for _ in given]
    for rows, run in runs:
        own = _Texts(run, [given[row] for row in rows], limits, sampling, [generators[row] for row in rows])
        for row, text in zip(rows, own.generate(_of_rows(rows, on_token)), strict=True):
            texts[row] = text
    return texts


class _Texts:
    """The texts of one batch."""

    def __init__(
        self,
        run: Run,
        given: Sequence[Sequence[int]],
        limits: TextLimits,
        sampling: Sampling,
        generators: Sequence[np.random.Generator],
    ):
        self.run, self.given, self.limits = run, given, limits
        self.sampling, self.generators = sampling, list(generators)

    def generate(self, on_token: OnToken) -> list[list[int]]:
        """The new tokens of each row."""
        limits, rows = self.limits, len(self.given)
        texts: list[list[int]] = [[] for _ in range(rows)]
        tokens, mask = _padded(self.given, limits.padding)
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        going = np.ones(rows, bool)
        for number in range(limits.new_tokens):
            logits = self.run.step(tokens, mask, positions)
            if limits.rules != NO_RULES:
                so_far = [[*given, *text] for given, text in zip(self.given, texts, strict=True)]
                logits = limits.rules.apply(logits, so_far, number, is_last=number == limits.new_tokens - 1)
            chosen = self.sampling.choose(logits, self.generators)
            for row in np.flatnonzero(going):
                token = int(chosen[row])
                texts[row].append(token)
                on_token(int(row), token)
                going[row] = token not in limits.end_tokens
            if not going.any():
                break
            tokens = np.where(going, chosen, limits.padding)[:, None]
            mask = np.concatenate([mask, np.ones((rows, 1), np.int64)], axis=1)
            positions = positions[:, -1:] + 1
        return texts


def _of_rows(rows: Sequence[int], on_token: OnToken) -> OnToken:
    """Pass a token on with the number of its prompt in place of that of its row."""
    return lambda row, token: on_token(rows[row], token)


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
