"""Export a model with an encoder, such as T5, BART or Whisper, with its key/value cache: as three graphs.

The encoder takes the model's own inputs and returns `last_hidden_state` [batch, encoder_sequence, features]. The
decoder takes it as `encoder_hidden_states`, the encoder's mask as `encoder_attention_mask` where it reads it, and the
first `input_ids` [batch, sequence]; it returns `logits`, and for each layer n `present.n.decoder.key` and `.value`
[batch, heads, sequence, features] and `present.n.encoder.key` and `.value`, those of the cross-attention. The decoder
with a past takes all four as `past_key_values.n.…` in place of the encoder's output, and returns the decoder's, longer.
optimum has the same three graphs with the same names.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import MutableSequence
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn
from torch.export import Dim

from lora_export.errors import InputRefused
from lora_export.graph.cache_names import (
    DECODER_IDS,
    ENCODER_MASK,
    HIDDEN,
    IDS,
    LAST_HIDDEN,
    LOGITS,
    MASK,
    PAST,
    PRESENT,
)
from lora_export.models.cached_decoder import BATCH_SYMBOL, PAST_SYMBOL, SEQUENCE_SYMBOL, TRACED_PAST, TRACED_SEQUENCE
from lora_export.models.export import exported_with_cache, name_axes, to_onnx
from lora_export.models.model import Model, ModelInputs
from lora_export.models.refusals import named_failures
from lora_export.models.tracing import USE_CACHE, cache_setting, is_hugging_face, tracing

ENCODER_SYMBOL = "encoder_sequence"  # the axis of the positions that the encoder returns
ENCODER_OUTPUTS = "encoder_outputs"  # the keyword of forward
TENSOR_OF_PART = re.compile(r"\.(self|cross)_attention_cache\.layers\.(\d+)\.(key|value)s$")
# What encoders return; their decoders read the first of it.
ENCODER_RETURNS = frozenset({LAST_HIDDEN, "pooler_output", "hidden_states", "attentions"})
PART = {"self": "decoder", "cross": "encoder"}  # of a cache, as transformers and as exporters name it


class EncoderDecoderGraphs(NamedTuple):
    """The graphs of one model. Their weights have the names of the whole model."""

    encoder: ir.Model
    decoder: ir.Model
    decoder_with_past: ir.Model


def is_encoder_decoder(module: nn.Module) -> bool:
    """Whether a model of transformers generates with a decoder that reads what an encoder returns."""
    if not is_hugging_face(module):
        return False
    model: Any = module
    return bool(model.config.is_encoder_decoder) and model.can_generate()


def export_encoder_decoder(model: Model, *, opset: int | None = None) -> EncoderDecoderGraphs:
    """Export a model of transformers with an encoder, in eval mode, with its cache. Writes no file.

    Weights are as `to_onnx` leaves them. Raises InputRefused for a model whose cache has other parts than a key and a
    value for each attention of a layer, or whose decoder reads more of its encoder than the hidden states, and
    RuntimeRefused where the exporter refuses the model.
    """
    module: Any = model.module
    axes = {name: own for name, own in model.axes.items() if not name.startswith("decoder_")}
    inputs = {name: value for name, value in model.example_inputs().items() if name in axes}
    encoder: Any = module.get_encoder()
    with tracing(module), named_failures(module, inputs, "example inputs"):
        outputs = encoder(**inputs)
    if more := sorted({name for name, value in outputs.items() if value is not None} - ENCODER_RETURNS):
        raise InputRefused(
            f"{type(module).__name__}: its decoder may read {', '.join(more)} of its encoder, too. Graphs with a cache "
            f"are made of models whose decoder reads {LAST_HIDDEN} alone"
        )
    graph = to_onnx(encoder, inputs, axes=axes, opset=opset)
    _keep_outputs(graph, {LAST_HIDDEN: LAST_HIDDEN})
    _name_by_model(graph, module, encoder)
    varies = any(symbol != BATCH_SYMBOL for own in axes.values() for symbol in own.values())
    exporter = _DecoderExporter(module, _hidden_states_alone(outputs), inputs.get(MASK), varies, opset)
    cache = exporter.cache()  # runs the model: what it refuses is named before the exporter refuses it
    return EncoderDecoderGraphs(graph, exporter.graph(None), exporter.graph(cache))


class _DecoderExporter:
    """Exports the decoder of a model, given what its encoder returned."""

    def __init__(self, module: Any, outputs: Any, mask: torch.Tensor | None, varies: bool, opset: int | None):
        self.module, self.opset = module, opset
        self.batch = len(outputs.last_hidden_state)
        self.given = {ENCODER_OUTPUTS: outputs}
        self.axes: dict[str, dict[int, str]] = {
            HIDDEN: {0: BATCH_SYMBOL, 1: ENCODER_SYMBOL} if varies else {0: BATCH_SYMBOL},
            IDS: {0: BATCH_SYMBOL, 1: SEQUENCE_SYMBOL},
        }
        if mask is not None:
            self.given[MASK] = mask
            self.axes[ENCODER_MASK] = {0: BATCH_SYMBOL, 1: ENCODER_SYMBOL}
        self.cross_axes = {0: BATCH_SYMBOL, 2: ENCODER_SYMBOL} if varies else {0: BATCH_SYMBOL}

    def cache(self) -> Any:
        """The cache after a few tokens. Raises InputRefused for one of another kind."""
        module, transformers = self.module, importlib.import_module("transformers.cache_utils")
        cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
        tokens = self._tokens(TRACED_PAST)
        with tracing(module), cache_setting(module, to=True), named_failures(module, tokens, "first tokens"):
            own = getattr(module(**self.given, **tokens, **{USE_CACHE: True}), PAST, None)
            if not isinstance(own, transformers.EncoderDecoderCache):
                raise InputRefused(
                    f"{type(module).__name__} has a cache of {type(own).__name__}: graphs with a cache are made "
                    "of models that keep a key and a value for each attention, and nothing else"
                )
            module(**self.given, **tokens, **{PAST: cache, USE_CACHE: True})
        return cache

    def graph(self, cache: Any) -> ir.Model:
        """The graph of the first tokens, or with a cache, of those after it."""
        inputs = {**self.given, **self._tokens(TRACED_SEQUENCE), USE_CACHE: True}
        dynamic: dict[str, Any] = {
            ENCODER_OUTPUTS: [self._dynamic(HIDDEN)],
            DECODER_IDS: self._dynamic(IDS),
            **({MASK: self._dynamic(ENCODER_MASK)} if MASK in self.given else {}),
        }
        if cache is not None:
            inputs[PAST] = cache
            own = dict.fromkeys((0, 2), Dim.DYNAMIC)
            cross = dict.fromkeys(self.cross_axes, Dim.DYNAMIC)
            layers = (cache.self_attention_cache.layers, cache.cross_attention_cache.layers)
            dynamic[PAST] = [own] * (2 * len(layers[0])) + [cross] * (2 * len(layers[1]))
        with tracing(self.module), cache_setting(self.module, to=True):
            program = exported_with_cache(self.module, inputs, dynamic, self.opset)
        self._rename(program, has_past=cache is not None)
        return program

    def _tokens(self, count: int) -> ModelInputs:
        return {DECODER_IDS: torch.zeros((self.batch, count), dtype=torch.int64)}

    def _dynamic(self, name: str) -> dict[int, Any]:
        return dict.fromkeys(self.axes[name], Dim.DYNAMIC)

    def _rename(self, program: ir.Model, *, has_past: bool) -> None:
        """Give inputs and outputs their names, and leave out those that nothing needs."""
        axes: dict[str, dict[int, str]] = dict(self.axes)
        names = {f"{ENCODER_OUTPUTS}.{LAST_HIDDEN}": HIDDEN, DECODER_IDS: IDS, MASK: ENCODER_MASK}
        for value in program.graph.inputs:
            found = TENSOR_OF_PART.search(value.name or "")
            value.name = _cache_name(PAST, found) if found else names[value.name or ""]
            if found:
                axes[value.name] = self.cross_axes if found[1] == "cross" else {0: BATCH_SYMBOL, 2: PAST_SYMBOL}
        kept = {LOGITS: LOGITS}
        for value in program.graph.outputs:
            found = TENSOR_OF_PART.search(value.name or "")
            if found and not (has_past and found[1] == "cross"):  # behind a past they are what was given
                kept[value.name or ""] = _cache_name(PRESENT, found)
        _keep_outputs(program, kept)
        RemoveUnusedNodesPass()(program)
        for value in list(program.graph.inputs):
            if not value.uses():
                program.graph.inputs.remove(value)
        _order_by_layer(program.graph.inputs)
        _order_by_layer(program.graph.outputs)
        name_axes(program, axes)


def _hidden_states_alone(outputs: Any) -> Any:
    """What an encoder returned, without all else. Some decoders look for fields that theirs alone has (Moonshine)."""
    common: Any = importlib.import_module("transformers.modeling_outputs").BaseModelOutput
    others = {each.name for each in dataclasses.fields(outputs)} - ENCODER_RETURNS
    return (type(outputs) if others else common)(last_hidden_state=outputs.last_hidden_state)


def _cache_name(begin: str, found: re.Match[str]) -> str:
    return f"{begin}.{found[2]}.{PART[found[1]]}.{found[3]}"


def _order_by_layer(values: MutableSequence[ir.Value]) -> None:
    """Order the cache's tensors as optimum counts them: layer by layer, the decoder's before the encoder's."""
    tensors = [value for value in values if (value.name or "").startswith((f"{PAST}.", f"{PRESENT}."))]
    others = [value for value in values if value not in tensors]
    tensors.sort(key=lambda value: (int((value.name or "").split(".")[1]), (value.name or "").split(".")[2:]))
    values[:] = [*others, *tensors]


def _keep_outputs(program: ir.Model, names: dict[str, str]) -> None:
    """Leave out the outputs that are not among these (the exporter's name -> the new one)."""
    for value in list(program.graph.outputs):
        if value.name in names:
            value.name = names[value.name]
        else:
            program.graph.outputs.remove(value)


def _name_by_model(program: ir.Model, module: nn.Module, part: nn.Module) -> None:
    """Give the weights of a part's graph the names that they have in the whole model."""
    own = {*dict(part.named_parameters(remove_duplicate=False)), *dict(part.named_buffers(remove_duplicate=False))}
    prefix = next(name for name, own in module.named_modules() if own is part)
    for value in list(program.graph.initializers.values()):
        if value.name in own:
            value.name = f"{prefix}.{value.name}"
