"""`genai_config.json`: what onnxruntime-genai has to know of a decoder's graph to generate with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from lora_export.graph.cache_names import IDS, KEY_VALUE, LOGITS, MASK, PAST, POSITION_IDS, PRESENT

# Any decoder with this layout of its cache. The names of single models change nothing for it.
DECODER = "decoder"
SEARCH_DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


def genai_config(graph: ir.Model, config: Any, generation: Any, file_name: str) -> dict[str, Any] | None:
    """The config of a graph with a cache, made from a model's config and generation config of transformers.

    None where onnxruntime-genai has no way to state the cache: its tensors have different sizes.
    """
    inputs = {value.name: value for value in graph.graph.inputs}
    sizes = {_heads_and_features(value) for name, value in inputs.items() if name and name.startswith(f"{PAST}.")}
    if len(sizes) != 1:
        return None
    ((heads, features),) = sizes
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or generation.max_length
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: value for name in names if (value := getattr(generation, name, None)) is not None}
    return {
        "model": {
            "type": DECODER,
            "vocab_size": text.vocab_size,
            "context_length": longest,
            **tokens,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": file_name,
                "hidden_size": text.hidden_size,
                "head_size": features,
                "num_attention_heads": text.num_attention_heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": sum(name.endswith(".key") for name in inputs if name and name.startswith(PAST)),
                "inputs": {
                    **{name: name for name in (IDS, MASK, POSITION_IDS) if name in inputs},
                    **{f"past_{part}_names": f"{PAST}.%d.{part}" for part in KEY_VALUE},
                },
                "outputs": {LOGITS: LOGITS, **{f"present_{part}_names": f"{PRESENT}.%d.{part}" for part in KEY_VALUE}},
            },
        },
        "search": {
            **_search(generation),
            "max_length": longest,
            "past_present_share_buffer": False,  # the graph returns a longer cache: it does not write into the past
        },
    }


def _heads_and_features(value: ir.Value) -> tuple[Any, Any]:
    assert value.shape is not None
    return value.shape[1], value.shape[3]


def _search(generation: Any) -> Mapping[str, Any]:
    """How the model's generation config chooses tokens."""
    stated = {name: getattr(generation, name, None) for name in SEARCH_DEFAULTS}
    return {name: SEARCH_DEFAULTS[name] if value is None else value for name, value in stated.items()}
