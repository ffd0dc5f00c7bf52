"""The loop of generation: what is given first, and then token after token until each text has ended.

A token is chosen from a model's logits by a generation config's rules, and is the best one or a draw.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.runtime.generation.decoder import Decoder, EncoderDecoderRun
from lora_export.runtime.onnx_runner import token_positions


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. A temperature of 0 takes the most probable token.

    Otherwise a token is drawn from softmax(logits / temperature), of the most probable tokens whose probabilities add
    up to `top_p`. Each row of a batch has its own stream of random numbers: `seed` and the row's number determine it,
    so that a row does not depend on its neighbours. `GenerateOptions` has checked the values.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def generators(self, rows: int) -> list[np.random.Generator]:
        """The random numbers of each row."""
        return [np.random.default_rng([self.seed, row]) for row in range(rows)]

    def choose(self, logits: NDArray[np.floating], generators: list[np.random.Generator]) -> NDArray[np.int64]:
        """One token for each row of `logits` [batch, vocabulary].

        Raises InputRefused where a row has NaN, or no finite largest value.
        """
        if not np.isfinite(logits.max(axis=1)).all():
            raise InputRefused(
                "no token can be chosen: the largest logit is NaN or infinite, in the output of the graph or "
                "after the rules of the generation config"
            )
        if self.temperature == 0:
            best: NDArray[np.int64] = np.argmax(logits, axis=1)
            return best
        drawn = [self._draw(row, generator) for row, generator in zip(logits, generators, strict=True)]
        return np.array(drawn, np.int64)

    def _draw(self, logits: NDArray[np.floating], generator: np.random.Generator) -> int:
        wide = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # a tiny temperature makes all but the largest -inf
            scaled = (wide - wide.max()) / self.temperature
        order = np.argsort(-scaled, kind="stable")
        probabilities = np.exp(scaled[order])
        probabilities /= probabilities.sum()
        # The token that reaches top_p is the last one that may be drawn.
        count = int(np.searchsorted(np.cumsum(probabilities), self.top_p)) + 1
        kept = probabilities[:count] / probabilities[:count].sum()
        return int(order[generator.choice(len(kept), p=kept)])


@dataclass(frozen=True)
class TokenRules:
    """Rules of transformers' generation config, by its names, in the order in which it applies them.

    `repetition_penalty` divides the logits of tokens that a text contains, or multiplies negative ones.
    `no_repeat_ngram_size` n forbids a token that would end a sequence of n tokens that the text contains. `forced_bos`
    is the token after a single given one, and one of `forced_eos` the last. `suppress` is never chosen, and
    `begin_suppress` not as the first.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    forced_bos: int | None = None
    forced_eos: Collection[int] = ()
    suppress: Collection[int] = ()
    begin_suppress: Collection[int] = ()

    def apply(
        self, logits: NDArray[np.floating], texts: Sequence[Sequence[int]], number: int, *, is_last: bool
    ) -> NDArray[np.float32]:
        """The logits [batch, vocabulary] by which the new token `number`, from 0 on, is chosen.

        They are float32, as in transformers: half precision would round penalised logits to equal ones. `texts` has
        the tokens of each row so far, and no row depends on another one. With `is_last`, no token may follow.

        Raises InputRefused for a forced token that the model does not have.
        """
        logits = logits.astype(np.float32)
        for row, text in zip(logits, texts, strict=True):
            self._penalise(row, text)
            forces_bos = self.forced_bos is not None and len(text) - number == 1
            if forces_bos and number == 0:
                _keep_only(row, [self.forced_bos or 0])
            if is_last and self.forced_eos:
                _keep_only(row, self.forced_eos)
            begins = number == (1 if forces_bos else 0)
            suppressed = (*self.suppress, *(self.begin_suppress if begins else ()))
            row[[token for token in suppressed if token < len(row)]] = -np.inf
        return logits

    def _penalise(self, logits: NDArray[np.float32], text: Sequence[int]) -> None:
        """Change the logits [vocabulary] of one row by the tokens that its text has."""
        if self.repetition_penalty != 1.0:
            used = np.unique(text)
            own = logits[used]
            logits[used] = np.where(own < 0, own * self.repetition_penalty, own / self.repetition_penalty)
        if size := self.no_repeat_ngram_size:
            begin = list(text[len(text) - size + 1 :]) if size > 1 else []
            ends = [
                text[place + size - 1]
                for place in range(len(text) - size + 1)
                if list(text[place : place + size - 1]) == begin
            ]
            logits[ends] = -np.inf


