"""The factors of all adapters for one weight, stacked: entry 0 is the base, which adds nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.formats.onnx_adapter import cast_factor
from lora_export.graph.insert.adapter_names import DORA_FACTOR, LORA_A, LORA_B, module_of
from lora_export.graph.insert.node_factory import Factor, NodeFactory
from lora_export.plan import Step


class AdapterStacks:
    """Makes initializers of the factors that a plan's adapters have for one weight.

    `adapters` are the adapters' names in the order of their ids, `dtype` is that of the weight's readers. Each adapter
    with a pair has at least the rank `max_rank`: zeros fill it.
    """

    def __init__(self, factory: NodeFactory, step: Step, adapters: Sequence[str], dtype: str, *, max_rank: int = 0):
        self.factory, self.step, self.dtype = factory, step, dtype
        own_steps = [step.for_adapter(name) for name in adapters]
        self.factors = [[] if own is None else [term.factors for term in own.terms] for own in own_steps]
        ranks = [0 if own is None else sum(term.pair.rank for term in own.terms) for own in own_steps]
        for factors, rank in zip(self.factors, ranks, strict=True):
            if factors and rank < max_rank:
                factors.append(self._zeros(*factors[0], max_rank - rank))
        self.ranks = [max(rank, max_rank) if rank else 0 for rank in ranks]

    def pairs(self) -> tuple[Factor, Factor]:
        """A (adapters + 1, in, rank) and B (adapters + 1, rank, out), padded with zeros to the largest rank.

        An embedding's A is one table: (adapters + 1) times its rows, rank.
        """
        out_features, in_features = self.step.terms[0].pair.shape
        rank = max(self.ranks)
        stacked_a = np.zeros((len(self.factors) + 1, in_features, rank), np.float32)
        stacked_b = np.zeros((len(self.factors) + 1, rank, out_features), np.float32)
        for number, factors in enumerate(self.factors, 1):
            begin = 0
            for a, b in factors:
                ranks = slice(begin, begin := begin + len(b))
                stacked_a[number, :, ranks] = a
                stacked_b[number, ranks] = b
        table = stacked_a.reshape(-1, rank) if self.step.terms[0].pair.embedding else stacked_a
        return self._initializer(LORA_A, table), self._initializer(LORA_B, stacked_b)

    def convolutions(self) -> tuple[Factor, Factor]:
        """A (ranks, in, kernel) and B (out, ranks, 1...), the ranks of all adapters concatenated."""
        factors = [pair for own in self.factors for pair in own]
        a, b = np.concatenate([a for a, _ in factors]), np.concatenate([b for _, b in factors], axis=1)
        return self._initializer(LORA_A, a), self._initializer(LORA_B, b)

    def rank_mask(self) -> NDArray[np.bool_]:
        """Which of the concatenated ranks belong to each adapter: (adapters + 1, ranks)."""
        owner = np.repeat(np.arange(len(self.ranks)) + 1, self.ranks)
        mask: NDArray[np.bool_] = owner == np.arange(len(self.ranks) + 1)[:, None]
        return mask

    def dora(self, factors: Sequence[NDArray[np.float64] | None]) -> Factor:
        """The factors of DoRA (adapters + 1, out), ones where an adapter has none."""
        stack = np.ones((len(factors) + 1, self.step.terms[0].pair.shape[0]))
        for row, factor in zip(stack[1:], factors, strict=True):
            row[:] = 1 if factor is None else factor.reshape(-1)
        return self._initializer(DORA_FACTOR, stack)

    def _zeros(self, a: NDArray[Any], b: NDArray[Any], rank: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A and B of this rank in the shapes of others, all zeros."""
        if a.ndim > 2:  # A (rank, in, kernel) and B (out, rank, 1...) of a convolution
            return np.zeros((rank, *a.shape[1:]), a.dtype), np.zeros((len(b), rank, *b.shape[2:]), b.dtype)
        return np.zeros((len(a), rank), a.dtype), np.zeros((rank, b.shape[1]), b.dtype)

    def _initializer(self, part: str, array: NDArray[Any]) -> Factor:
        in_dtype = cast_factor(self.step.weight, part, array, self.dtype)
        return self.factory.factor(module_of(self.step.weight), part, in_dtype)
