"""The sizes that a trace of a model computes as the model does.

A trace has one branch of each comparison in the model's Python code. BigBird attends to all tokens of a short text, and
to blocks of a longer one; DeepSeek-V3.2 leaves tokens out beyond `index_topk`. No field of a config has it for
all models. PyTorch finds the comparisons, by a run with a size that is a symbol: it records what had to hold.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lora_export.layers.torch_internals import sizes_of_branches
from lora_export.models.blocks import each_kind_of_block_once
from lora_export.models.model import Axes, Limits, Model, Sizes
from lora_export.models.refusals import failure_on
from lora_export.models.text_inputs import LONGEST_TEXT, MOST_WORK, PAST_WINDOW, SHORT
from lora_export.models.tracing import tracing, without_cache
from lora_export.options.spelling import named

OF_TEXTS = "sequence"
NO_LIMIT = 1 << 40  # of a size
LARGEST_JUDGED = 1 << 20  # of a size of a module of one's own
LEAST_OPEN = 2  # PyTorch takes sizes of 0 and 1 for constants
_known: dict[str, Limits] = {}  # class, config and inputs -> what was found: a process proves a model several times


def with_traced_lengths(model: Model) -> Model:
    """The model with `traced`, and a case beyond these sizes, where that takes no more than other cases.

    Itself where its code has no such comparison. The model runs once, without its weights and on shapes alone, as far
    as no branch depends on values. Of Hugging Face models, only texts are looked at.
    """
    if model.traced or model.derive is not None:
        return model
    return _with_traced_texts(model) if model.is_huggingface else _with_traced_sizes(model)


def _with_traced_texts(model: Model) -> Model:
    most = model.limits.get(OF_TEXTS, (0, None))[1]
    if OF_TEXTS not in _symbols(model):
        return model
    reached = _longest_text(model).get(OF_TEXTS, SHORT)
    if most is not None and most <= reached:
        return model
    high = _traced(model).get(OF_TEXTS, (0, None))[1]
    if high is None or (most is not None and most <= high):
        return model
    model = replace(model, traced={OF_TEXTS: (0, high)})
    wanted = high + PAST_WINDOW if most is None else min(most, high + PAST_WINDOW)
    if wanted <= reached:
        return model
    if wanted * _parameters(model) <= MOST_WORK and wanted <= LONGEST_TEXT:
        others = [sizes for sizes in model.further if sizes is not _longest_text(model)]
        return replace(model, further=(*others, {**_longest_text(model), OF_TEXTS: wanted}))
    text = (
        f"texts of more than {high:,} tokens, which {type(model.module).__name__} computes in another way. Generated "
        f"texts have up to {reached:,} tokens. Give a longer one by {named('inputs')}"
    )
    return replace(model, not_judged=(*model.not_judged, text))


def _with_traced_sizes(model: Model) -> Model:
    """A model that is not of Hugging Face. Sizes at which it fails do not count: it computes nothing there."""
    sizes_of_trace = [size for symbol, size in model.traced_sizes.items() if symbol in _symbols(model)]
    if not sizes_of_trace or len({*sizes_of_trace}) < len(sizes_of_trace):  # PyTorch has one symbol for equal sizes
        return model
    module, usual = type(model.module).__name__, model.checked_sizes({})
    traced, further, not_judged = Limits(), list[Sizes](), list[str]()
    for symbol, (low, high) in _sizes_of_branches(model, model.axes).items():
        traced[symbol] = 0, None  # looked at
        if low > LEAST_OPEN and not _fails(model, {symbol: low - 1}):
            not_judged.append(f"sizes of {symbol} below {low:,}, which {module} computes in another way")
        # Within the usual sizes, a proof finds the branch; one for more than a million is about the range of integers.
        if high is None or high > LARGEST_JUDGED or high < max(sizes[symbol] for sizes in usual):
            continue
        beyond = {**model.traced_sizes, symbol: high + 1}
        if high >= LONGEST_TEXT or _numbers(model, beyond) * _parameters(model) > MOST_WORK:
            not_judged.append(f"sizes of {symbol} above {high:,}, which {module} computes in another way")
        elif not _fails(model, beyond):
            traced[symbol] = 0, high
            further.append(beyond)
    return replace(
        model,
        traced=traced,
        further=(*model.further, *further),
        not_judged=(*model.not_judged, *(f"{text}. Give such inputs by {named('inputs')}" for text in not_judged)),
    )


def _longest_text(model: Model) -> Sizes:
    """The sizes of the case of a long text; none where there is no such case."""
    return next((sizes for sizes in model.further if sizes.get(OF_TEXTS, 0) > SHORT), {})


def _numbers(model: Model, sizes: Sizes) -> int:
    """The numbers of all inputs of a row, at these sizes."""
    shapes = {name: list(value.shape) for name, value in model.example_inputs().items()}
    for name, axes in model.axes.items():
        for axis, symbol in axes.items():
            shapes[name][axis] = sizes.get(symbol, shapes[name][axis])
    return sum(math.prod(shape[1:]) for shape in shapes.values())


def _symbols(model: Model) -> set[str]:
    return {symbol for axes in model.axes.values() for symbol in axes.values()}


def _parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.module.parameters())


def _fails(model: Model, sizes: Sizes) -> bool:
    return bool(failure_on(model.module, model.inputs(sizes, seed=0)))


def _traced(model: Model) -> Limits:
    """The lengths for which the model's code takes the branches that it takes at the traced one."""
    module: Any = model.module
    key = f"{type(module)} {module.config.to_json_string()} {json.dumps([model.axes, model.traced_sizes])}"
    if key not in _known:
        own = {
            name: {axis: each for axis, each in axes.items() if each == OF_TEXTS} for name, axes in model.axes.items()
        }
        _known[key] = _sizes_of_branches(model, own)
    return _known[key]


def _sizes_of_branches(model: Model, axes: Axes) -> Limits:
    """The sizes of each symbol of these axes for which the model's code takes the branches of the traced ones."""
    module = without_values(model.module)
    with tracing(module), without_cache(module), each_kind_of_block_once(module):
        found = sizes_of_branches(lambda inputs: module(**inputs), model.example_inputs(), axes)
    return {symbol: (low, high if high < NO_LIMIT else None) for symbol, (low, high) in found.items()}


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
    """Whether generated inputs are larger than those that a trace computes as the model does."""
    return any(sizes.get(symbol, 0) > high for symbol, high in longest_traced(model).items() for sizes in model.further)
