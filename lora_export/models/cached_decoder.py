"""Export a decoder with its key/value cache: one graph for a prompt and for every token after it.

The graph takes `input_ids` [batch, sequence], `attention_mask` [batch, past + sequence], `position_ids` [batch,
sequence] where the model reads them, and for each layer n `past_key_values.n.key` and `.value`, [batch, heads, past,
features]. It returns `logits` [batch, sequence, vocabulary], and `present.n.key` and `.value`, which are the past of
the next call. The past of a prompt has the length 0. onnxruntime-genai and optimum use the same names.

A layer with a short convolution has `past_conv.n` and `present_conv.n` [batch, channels, kernel] in their place, which
are zeros for a prompt. A layer with a recurrent state has `past_recurrent.n` and `present_recurrent.n`, too. A graph of
such a model takes one token of each row in a run.
"""

from __future__ import annotations

import inspect
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from lora_export.errors import InputRefused
from lora_export.graph.cache_names import IDS, MASK, POSITION_IDS
from lora_export.models.decoder_cache import DecoderCache, cache_after_prompt, name_cache
from lora_export.models.export import exported_with_cache, name_axes
from lora_export.models.failures import named_failures
from lora_export.models.model import Axes, ModelInputs
from lora_export.models.tracing import USE_CACHE, is_hugging_face, tracing

BATCH_SYMBOL, SEQUENCE_SYMBOL, PAST_SYMBOL, TOTAL_SYMBOL = "batch", "sequence", "past", "total"  # the axes' symbols
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
    past = cache_after_prompt(module, TRACED_BATCH, TRACED_PAST)
    inputs, axes = _inputs(module, past)
    dynamic: dict[str, Any] = {name: dict.fromkeys(own, Dim.DYNAMIC) for name, own in axes.items()}
    dynamic[past.keyword] = [dict.fromkeys(own, Dim.DYNAMIC) for own in past.varying_axes]
    with tracing(module):
        program = exported_with_cache(module, {**inputs, past.keyword: past.cache, USE_CACHE: True}, dynamic, opset)
    _remove_unread_positions(program)
    cached = name_cache(program)
    symbols = {0: BATCH_SYMBOL, 2: PAST_SYMBOL}
    name_axes(program, {**axes, **{name: {axis: symbols[axis] for axis in own} for name, own in cached.items()}})
    return program


def takes_one_token(program: ir.Model) -> bool:
    """Whether such a graph takes one token of each row in a run."""
    ids = next(value for value in program.graph.inputs if value.name == IDS)
    return ids.shape is not None and ids.shape[1] == 1


def _inputs(module: nn.Module, past: DecoderCache) -> tuple[ModelInputs, Axes]:
    """Inputs for a call with a past, and their axes. A sequence of 1 does not vary."""
    sequence = 1 if past.is_recurrent else TRACED_SEQUENCE
    total = TRACED_PAST + sequence
    inputs = {IDS: torch.zeros((TRACED_BATCH, sequence), dtype=torch.int64)}
    tokens = {0: BATCH_SYMBOL} if past.is_recurrent else {0: BATCH_SYMBOL, 1: SEQUENCE_SYMBOL}
    axes = {IDS: tokens}
    if past.has_keys:
        inputs[MASK] = torch.ones((TRACED_BATCH, total), dtype=torch.int64)
        axes[MASK] = {0: BATCH_SYMBOL, 1: TOTAL_SYMBOL}
    if takes_positions(module) and not counts_by_mask(module):
        inputs[POSITION_IDS] = torch.arange(TRACED_PAST, total).expand(TRACED_BATCH, -1)
        axes[POSITION_IDS] = tokens
    return inputs, axes


def _remove_unread_positions(program: ir.Model) -> None:
    """Remove `position_ids` where the model takes them and does not read them."""
    for value in list(program.graph.inputs):
        if value.name == POSITION_IDS and not value.uses():
            program.graph.inputs.remove(value)


def takes_positions(module: nn.Module) -> bool:
    """Whether positions are a parameter of the model's forward."""
    return POSITION_IDS in inspect.signature(module.forward).parameters


def counts_by_mask(module: nn.Module) -> bool:
    """Whether the model counts the ones of the mask (OPT), and not all positions. Runs it twice."""
    ids = torch.arange(3).expand(2, -1)
    padded = {IDS: ids, MASK: (ids > 0).long()}  # the first position is padding
    with tracing(module), named_failures(module, padded, "padded prompt"):
        without, given = (
            module(**padded, **positions)[0][:, -1] for positions in ({}, {POSITION_IDS: ids.contiguous()})
        )
    return not torch.allclose(without, given)
