"""The cache of a decoder, as transformers keeps it: keys and values, and states that do not grow with the text.

A short convolution (LFM2) keeps its last inputs; a state space or linear attention (Mamba, Qwen3-Next) also keeps a
recurrent state. A model reads several tokens after a convolution's state in one run, but only one after a recurrent
state: transformers begins a longer run with a state of zeros.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from lora_export.errors import InputRefused
from lora_export.graph.cache_names import IDS, PAST, PAST_CONV, PAST_RECURRENT, PRESENT, PRESENT_CONV, PRESENT_RECURRENT
from lora_export.models.failures import named_failures
from lora_export.models.tracing import USE_CACHE, tracing

# The keyword of forward that takes the cache, in the order of transformers' generations.
CACHE_KEYWORDS = ("cache", "past_key_values")
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
            cache.layers = [_of_full_length(layer, transformers) for layer in layers]
        module(**prompt, **{USE_CACHE: True, keyword: cache})
    return DecoderCache(keyword, cache)


def _of_full_length(layer: Any, transformers: Any) -> Any:
    """An empty layer of a cache, without a window."""
    kind = KNOWN_LAYERS[type(layer).__name__]
    states = {"number_of_states": layer.number_of_states} if type(layer).__name__ in STATE_LAYERS else {}
    return getattr(transformers, kind)(**states)


def name_cache(program: ir.Model) -> dict[str, tuple[int, ...]]:
    """Give the cache's inputs and outputs their names; return those of the inputs, with the axes that vary."""
    axes: dict[str, tuple[int, ...]] = {}
    for value in program.graph.inputs:
        if found := CACHE_TENSOR.search(value.name or ""):
            value.name = _name(found, is_past=True)
            axes[value.name] = (0, 2) if found[2] else (0,)
    for value in program.graph.outputs:
        if found := CACHE_TENSOR.search(value.name or ""):
            value.name = _name(found, is_past=False)
    return axes


def _name(found: re.Match[str], *, is_past: bool) -> str:
    """Such as `past_key_values.0.key` and `past_conv.0`; `past_conv.0.1` for a layer's second state."""
    layer, part, kind, number = found.groups()
    if part:
        return f"{PAST if is_past else PRESENT}.{layer}.{part}"
    past, present = STATES[kind]
    return f"{past if is_past else present}.{layer}{'' if number == '0' else f'.{number}'}"
