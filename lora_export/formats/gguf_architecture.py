"""What the header of a GGUF file has of a model's architecture: the names of its tensors, and its config."""

from __future__ import annotations

from typing import Any

from lora_export.errors import InputRefused
from lora_export.names.llama_cpp import LlamaCppNames, model_type_of
from lora_export.names.row_orders import Heads
from lora_export.storage.gguf_file import GgufFile


def names_of(file: GgufFile) -> LlamaCppNames:
    """The names of a model's or an adapter's tensors. Raises InputRefused for an architecture that is not known."""
    architecture = str(file.value("general.architecture", ""))
    has_experts = any("_exps." in tensor.name for tensor in file.tensors)
    try:
        kind = model_type_of(architecture, has_experts=has_experts)
    except InputRefused as error:
        raise InputRefused(f"{file.path}: {error}") from error

    def size(key: str) -> int:
        value = file.value(f"{architecture}.attention.{key}", 0)
        return value if isinstance(value, int) and value > 0 else 0

    queries = size("head_count")
    return LlamaCppNames(kind, Heads(queries, size("head_count_kv") or queries))


def config_of(file: GgufFile) -> dict[str, Any]:
    """What transformers' config of a model in a GGUF file has, of what plans and readers of adapters need."""
    names = names_of(file)
    words = next((tensor.shape[0] for tensor in file.tensors if tensor.name == "token_embd.weight"), None)
    blocks = file.value(f"{file.value('general.architecture')}.block_count", 0)
    return {
        "model_type": names.model_type,
        "architectures": [names.class_name],
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in file.tensors),
        "num_attention_heads": names.heads.queries,
        "num_key_value_heads": names.heads.keys,
        **({"num_hidden_layers": blocks} if blocks else {}),
        **({} if words is None else {"vocab_size": words}),
    }


def is_adapter(file: GgufFile) -> bool:
    """Whether a GGUF file is an adapter, and no model."""
    return bool(file.value("general.type") == "adapter")
