"""Export a decoder with its key/value cache: one graph for a prompt and for every token after it.

The graph takes `input_ids` [batch, sequence], `attention_mask` [batch, past + sequence], `position_ids` [batch,
sequence] where the model reads them, and for each layer n `past_key_values.n.key` and `.value`, [batch, heads, past,
features]. It returns `logits` [batch, sequence, vocabulary], and `present.n.key` and `.value`, which are the past of
the next call. The past of a prompt has the length 0. onnxruntime-genai and optimum use the same names.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from lora_export.errors import InputRefused
from lora_export.graph.cache_names import IDS, MASK, PAST, POSITION_IDS, PRESENT
from lora_export.models.export import (
    exported_by_transformers,
    exporter_refusals,
    is_hugging_face,
    name_axes,
    refuse_other_opset,
    tracing,
)
from lora_export.models.failures import named_failures
from lora_export.models.key_value_cache import USE_CACHE
from lora_export.models.model import Axes, ModelInputs
from lora_export.models.positions import counts_by_mask, takes_positions
from lora_export.models.simplify import simplify

BATCH_SYMBOL, SEQUENCE_SYMBOL, PAST_SYMBOL, TOTAL_SYMBOL = "batch", "sequence", "past", "total"  # the axes' symbols
# The keyword of forward that takes the cache, in the order of transformers' generations.
CACHE_KEYWORDS = ("cache", "past_key_values")
CACHE_TENSOR = re.compile(r"\.layers\.(\d+)\.(key|value)s$")
# Sizes to trace with: none is 1, which an exporter takes for a constant, and no two are equal.
TRACED_BATCH, TRACED_PAST, TRACED_SEQUENCE = 2, 5, 3


def refuse_other_than_decoder(module: nn.Module, source: str) -> None:
    """Raise InputRefused for a model that does not generate a text after a text with a key/value cache."""
    name = type(module).__name__
    if not is_hugging_face(module):
        raise InputRefused(f"{source}: a graph with a key/value cache is made of a Hugging Face model, not of a {name}")
    model: Any = module
    if model.config.is_encoder_decoder:
        raise InputRefused(f"{source}: {name} has an encoder: a graph with a cache is made of a decoder alone")
    if not model.can_generate() or model.main_input_name != IDS:
        raise InputRefused(
            f"{source}: {name} generates no texts. A graph with a cache is made of a causal language model, such as "
            "LlamaForCausalLM"
        )


def export_decoder(module: nn.Module, *, opset: int | None = None) -> ir.Model:
    """Export a causal language model, in eval mode, with its cache. Writes no file.

    Weights are as `to_onnx` leaves them. Raises InputRefused for a model whose cache has other parts than a key and a
    value for each layer, and RuntimeRefused where the exporter refuses the model.
    """
    keyword, cache = _cache_after_prompt(module)
    inputs, axes = _inputs(module)
    dynamic: dict[str, Any] = {name: dict.fromkeys(own, Dim.DYNAMIC) for name, own in axes.items()}
    tensors = 2 * len(cache.layers)
    dynamic[keyword] = [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC} for _ in range(tensors)]
    with tracing(module), exporter_refusals(module):
        program = exported_by_transformers(module, {**inputs, keyword: cache, USE_CACHE: True}, dynamic, opset)
        simplify(program)
    refuse_other_opset(program, opset)
    _remove_unread_positions(program)
    past = _name_cache(program)
    name_axes(program, {**axes, **{name: {0: BATCH_SYMBOL, 2: PAST_SYMBOL} for name in past}})
    return program


def _cache_after_prompt(module: nn.Module) -> tuple[str, Any]:
    """The keyword of forward for the cache, and a cache of full length, as it is after a prompt."""
    transformers: Any = importlib.import_module("transformers.cache_utils")
    takes = inspect.signature(module.forward).parameters
    keyword = next((name for name in CACHE_KEYWORDS if name in takes), None)
    if keyword is None:
        raise InputRefused(f"{type(module).__name__} takes no cache: it has none of {', '.join(CACHE_KEYWORDS)}")
    prompt = {IDS: torch.zeros((TRACED_BATCH, TRACED_PAST), dtype=torch.int64)}
    with tracing(module), named_failures(module, prompt, "prompt"):
        own = getattr(module(**prompt, **{USE_CACHE: True}), keyword, None)
        kinds = {type(layer).__name__ for layer in getattr(own, "layers", ())}
        if others := sorted(kinds - {"DynamicLayer", "DynamicSlidingWindowLayer"}) or not kinds:
            found = ", ".join(others) if isinstance(others, list) else type(own).__name__
            raise InputRefused(
                f"{type(module).__name__} has a cache of {found}: a graph with a cache is made of models that keep a "
                "key and a value for each layer, and nothing else"
            )
        # With layers of full length also where a window slides: the mask limits what they read.
        cache = transformers.DynamicCache()
        module(**prompt, **{USE_CACHE: True, keyword: cache})
    return keyword, cache


def _inputs(module: nn.Module) -> tuple[ModelInputs, Axes]:
    """Inputs for a call with a past, and their axes."""
    total = TRACED_PAST + TRACED_SEQUENCE
    inputs = {
        IDS: torch.zeros((TRACED_BATCH, TRACED_SEQUENCE), dtype=torch.int64),
        MASK: torch.ones((TRACED_BATCH, total), dtype=torch.int64),
    }
    axes = {IDS: {0: BATCH_SYMBOL, 1: SEQUENCE_SYMBOL}, MASK: {0: BATCH_SYMBOL, 1: TOTAL_SYMBOL}}
    if takes_positions(module) and not counts_by_mask(module):
        inputs[POSITION_IDS] = torch.arange(TRACED_PAST, total).expand(TRACED_BATCH, -1)
        axes[POSITION_IDS] = {0: BATCH_SYMBOL, 1: SEQUENCE_SYMBOL}
    return inputs, axes


def _remove_unread_positions(program: ir.Model) -> None:
    """Remove `position_ids` where the model takes them and does not read them."""
    for value in list(program.graph.inputs):
        if value.name == POSITION_IDS and not value.uses():
            program.graph.inputs.remove(value)


def _name_cache(program: ir.Model) -> list[str]:
    """Give the cache's inputs and outputs their names; return those of the inputs."""
    names = []
    for value in program.graph.inputs:
        if found := CACHE_TENSOR.search(value.name or ""):
            value.name = f"{PAST}.{found[1]}.{found[2]}"
            names.append(value.name)
    for value in program.graph.outputs:
        if found := CACHE_TENSOR.search(value.name or ""):
            value.name = f"{PRESENT}.{found[1]}.{found[2]}"
    return names
