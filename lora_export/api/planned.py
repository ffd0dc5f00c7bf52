"""The plan of a merge into a checkpoint, which a proof of the merge makes again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_export import plan
from lora_export.adapters.combine import combine_in_plan
from lora_export.lora import Adapter
from lora_export.options.combining import Applied
from lora_export.plan import Plan
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.tied_tensors import tied_as_remedy, ties_of


def planned(
    base: Checkpoint, adapters: Sequence[Adapter], options: Applied, together: Sequence[str] = (), **more: Any
) -> Plan:
    """Which pair lands on which weight, with what the base ties, and pairs combined. `more` is for `plan.make`.

    Of one model of a pipeline, `together` are the names of all adapters. Raises MatchError for what does not fit.
    """
    with tied_as_remedy(base, options.tied):
        ties = ties_of(base, options.tied)
        steps = plan.make(adapters, base.specs, strengths=options.weights, rules=base.rules, ties=ties, **more)
    return combine_in_plan(steps, options.combined, together)
