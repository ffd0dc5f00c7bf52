"""Generated checkpoints in bf16 with random weights, and adapters for them: Llama shapes, and experts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.storage import safetensors_file

RANK = 16
EXPERTS, EXPERT_LAYERS, EXPERT_RANK = 128, 8, 8
HIDDEN_OF_EXPERTS, INNER_OF_EXPERTS = 1024, 512
QUERY_VALUE = ["self_attn.q_proj", "self_attn.v_proj"]


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama. The default has 1.1 billion parameters."""

    hidden: int = 2048
    inner: int = 5632
    layers: int = 22
    heads: int = 32
    key_value_heads: int = 4
    words: int = 32000

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block, and their shapes."""
        keys = self.hidden // self.heads * self.key_value_heads
        sizes = zip("qkvo", (self.hidden, keys, keys, self.hidden), strict=True)
        return {
            **{f"self_attn.{name}_proj": (size, self.hidden) for name, size in sizes},
            **{f"mlp.{name}_proj": (self.inner, self.hidden) for name in ("gate", "up")},
            "mlp.down_proj": (self.hidden, self.inner),
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        layer: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in self.linear.items()}
        layer |= {"input_layernorm.weight": (self.hidden,), "post_attention_layernorm.weight": (self.hidden,)}
        layers = {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in layer.items()}
        ends = {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.words, self.hidden)}
        return {"model.embed_tokens.weight": (self.words, self.hidden), **layers, **ends}

    @property
    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
            "vocab_size": self.words, "hidden_size": self.hidden, "intermediate_size": self.inner,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads, "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
        }  # fmt: skip


def llama(folder: Path, shape: LlamaShape | None = None, shards: int = 4) -> Path:
    """A checkpoint of this shape in so many files."""
    shape = shape or LlamaShape()
    parts = np.array_split(list(shape.tensors), shards)
    return _checkpoint(folder, ({str(name): shape.tensors[name] for name in part} for part in parts), shape.config)


def adapter(folder: Path, targets: Iterable[str] | None = None, shape: LlamaShape | None = None, seed: int = 1) -> Path:
    """An adapter of rank 16 on these linear layers of every block; None: on all of them."""
    shape, rng = shape or LlamaShape(), np.random.default_rng(seed)
    chosen = list(shape.linear) if targets is None else list(targets)
    tensors = {}
    for layer in range(shape.layers):
        for target in chosen:
            rows, columns = shape.linear[target]
            name = f"base_model.model.model.layers.{layer}.{target}"
            tensors[f"{name}.lora_A.weight"] = _normal(rng, RANK, columns)
            tensors[f"{name}.lora_B.weight"] = _normal(rng, rows, RANK)
    return _adapter(folder, tensors, r=RANK, lora_alpha=2 * RANK, target_modules=chosen)


def experts(folder: Path) -> Path:
    """A Qwen3-MoE of 1.6 billion parameters: 8 layers of 128 experts, which are stored together."""
    count, hidden, inner = EXPERTS, HIDDEN_OF_EXPERTS, INNER_OF_EXPERTS

    def layer(number: int) -> dict[str, tuple[int, ...]]:
        name = f"model.layers.{number}"
        return {
            f"{name}.mlp.experts.gate_up_proj": (count, 2 * inner, hidden),
            f"{name}.mlp.experts.down_proj": (count, hidden, inner),
            f"{name}.mlp.gate.weight": (count, hidden),
            **{f"{name}.self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"},
        }

    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16", "vocab_size": 1000,
        "hidden_size": hidden, "moe_intermediate_size": inner, "num_experts": count, "num_attention_heads": 8,
        "num_hidden_layers": EXPERT_LAYERS, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    return _checkpoint(folder, map(layer, range(EXPERT_LAYERS)), config)


def expert_adapter(folder: Path) -> Path:
    """An adapter of rank 8 on every expert, as PEFT saves it."""
    rng, count, hidden, inner = np.random.default_rng(1), EXPERTS, HIDDEN_OF_EXPERTS, INNER_OF_EXPERTS
    tensors = {}
    for layer in range(EXPERT_LAYERS):
        name = f"base_model.model.model.layers.{layer}.mlp.experts"
        for owner, columns, rows in ((f"{name}.base_layer", hidden, 2 * inner), (name, inner, hidden)):
            tensors[f"{owner}.lora_A.weight"] = _normal(rng, count * EXPERT_RANK, columns)
            tensors[f"{owner}.lora_B.weight"] = _normal(rng, rows, EXPERT_RANK * count)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return _adapter(
        folder, tensors, r=EXPERT_RANK, lora_alpha=2 * EXPERT_RANK, target_modules=[], target_parameters=parameters
    )


def _normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return np.float32(0.02) * rng.standard_normal(shape, np.float32)


def _checkpoint(folder: Path, files: Iterable[Mapping[str, tuple[int, ...]]], config: Mapping[str, Any]) -> Path:
    """Random weights of these shapes, file by file: memory holds one file."""
    folder.mkdir()
    rng, index, every = np.random.default_rng(0), {}, list(files)
    for number, shapes in enumerate(every, 1):
        file = f"model-{number:05}-of-{len(every):05}.safetensors"
        tensors = {name: _normal(rng, *shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
        safetensors_file.write(folder / file, tensors, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _adapter(folder: Path, tensors: Mapping[str, NDArray[np.float32]], **config: Any) -> Path:
    folder.mkdir()
    safetensors_file.write(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.21.2", **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
