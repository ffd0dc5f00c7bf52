"""What a merge into a checkpoint reads before its weights: the adapters, the headers of the base, and the plan."""

from __future__ import annotations

from collections.abc import Sequence

from lora_export.api.load import load_adapters
from lora_export.api.merge_request import MergeRequest
from lora_export.api.planned import planned
from lora_export.api.shared_head import head_alone
from lora_export.errors import InputRefused
from lora_export.lora import Adapter
from lora_export.options.combining import AdapterSource
from lora_export.options.merge import MergeOptions
from lora_export.options.reading import ReadOptions
from lora_export.options.spelling import named
from lora_export.plan import Plan
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint


def read_adapters(
    options: MergeOptions, sources: Sequence[AdapterSource], reading: ReadOptions, *, of_models: bool = True
) -> list[Adapter]:
    """The adapters of a merge, from sources that were located. Raises InputRefused as `load_adapters`."""
    loaded = load_adapters(sources, options.prefixes, reading=reading, of_models=of_models)
    return [head_alone(adapter) for adapter in loaded] if options.only_head else loaded


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
