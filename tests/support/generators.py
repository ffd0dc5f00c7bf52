"""Small models that generate, adapters for them, and the texts that transformers generates with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from lora_export.runtime.runner import Runner

VOCABULARY = 60
LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
OPT: dict[str, Any] = {**LLAMA_LIKE, "ffn_dim": 64, "word_embed_proj_dim": 32}

DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_LIKE)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA_LIKE, head_dim=8)),
    # Every other layer reads the last 8 tokens only.
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**LLAMA_LIKE, head_dim=8, sliding_window=8, sliding_window_pattern=2)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT, bos_token_id=1, eos_token_id=2, pad_token_id=0)),
    "gptoss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**LLAMA_LIKE, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**LLAMA_LIKE, num_local_experts=4)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**LLAMA_LIKE)),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
}
PROMPTS = ([5, 9, 11, 30], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [42])  # one batch of three lengths


def small_decoder(name: str, folder: Path) -> Path:
    """A model with random weights and a tokenizer. No token ends a text."""
    torch.manual_seed(0)
    module = DECODERS[name]().eval()
    module.generation_config.eos_token_id = None
    module.generation_config.pad_token_id = 0
    module.save_pretrained(folder)
    words = {"<pad>": 0} | {f"w{number}": number for number in range(1, VOCABULARY)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>")
    tokenizer.chat_template = "{% for message in messages %}w1 {{ message['content'] }} w2{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def decoder_adapter(base: Path, folder: Path, *, seed: int = 1) -> Path:
    """A PEFT adapter on all linear layers that changes the texts."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    model = hf.AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def expected_tokens(
    base: Path, prompts: Sequence[Sequence[int]], adapter: Path | None = None, *, count: int = 64
) -> list[list[int]]:
    """What transformers generates after the prompts, one padded batch, taking the most probable tokens."""
    module: Any = hf.AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        module = peft.PeftModel.from_pretrained(module, adapter).eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made = module.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    tokens: list[list[int]] = made[:, longest:].tolist()
    return tokens


def assert_same_logits(runner: Runner, module: Any) -> None:
    """A batch of three rows, one of them padded on the left: the logits of every token are those of the module."""
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (3, 24))
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        expected = module(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()
    found = runner.run({"input_ids": ids, "attention_mask": mask})["logits"]
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], rtol=0, atol=2e-6)
    assert np.abs(expected).max() > 0.1
