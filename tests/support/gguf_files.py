"""Small GGUF files, written by the package gguf: a Llama whose rows of q and k are in llama.cpp's order."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

Array = NDArray[Any]
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 64}
HEADS, KEY_HEADS = 4, 2
# Types of blocks with scales that are written at random -> the positions of their fp16 numbers, and these
HALVES: Mapping[Kind, Mapping[int, float]] = {
    Kind.Q2_K: {80: 0.02, 82: 0.01},
    Kind.Q3_K: {108: 0.003},
    Kind.Q4_K: {0: 0.0008, 2: 0.006},
    Kind.Q5_K: {0: 0.0004, 2: 0.006},
    Kind.Q6_K: {208: 0.00006},
    Kind.IQ4_NL: {0: 0.003},
    Kind.IQ4_XS: {0: 0.0002},
    Kind.IQ2_XS: {0: 0.01},
}


@functools.cache
def llama(*, tied: bool = False) -> LlamaForCausalLM:
    """The model of the files, always the same."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **heads, initializer_range=0.15, tie_word_embeddings=tied)).eval()


def llama_rows(weight: Array, heads: int) -> Array:
    """The rows of q or k in llama.cpp's order."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def blocks(kind: Kind, shape: tuple[int, ...]) -> Array:
    """Blocks of a type that gguf cannot quantise to: random codes and scales, (rows, bytes)."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    found = np.random.default_rng(kind).integers(0, 256, (int(np.prod(shape)) // elements, size), dtype=np.uint8)
    for position, value in HALVES[kind].items():
        found[:, position : position + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    return found.reshape(*shape[:-1], -1)


def write_llama(
    path: Path,
    kind: Kind | Callable[[str], Kind] = Kind.F32,
    *,
    model: PreTrainedModel | None = None,
    heads: int = 0,
    fields: Callable[[gguf.GGUFWriter], object] = lambda _: None,
) -> Path:
    """Write the model with its matrices in a type, or in that which its name has.

    `fields` adds fields, `heads` states another number of heads.
    """
    model = model or llama()
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads or config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
    writer.add_token_scores([0.5] * config.vocab_size)
    fields(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.float().numpy()
        own_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        number = own_heads.get(name.split(".")[-2])
        array = array if number is None else llama_rows(array, number)
        own = Kind.F32 if array.ndim == 1 else kind if isinstance(kind, Kind) else kind(name)
        stored = blocks(own, array.shape) if own in HALVES else gguf.quants.quantize(np.ascontiguousarray(array), own)
        writer.add_tensor(names.get_name(name, (".weight",)), stored, raw_dtype=own)
    return written(writer, path)


def write_model(
    path: Path, architecture: gguf.MODEL_ARCH, model: PreTrainedModel, *, norms: float = 0, words: Sequence[str] = ()
) -> Path:
    """Write a model whose rows llama.cpp has in transformers' order, its linear layers in Q4_0, `norms` added to norms.

    What llama.cpp does not have is left out: a pooler, and a head that is the embedding. Experts are stacked, in F32.
    """
    config, writer = model.config, gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", config.num_attention_heads))
    if words:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(words)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, value in _of_files(model):
        own = names.get_name(name, (".weight", ".bias"))
        is_linear = value.ndim == 2 and "embed" not in name
        if own is None or "pooler" in name or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        kind, array = Kind.Q4_0 if is_linear else Kind.F32, value.numpy() + (norms if "norm" in name else 0)
        writer.add_tensor(own, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    return written(writer, path)


def stacked_experts(path: Path) -> Path:
    """A file of Qwen3-MoE with the stacks of one layer alone."""
    writer, rng = gguf.GGUFWriter(str(path), "qwen3moe"), np.random.default_rng(0)
    writer.add_block_count(1)
    writer.add_expert_count(3)
    for part, shape in (("gate", (3, 64, 32)), ("up", (3, 64, 32)), ("down", (3, 32, 64))):
        stored = gguf.quants.quantize(rng.standard_normal(shape).astype(np.float32), Kind.Q8_0)
        writer.add_tensor(f"blk.0.ffn_{part}_exps.weight", stored, raw_dtype=Kind.Q8_0)
    return written(writer, path)


def _of_files(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model, the stacks of its experts under the names that the package gguf maps."""
    for name, value in model.state_dict().items():
        if name.endswith("gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), value.chunk(2, 1), strict=True):
                yield name.replace("gate_up_proj", f"{part}.weight"), half
        else:
            yield name if value.ndim < 3 else f"{name}.weight", value


def runnable(writer: gguf.GGUFWriter) -> None:
    """What llama.cpp needs beside the tensors. The model has no words."""
    writer.add_context_length(64)
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_layer_norm_rms_eps(llama().config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(SIZES["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def with_words(writer: gguf.GGUFWriter) -> None:
    """As `runnable`, with a tokenizer as Llama has it, whose words are letters and numbers."""
    runnable(writer)
    writer.add_tokenizer_model("llama")
    letters = ["<unk>", "<s>", "</s>", "\u2581", *string.ascii_letters, *string.digits]
    writer.add_token_list(letters[: SIZES["vocab_size"]])
    writer.add_token_types([2, 3, 3, *[1] * (SIZES["vocab_size"] - 3)])


def calibration_of(path: Path) -> Path:
    """Rows of words for the model, as arrays."""
    np.savez(path, input_ids=np.random.default_rng(0).integers(0, SIZES["vocab_size"], (60, 16)))
    return path


def written(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors_of(path: Path) -> list[gguf.ReaderTensor]:
    """The tensors of a file, read once: the package gguf takes long for its fields."""
    status = path.stat()
    return _read(path, status.st_ino, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read(path: Path, *_state: int) -> list[gguf.ReaderTensor]:
    return gguf.GGUFReader(path).tensors


def values_of(path: Path) -> dict[str, Array]:
    """All tensors as the package gguf reads them, in fp32."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in tensors_of(path)
    }


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in tensors_of(path)}
