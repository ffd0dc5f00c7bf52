"""`genai_config.json`: what onnxruntime-genai has to know of a decoder's graph to generate with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from lora_export.graph.cache_names import (
    IDS,
    KEY_VALUE,
    LOGITS,
    MASK,
    PAST,
    PAST_CONV,
    PAST_RECURRENT,
    POSITION_IDS,
    PRESENT,
    PRESENT_CONV,
)
from lora_export.models.fused_operators import takes_shared_buffer

# Any decoder with this layout of its cache, or one whose other layers keep the last inputs of a short convolution. The
# names of single models change nothing for it.
DECODER, WITH_CONVOLUTIONS = "decoder", "lfm2"
LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length")  # the last two: of MPT and BLOOM
ANY_LENGTH = 1 << 17  # tokens, of a model that states no length: onnxruntime-genai takes none for 0
LARGEST_BUFFER = 2 << 30  # bytes, of the keys and values of one text
SEARCH_DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


def genai_config(
    graph: ir.Model, config: Any, generation: Any, file_name: str, *, may_share: bool = False
) -> dict[str, Any] | None:
    """The config of a graph with a cache, made from a model's config and generation config of transformers.

    With `may_share`, past and present are one buffer where the graph takes that, and where one for a text of the
    model's maximum length is no larger than LARGEST_BUFFER: onnxruntime-genai makes it as large.

    None where onnxruntime-genai has no way to state the cache: its tensors have different sizes, or there are recurrent
    states, with which the graph takes one token at once.
    """
    inputs = {value.name or "": value for value in graph.graph.inputs}
    if any(name.startswith(f"{PAST_RECURRENT}.") for name in inputs):
        return None
    sizes = {_heads_and_features(value) for name, value in inputs.items() if name.startswith(f"{PAST}.")}
    if len(sizes) != 1:
        return None
    ((heads, features),) = sizes
    text = config.get_text_config()
    stated = filter(None, (getattr(text, name, None) for name in LENGTHS))
    longest = next(stated, generation.max_length)
    convolutions = [value for name, value in inputs.items() if name.startswith(f"{PAST_CONV}.")]
    layers = sum(name.endswith(".key") for name in inputs) + len(convolutions)
    dtypes = [value.dtype for name, value in inputs.items() if name.startswith(f"{PAST}.")]
    bytes_each = next((dtype.itemsize for dtype in dtypes if dtype is not None), 4)
    buffer = 2 * layers * heads * features * (longest or 0) * bytes_each
    shares = may_share and not convolutions and takes_shared_buffer(graph) and 0 < buffer <= LARGEST_BUFFER
    chosen = {name: getattr(generation, name, None) for name in SEARCH_DEFAULTS}
    search = {name: SEARCH_DEFAULTS[name] if value is None else value for name, value in chosen.items()}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: value for name in names if (value := getattr(generation, name, None)) is not None}
    return {
        "model": {
            "type": WITH_CONVOLUTIONS if convolutions else DECODER,
            "vocab_size": text.vocab_size,
            "context_length": longest or ANY_LENGTH,
            **tokens,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": file_name,
                "hidden_size": text.hidden_size,
                "head_size": features,
                "num_attention_heads": text.num_attention_heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": layers,
                **_layers(inputs, layers, convolutions),
                "inputs": {
                    **{name: name for name in (IDS, MASK, POSITION_IDS) if name in inputs},
                    **{f"past_{part}_names": f"{PAST}.%d.{part}" for part in KEY_VALUE},
                    **({f"{PAST_CONV}_names": f"{PAST_CONV}.%d"} if convolutions else {}),
                },
                "outputs": {
                    LOGITS: LOGITS,
                    **{f"present_{part}_names": f"{PRESENT}.%d.{part}" for part in KEY_VALUE},
                    **({f"{PRESENT_CONV}_names": f"{PRESENT_CONV}.%d"} if convolutions else {}),
                },
            },
        },
        "search": {**search, "max_length": longest or ANY_LENGTH, "past_present_share_buffer": shares},
    }


def _layers(inputs: Mapping[str, ir.Value], count: int, convolutions: Sequence[ir.Value]) -> dict[str, Any]:
    """What each layer keeps, and how many inputs a convolution does; nothing where all keep keys and values."""
    if not convolutions:
        return {}
    assert convolutions[0].shape is not None
    kinds = ["conv" if f"{PAST_CONV}.{layer}" in inputs else "full_attention" for layer in range(count)]
    return {"layer_types": kinds, "conv_cache_size": convolutions[0].shape[2]}


def _heads_and_features(value: ir.Value) -> tuple[Any, Any]:
    assert value.shape is not None
    return value.shape[1], value.shape[3]
