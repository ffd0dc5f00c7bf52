"""Export a decoder with its key/value cache: one graph for a prompt and for every token after it.

The graph takes `input_ids` [batch, sequence], `attention_mask` [batch, past + sequence], `position_ids` [batch,
sequence] where the model reads them, and for each layer n `past_key_values.n.key` and `.value`, [batch, heads, past,
features]. It returns `logits` [batch, sequence, vocabulary], and `present.n.key` and `.value`, which are the past of
the next call. The past of a prompt has the length 0. onnxruntime-genai and optimum use the same names.

A short convolution (LFM2) keeps its last inputs: such a layer has `past_conv.n` and `present_conv.n` [batch, channels,
kernel] instead, which are zeros for a prompt. A state space or linear attention (Mamba, Qwen3-Next) also keeps a
recurrent state, `past_recurrent.n` and `present_recurrent.n`. transformers begins a run of several tokens with a state
of zeros, so that a graph of such a model takes one token of each row in a run.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from lora_export.errors import InputRefused, LoraExportError, RuntimeRefused
from lora_export.graph.cache_names import (
    EMBEDS,
    IDS,
    MASK,
    PAST,
    PAST_CONV,
    PAST_RECURRENT,
    POSITION_IDS,
    PRESENT,
    PRESENT_CONV,
    PRESENT_RECURRENT,
    TOKEN_TYPES,
)
from lora_export.layers.activation import CACHE_KEYWORDS
from lora_export.layers.torch_internals import is_stateful
from lora_export.models.deepstack import deepstack_in_embeds, embeds_of
from lora_export.models.export import exported_with_cache, name_axes
from lora_export.models.model import Axes, ModelInputs
from lora_export.models.refusals import named_failures
from lora_export.models.tracing import USE_CACHE, cache_setting, is_hugging_face, tracing
from lora_export.options.spelling import named

CACHE_TENSOR = re.compile(r"\.layers\.(\d+)\.(?:(key|value)s|(conv|recurrent)_states\.(\d+))$")
# Layers of transformers' caches -> those of full length that take their place: the mask limits what a window reads
KEY_VALUE_LAYERS = {"DynamicLayer": "DynamicLayer", "DynamicSlidingWindowLayer": "DynamicLayer"}
STATE_LAYERS = {
    "LinearAttentionLayer": "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer": "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer": "LinearAttentionAndFullAttentionLayer",
}
NO_STATE = {"DummyLayer": "DummyLayer"}  # of a layer that keeps nothing, such as an MLP
KNOWN_LAYERS = KEY_VALUE_LAYERS | STATE_LAYERS | NO_STATE
STATES = {"conv": (PAST_CONV, PRESENT_CONV), "recurrent": (PAST_RECURRENT, PRESENT_RECURRENT)}


@dataclass(frozen=True, eq=False)
class DecoderCache:
    """The keyword of forward for the cache, and a cache as it is after a prompt."""

    keyword: str
    cache: Any

    @property
    def is_recurrent(self) -> bool:
        """Whether a run with this cache takes one token."""
        return any(name.startswith("recurrent") for name, _ in self._tensors())

    @property
    def has_keys(self) -> bool:
        """Whether a layer attends to all tokens before, so that a mask states which of them are padding."""
        return any(name == "keys" for name, _ in self._tensors())

    @property
    def varying_axes(self) -> list[tuple[int, ...]]:
        """The axes that vary of each tensor: the batch, and the length of keys and values."""
        return [(0, 2) if name in ("keys", "values") else (0,) for name, _ in self._tensors()]

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for layer in self.cache.layers:
            for name, value in vars(layer).items():
                for tensor in value.values() if isinstance(value, dict) else [value]:
                    if isinstance(tensor, torch.Tensor):
                        yield name, tensor


def cache_after_prompt(module: nn.Module, batch: int, length: int) -> DecoderCache:
    """Run a prompt of this length; the keys and values of its cache have full length.

    Raises InputRefused for a model that takes no cache, or whose cache has other parts than these, and RuntimeRefused
    for one that fails on the prompt.
    """
    transformers: Any = importlib.import_module("transformers.cache_utils")
    takes = inspect.signature(module.forward).parameters
    keyword = next((name for name in CACHE_KEYWORDS if name in takes), None)
    if keyword is None:
        raise InputRefused(f"{type(module).__name__} takes no cache: it has none of {', '.join(CACHE_KEYWORDS)}")
    prompt = {IDS: torch.zeros((batch, length), dtype=torch.int64)}
    with tracing(module), named_failures(module, prompt, "prompt"):
        own = getattr(module(**prompt, **{USE_CACHE: True}), keyword, None)
        layers = list(getattr(own, "layers", ()))
        kinds = {type(layer).__name__ for layer in layers}
        if others := sorted(kinds - KNOWN_LAYERS.keys()) or not kinds:
            found = ", ".join(others) if isinstance(others, list) else type(own).__name__
            has = "returns no cache" if own is None else f"has a cache of {found}"
            raise InputRefused(
                f"{type(module).__name__} {has}: a graph with a cache is made of models that keep a "
                "key and a value for each layer, or the states of convolutions and linear attention"
            )
        cache = transformers.DynamicCache()
        if kinds - KEY_VALUE_LAYERS.keys():
            for layer in layers:
                kind = KNOWN_LAYERS[type(layer).__name__]  # without a window
                states = {"number_of_states": layer.number_of_states} if kind in STATE_LAYERS else {}
                cache.layers.append(getattr(transformers, kind)(**states))
        module(**prompt, **{USE_CACHE: True, keyword: cache})
    return DecoderCache(keyword, cache)


@contextlib.contextmanager
def cache_as_remedy(module: nn.Module) -> Iterator[None]:
    """Add to a RuntimeRefused that a decoder which keeps a state is exported with it, where that is possible."""
    try:
        yield
    except RuntimeRefused as error:
        if not is_stateful(module) or not _has_known_cache(module):
            raise
        way = f"A decoder that keeps a state is exported token by token: {named('with_cache', True)}."
        raise RuntimeRefused(error.lines, way) from error


def _has_known_cache(module: nn.Module) -> bool:
    try:
        cache_after_prompt(module, TRACED_BATCH, TRACED_PAST)
    except LoraExportError:
        return False
    return True


def name_cache(program: ir.Model) -> dict[str, tuple[int, ...]]:
    """Give the cache's inputs and outputs their names; return those of the inputs, with the axes that vary."""
    axes: dict[str, tuple[int, ...]] = {}
    for values, is_past in ((program.graph.inputs, True), (program.graph.outputs, False)):
        for value in values:
            if found := CACHE_TENSOR.search(value.name or ""):
                value.name = _name(found, is_past=is_past)
                axes |= {value.name: (0, 2) if found[2] else (0,)} if is_past else {}
    return axes