NO_RULES = TokenRules()


def _keep_only(logits: NDArray[np.float32], tokens: Collection[int]) -> None:
    if unknown := [token for token in tokens if token >= len(logits)]:
        raise InputRefused(f"the generation config forces the token {unknown[0]}; the model has 0 to {len(logits) - 1}")
    logits[:] = -np.inf
    logits[list(tokens)] = 0


# --- the loop ---

OnToken = Callable[[int, int], None]  # receives the number of the prompt and the token


class Run(Protocol):
    """One batch of texts, with its cache."""

    def step(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.floating]:
        """Run the next tokens; return the logits of the last one, [batch, vocabulary].

        `ids` and `positions` are [batch, tokens], `mask` [batch, all positions so far].
        """

    def restart(self) -> None:
        """Forget all tokens of the texts."""


@dataclass(frozen=True)
class TextLimits:
    """When a text ends: with one of these tokens, which belong to it, or when it has so many new tokens.

    With the first token beyond `recomputed_beyond`, all tokens of a text are computed again.
    """

    end_tokens: Collection[int]
    new_tokens: int
    padding: int = 0  # the token before shorter prompts; its value has no effect
    rules: TokenRules = NO_RULES
    recomputed_beyond: int | None = None

    def may_recompute(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether a text may become so long that its tokens are computed otherwise."""
        reached = max(map(len, prompts)) + self.new_tokens
        return self.recomputed_beyond is not None and reached > self.recomputed_beyond


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

    The prompts run as one batch, padded on the left, or, where the graph takes no padding, or the length of a text
    changes how its tokens are computed, in batches of one length.
    """
    ids = list(adapter_ids or [0] * len(prompts))
    batches = _batches(prompts, takes_padding=decoder.takes_padding and not limits.may_recompute(prompts))
    runs = ((rows, decoder.start(len(rows), adapter, [ids[row] for row in rows])) for rows in batches)
    return _in_batches(runs, prompts, limits, sampling, on_token)


def generate_from_encoder(
    run: EncoderDecoderRun, starts: Sequence[Sequence[int]], limits: TextLimits, sampling: Sampling, on_token: OnToken
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


def generate_in_run(
    run: Run, prompts: Sequence[Sequence[int]], limits: TextLimits, sampling: Sampling, on_token: OnToken
) -> list[list[int]]:
    """The new tokens of each prompt, all of which run as one batch, padded on the left."""
    return _in_batches([(range(len(prompts)), run)], prompts, limits, sampling, on_token)


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
        _generate(run, rows, given, texts, limits, sampling, [generators[row] for row in rows], on_token)
    return texts


def _generate(
    run: Run,
    numbers: Sequence[int],
    given: Sequence[Sequence[int]],
    texts: list[list[int]],
    limits: TextLimits,
    sampling: Sampling,
    generators: list[np.random.Generator],
    on_token: OnToken,
) -> None:
    """Add the new tokens of the texts with these numbers, which are the rows of one batch, to `texts`."""
    tokens, mask = _padded([given[number] for number in numbers], limits.padding)
    positions = token_positions(mask)
    going = np.ones(len(numbers), bool)
    whole = tokens
    for count in range(limits.new_tokens):
        if count and mask.shape[1] - 1 == limits.recomputed_beyond:
            run.restart()
            tokens, positions = whole, token_positions(mask)
        logits = run.step(tokens, mask, positions)
        if limits.rules != NO_RULES:
            so_far = [[*given[number], *texts[number]] for number in numbers]
            logits = limits.rules.apply(logits, so_far, count, is_last=count == limits.new_tokens - 1)
        chosen = sampling.choose(logits, generators)
        for row in np.flatnonzero(going):
            number, token = numbers[int(row)], int(chosen[row])
            texts[number].append(token)
            on_token(number, token)
            going[row] = token not in limits.end_tokens
        if not going.any():
            break
        tokens = np.where(going, chosen, limits.padding)[:, None]
        whole = np.concatenate([whole, tokens], axis=1)
        mask = np.concatenate([mask, np.ones((len(numbers), 1), np.int64)], axis=1)
        positions = positions[:, -1:] + 1


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
