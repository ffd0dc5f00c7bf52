"""The choice of the next token from a model's logits: the most probable one, or a draw."""

from __future__ import annotations

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
