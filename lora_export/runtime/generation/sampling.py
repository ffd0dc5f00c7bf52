"""The choice of the next token from a model's logits: a generation config's rules, then the best token or a draw."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import WrongUsage


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. A temperature of 0 takes the most probable token.

    Otherwise a token is drawn from softmax(logits / temperature), of the most probable tokens whose probabilities add
    up to `top_p`. Each row of a batch has its own stream of random numbers: `seed` and the row's number determine it,
    so that a row does not depend on its neighbours.

    Raises WrongUsage for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (np.isfinite(self.temperature) and self.temperature >= 0):
            raise WrongUsage(f"the temperature is {self.temperature:g}; it has to be 0 or more")
        if not 0 < self.top_p <= 1:
            raise WrongUsage(f"top_p is {self.top_p:g}; it has to be more than 0 and at most 1")
        if self.seed < 0:
            raise WrongUsage(f"the seed is {self.seed}; it has to be 0 or more")

    def generators(self, rows: int) -> list[np.random.Generator]:
        """The random numbers of each row."""
        return [np.random.default_rng([self.seed, row]) for row in range(rows)]

    def choose(self, logits: NDArray[np.floating], generators: list[np.random.Generator]) -> NDArray[np.int64]:
        """One token for each row of `logits` [batch, vocabulary]."""
        if self.temperature == 0:
            best: NDArray[np.int64] = np.argmax(logits, axis=1)
            return best
        drawn = [self._draw(row, generator) for row, generator in zip(logits, generators, strict=True)]
        return np.array(drawn, np.int64)

    def _draw(self, logits: NDArray[np.floating], generator: np.random.Generator) -> int:
        scaled = logits.astype(np.float64) / self.temperature
        order = np.argsort(-scaled, kind="stable")
        probabilities = np.exp(scaled[order] - scaled[order[0]])
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
    is the token after a single given one, and `forced_eos` the last. `suppress` is never chosen, and `begin_suppress`
    not as the first.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    forced_bos: int | None = None
    forced_eos: int | None = None
    suppress: Collection[int] = ()
    begin_suppress: Collection[int] = ()

    def apply(
        self, logits: NDArray[np.floating], texts: Sequence[Sequence[int]], number: int, *, is_last: bool
    ) -> NDArray[np.floating]:
        """The logits [batch, vocabulary] by which the new token `number`, from 0 on, is chosen.

        `texts` has the tokens of each row so far. With `is_last`, no token may follow.
        """
        logits = logits.copy()
        for row, text in enumerate(texts):
            self._penalise(logits[row], text)
        first = number == 0
        forced_bos = self.forced_bos if max(map(len, texts)) - number == 1 else None
        if first and forced_bos is not None:
            logits = _only(logits, forced_bos)
        if is_last and self.forced_eos is not None:
            logits = _only(logits, self.forced_eos)
        begins = first if forced_bos is None else number == 1
        for token in (*self.suppress, *(self.begin_suppress if begins else ())):
            if token < logits.shape[1]:
                logits[:, token] = -np.inf
        return logits

    def _penalise(self, logits: NDArray[np.floating], text: Sequence[int]) -> None:
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


def _only(logits: NDArray[np.floating], token: int) -> NDArray[np.floating]:
    forced = np.full_like(logits, -np.inf)
    forced[:, token] = 0
    return forced
