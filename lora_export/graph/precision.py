"""In which precision a graph stores its weights, and in which it computes with them: they need not be the same."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from lora_export.graph.find_sites import Sites
from lora_export.graph.values import stored_dtype

FULL = "float32"


@dataclass(frozen=True)
class WeightPrecision:
    """The precision of most entries of the matrices that linear layers and convolutions read."""

    stored: str  # a dtype, or how it is quantised: `4 bits in blocks of 32`
    computed: str  # the dtype of the product; a Cast or a dequantisation can make it differ

    def __str__(self) -> str:
        return f"weights stored in {self.stored}, computed in {self.computed}"

    @property
    def is_full(self) -> bool:
        """Whether both are float32."""
        return self.stored == self.computed == FULL


def precision_of(sites: Sites) -> WeightPrecision | None:
    """The precision of a graph with these sites; None for a graph without linear layers. Reads no tensor data."""
    entries: Counter[WeightPrecision] = Counter()
    for site in (*sites.linear, *sites.unnamed):
        stored = stored_dtype(site.value) if site.quantised is None else site.quantised.kind
        entries[WeightPrecision(stored, site.dtype)] += math.prod(site.shape)
    return max(entries, key=lambda each: entries[each], default=None)
