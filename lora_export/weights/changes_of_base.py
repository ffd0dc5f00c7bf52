"""Changes that follow from the weights of a base, computed from these weights: then they are changes like others."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export import plan
from lora_export.errors import InputRefused
from lora_export.lora import EVERY_ROW, Adapter, LoraPair
from lora_export.options.spelling import command
from lora_export.pairs.transforms import WeightTransform
from lora_export.plan import Step
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint


class ChangeOfWeight(LoraPair):
    """T(W) - W of one weight of a base. It is read when the change is computed, and the last change is kept."""

    def __init__(self, transform: WeightTransform, step: Step, base: Checkpoint):
        vars(self).update(scale=1.0, magnitude=None, embedding=transform.embedding, as_stored=False)
        vars(self).update(transform=transform, step=step, base=base)

    @property
    def shape(self) -> tuple[int, ...]:
        own: WeightTransform = vars(self)["transform"]
        return own.shape

    @property
    def rank(self) -> int:
        return min(self.shape[0], math.prod(self.shape[1:]))

    @property
    def norm(self) -> float:
        return float(np.linalg.norm(_change(self).astype(np.float64)))

    def delta(
        self, rows: slice = EVERY_ROW, *, strength: float = 1.0, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        return np.multiply(_change(self)[rows], np.float32(strength), out=out)


@functools.lru_cache(maxsize=1)  # as many as one layer needs: a whole adapter would be as large as the base
def _change(pair: ChangeOfWeight) -> NDArray[np.float32]:
    transform, step, base = (vars(pair)[name] for name in ("transform", "step", "base"))
    stored: NDArray[Any] = base.shards[step.spec.file].read(step.spec.name)
    wide = stored.astype(np.float64 if stored.dtype == np.float64 else np.float32)
    change: NDArray[np.float32] = transform.change(wide.T if step.spec.layout.is_transposed else wide)
    return change


def with_changes_of_base(adapter: Adapter, base: Path, layout: Mapping[str, str] | None = None) -> Adapter:
    """The adapter with the changes that its kind makes of the weights of a base, in place of its transforms.

    Raises as `plan.make`, and InputRefused for a transform of a bias, or of a weight that is a part of a stored tensor.
    """
    if not any(pair.needs_weight for pair in adapter.pairs.values()):
        return adapter
    checkpoint = open_checkpoint(base)
    how: dict[str, Any] = {"may_add": True, "identity_ok": True, "layout": layout, "rules": checkpoint.rules}
    made = plan.make([adapter], checkpoint.specs, **how)
    found = {}
    for step in made.steps:
        for term in step.terms:
            if not isinstance(term.pair, WeightTransform):
                continue
            if step.spec.region is not None or step.spec.file not in checkpoint.shards:
                remedy = f"Merge it, and use {command('extract')}"
                raise InputRefused(f"{term.module}: its weight is a part of {step.spec.stored_name}. {remedy}")
            change = ChangeOfWeight(term.pair, step, checkpoint)
            if len(step.spec.shape) > 1:
                found[term.module] = change
            elif _change(change).any():
                raise InputRefused(f"{term.module}: its bias changes too, which no pair of A and B expresses")
    return replace(adapter, pairs={**adapter.pairs, **found})
