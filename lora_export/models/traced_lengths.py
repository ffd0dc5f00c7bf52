"""The lengths of texts that a trace of a model computes as the model does.

A trace has one branch of each comparison in the model's Python code. BigBird attends to all tokens of a short text, and
to blocks of a longer one; DeepSeek-V3.2 leaves tokens out beyond `index_topk`. No config says so for all models.
torch.export finds the comparisons: it records what had to hold for the sizes of its example.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_export.errors import RuntimeRefused
from lora_export.models.export_program import exported_program
from lora_export.models.model import CHECKED_SIZES, Limits, Model
from lora_export.models.text_inputs import LONGEST_TEXT, MOST_WORK, PAST_WINDOW
from lora_export.models.tracing import exporter_refusals, tracing, without_cache
from lora_export.options.spelling import named

SEQUENCE = "sequence"
NO_LIMIT = 1 << 40  # tokens: torch.export's infinity is above it
_known: dict[str, Limits] = {}  # class, config and inputs -> what was found: a process proves a model several times


def with_traced_lengths(model: Model) -> Model:
    """The model with `traced`, and a long text beyond it, where that takes no more than other long texts.

    Itself where its code has no such comparison, or where torch.export refuses it. The model is traced once, without
    its weights. Only texts of Hugging Face models are looked at.
    """
    most = model.limits.get(SEQUENCE, (0, None))[1]
    symbols = {symbol for axes in model.axes.values() for symbol in axes.values()}
    if model.traced or not model.is_huggingface or SEQUENCE not in symbols or model.derive is not None:
        return model
    reached = model.long.get(SEQUENCE, CHECKED_SIZES[-1][SEQUENCE])
    if most is not None and most <= reached:
        return model
    low, high = _traced(model).get(SEQUENCE, (0, None))
    if high is None or (most is not None and most <= high):
        return model
    model = replace(model, traced={SEQUENCE: (low, high)})
    wanted = high + PAST_WINDOW if most is None else min(most, high + PAST_WINDOW)
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    if wanted <= reached:
        return model
    if wanted * parameters <= MOST_WORK and wanted <= LONGEST_TEXT:
        return replace(model, long={**model.long, SEQUENCE: wanted})
    text = (
        f"texts of more than {high:,} tokens, which {type(model.module).__name__} computes in another way. Generated "
        f"texts have up to {reached:,} tokens. Give a longer one by {named('inputs')}"
    )
    return replace(model, not_judged=(*model.not_judged, text))


def _traced(model: Model) -> Limits:
    module: Any = model.module
    key = f"{type(module)} {module.config.to_json_string()} {json.dumps([model.axes, model.traced_sizes])}"
    if key not in _known:
        try:
            _known[key] = _limits_of_trace(model)
        except RuntimeRefused:
            _known[key] = {}
    return _known[key]


def _limits_of_trace(model: Model) -> Limits:
    """The sizes of each symbol for which all comparisons have the results that they have at the traced sizes.

    Raises RuntimeRefused where torch.export refuses the model.
    """
    module = without_values(model.module)
    with tracing(module), without_cache(module), exporter_refusals(module):
        program = exported_program(module, model.example_inputs(), axes=model.axes)
    limits: Limits = {}
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        for axis, symbol in model.axes.get(node.name, {}).items():
            size = node.meta["val"].shape[axis]
            found = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if found is not None:
                limits[symbol] = (int(found.lower), int(found.upper) if found.upper < NO_LIMIT else None)
    return limits


def without_values(module: nn.Module) -> nn.Module:
    """A copy whose tensors have their shapes, and one number each: it takes no memory."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(module, memo)