def _name(found: re.Match[str], *, is_past: bool) -> str:
    """Such as `past_key_values.0.key` and `past_conv.0`; `past_conv.0.1` for a layer's second state."""
    layer, part, kind, number = found.groups()
    if part:
        return f"{PAST if is_past else PRESENT}.{layer}.{part}"
    past, present = STATES[kind]
    return f"{past if is_past else present}.{layer}{'' if number == '0' else f'.{number}'}"


BATCH_SYMBOL, SEQUENCE_SYMBOL, PAST_SYMBOL, TOTAL_SYMBOL = "batch", "sequence", "past", "total"  # the axes' symbols
# Sizes to trace with: none is 1, which an exporter takes for a constant, and no two are equal.
TRACED_BATCH, TRACED_PAST, TRACED_SEQUENCE = 2, 5, 3
GRID_AXES = 3  # time, row and column of a position


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


def export_decoder(
    module: nn.Module, *, opset: int | None = None, takes_embeds: bool = False, takes_token_types: bool = False
) -> ir.Model:
    """Export a causal language model, in eval mode, with its cache. Writes no file.

    With `takes_embeds`, its input is `inputs_embeds` [batch, sequence, features] in place of `input_ids`, and
    `position_ids` has each axis of the model's positions, [3, batch, sequence] for those of an image's grid. With
    `takes_token_types`, it also takes `token_type_ids` [batch, past + sequence].

    Weights are as `to_onnx` leaves them. Raises InputRefused for a model whose cache has other parts than a key and a
    value for each layer, and RuntimeRefused where the exporter refuses the model.
    """
    past = cache_after_prompt(module, TRACED_BATCH, TRACED_PAST)
    inputs, axes = _inputs(module, past)
    if takes_embeds:
        inputs, axes = _with_embeds(module, inputs, axes)
    if takes_token_types:
        inputs[TOKEN_TYPES], axes[TOKEN_TYPES] = torch.zeros_like(inputs[MASK]), axes[MASK]
    dynamic: dict[str, Any] = {name: dict.fromkeys(own, Dim.DYNAMIC) for name, own in axes.items()}
    dynamic[past.keyword] = [dict.fromkeys(own, Dim.DYNAMIC) for own in past.varying_axes]
    features = deepstack_in_embeds(module) if takes_embeds else contextlib.nullcontext()
    with tracing(module), cache_setting(module, to=True), features:  # InternVL reads the setting of its config
        program = exported_with_cache(module, {**inputs, past.keyword: past.cache, USE_CACHE: True}, dynamic, opset)
    for value in list(program.graph.inputs):  # a model may take positions and not read them
        if value.name == POSITION_IDS and not value.uses():
            program.graph.inputs.remove(value)
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


def _with_embeds(module: Any, inputs: ModelInputs, axes: Axes) -> tuple[ModelInputs, Axes]:
    """The inputs with embeddings in place of token ids, and with positions on each axis of a grid."""
    others = {name: value for name, value in inputs.items() if name != IDS}
    inputs = {EMBEDS: embeds_of(module, inputs[IDS]).detach(), **others}
    axes = {EMBEDS: axes[IDS], **{name: own for name, own in axes.items() if name != IDS}}
    if POSITION_IDS in inputs and has_grid_positions(module):
        inputs[POSITION_IDS] = inputs[POSITION_IDS].expand(GRID_AXES, -1, -1).contiguous()
        axes[POSITION_IDS] = {axis + 1: symbol for axis, symbol in axes[POSITION_IDS].items()}
    return inputs, axes


def has_grid_positions(module: Any) -> bool:
    """Whether a token has a position in time, a row and a column (Qwen2-VL)."""
    return hasattr(module.base_model, "get_rope_index")


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
