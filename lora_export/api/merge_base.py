"""The base checkpoint of a merge, the plan over it, and its merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lora_export import plan
from lora_export.api.merge_request import MergeRequest, combined_pairs
from lora_export.errors import InputRefused
from lora_export.lora import Adapter
from lora_export.options.combining import Applied
from lora_export.options.spelling import named
from lora_export.plan import Plan
from lora_export.weights.apply_step import Backend
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint
from lora_export.weights.merge import CheckpointMerge
from lora_export.weights.tied_tensors import ties_of

if TYPE_CHECKING:
    from lora_export.weights.calibrated_rounding import LayerInputs


def opened_base(request: MergeRequest) -> Checkpoint:
    """The base's headers. Raises InputRefused where it is damaged, or not quantised and an option needs that."""
    quantised_as = "dequantize" if request.dequantize else "keep_quantised" if request.keep_quantised else ""
    checkpoint = open_checkpoint(request.base, dequantise=bool(quantised_as), variant=request.variant)
    if quantised_as and not checkpoint.quantised:
        raise InputRefused(f"{request.base} is not quantised. Leave {named(quantised_as)} out")
    return checkpoint


def plan_over(checkpoint: Checkpoint, request: MergeRequest) -> Plan:
    """Which pair of the adapters lands on which weight. Raises MatchError with every misfit."""
    return planned(checkpoint, request.adapters, request, may_add=True, layout=request.layout or {})


def planned(
    base: Checkpoint, adapters: Sequence[Adapter], options: Applied, together: Sequence[str] = (), **more: Any
) -> Plan:
    """Which pair lands on which weight, with what the base ties, and pairs combined. `more` is for `plan.make`.

    Of one model of a pipeline, `together` are the names of all adapters. Raises MatchError for what does not fit.
    """
    ties = ties_of(base, options.tied)
    steps = plan.make(adapters, base.specs, strengths=options.weights, rules=base.rules, ties=ties, **more)
    return combined_pairs(steps, options.combined, together)


def merge_of(
    request: MergeRequest,
    steps: Plan,
    base: Checkpoint,
    backend: Backend,
    settings: Mapping[str, Any],
    calibration: Mapping[str, LayerInputs] = MappingProxyType({}),
) -> CheckpointMerge:
    """The merge of a checkpoint as a request has it."""
    own = request.stored, request.min_retention, request.hashing
    return CheckpointMerge(steps, base, *own, backend, settings, calibration)
