"""The lengths of texts that a trace of a model computes as the model does.

A trace has one branch of each comparison in the model's Python code. BigBird attends to all tokens of a short text, and
to blocks of a longer one; DeepSeek-V3.2 leaves tokens out beyond `index_topk`. No field of a config has it for
all models. PyTorch finds the comparisons, by a run with a length that is a symbol: it records what had to hold.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_export.layers.torch_internals import sizes_of_branches
from lora_export.models.blocks import each_kind_of_block_once
from lora_export.models.model import Limits, Model, Sizes
from lora_export.models.text_inputs import LONGEST_TEXT, MOST_WORK, PAST_WINDOW, SHORT
from lora_export.models.tracing import tracing, without_cache
from lora_export.options.spelling import named

OF_TEXTS = "sequence"
NO_LIMIT = 1 << 40  # tokens
_known: dict[str, Limits] = {}  # class, config and inputs -> what was found: a process proves a model several times


def with_traced_lengths(model: Model) -> Model:
    """The model with `traced`, and a long text beyond it, where that takes no more than other long texts.

    Itself where its code has no such comparison. The model runs once, without its weights and on shapes alone, as far
    as no branch depends on values. Only texts of Hugging Face models are looked at.
    """
    most = model.limits.get(OF_TEXTS, (0, None))[1]
    symbols = {symbol for axes in model.axes.values() for symbol in axes.values()}
    if model.traced or not model.is_huggingface or OF_TEXTS not in symbols or model.derive is not None:
        return model
    reached = _longest_text(model).get(OF_TEXTS, SHORT)
    if most is not None and most <= reached:
        return model
    low, high = _traced(model).get(OF_TEXTS, (0, None))
    if high is None or (most is not None and most <= high):
        return model
    model = replace(model, traced={OF_TEXTS: (low, high)})
    wanted = high + PAST_WINDOW if most is None else min(most, high + PAST_WINDOW)
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    if wanted <= reached:
        return model
    if wanted * parameters <= MOST_WORK and wanted <= LONGEST_TEXT:
        others = [sizes for sizes in model.further if sizes is not _longest_text(model)]
        return replace(model, further=(*others, {**_longest_text(model), OF_TEXTS: wanted}))
    text = (
        f"texts of more than {high:,} tokens, which {type(model.module).__name__} computes in another way. Generated "
        f"texts have up to {reached:,} tokens. Give a longer one by {named('inputs')}"
    )
    return replace(model, not_judged=(*model.not_judged, text))


def _longest_text(model: Model) -> Sizes:
    """The sizes of the case of a long text; none where there is no such case."""
    return next((sizes for sizes in model.further if sizes.get(OF_TEXTS, 0) > SHORT), {})


def _traced(model: Model) -> Limits:
    """The lengths for which the model's code takes the branches that it takes at the traced one."""
    module: Any = model.module
    key = f"{type(module)} {module.config.to_json_string()} {json.dumps([model.axes, model.traced_sizes])}"
    if key not in _known:
        _known[key] = {OF_TEXTS: _sizes_of_branches(model)}
    return _known[key]


def _sizes_of_branches(model: Model) -> tuple[int, int | None]:
    module = without_values(model.module)
    axes = {name: axis for name, own in model.axes.items() for axis, symbol in own.items() if symbol == OF_TEXTS}
    with tracing(module), without_cache(module), each_kind_of_block_once(module):
        low, high = sizes_of_branches(lambda inputs: module(**inputs), model.example_inputs(), axes)
    return low, high if high < NO_LIMIT else None


def without_values(module: nn.Module) -> nn.Module:
    """A copy whose tensors have their shapes, and one number each: it takes no memory."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer
    return copy.deepcopy(module, memo)


def longest_traced(model: Model) -> dict[str, int]:
    """The greatest size of each symbol that a trace computes as the model does; empty where there is none."""
    return {symbol: high for symbol, (_, high) in model.traced.items() if high is not None}


def passes_traced_lengths(model: Model) -> bool:
    """Whether a generated text is longer than those that a trace computes as the model does."""
    return any(_longest_text(model).get(symbol, 0) > high for symbol, high in longest_traced(model).items())
