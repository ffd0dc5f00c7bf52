"""Small models that generate, adapters for them, and the texts that transformers generates with them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import peft
import torch
import transformers as hf
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers

from lora_export.models.cached_decoder import export_decoder
from lora_export.models.load import load_model
from lora_export.runtime.runner import Runner

VOCABULARY = 60
LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
OPT: dict[str, Any] = {**LLAMA_LIKE, "num_hidden_layers": 1, "ffn_dim": 64, "word_embed_proj_dim": 32}
STATES = {**LLAMA_LIKE, "num_hidden_layers": 3}
MAMBA: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
MAMBA |= {"tie_word_embeddings": False}
LINEAR: dict[str, Any] = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
HEADS_OF_STATES: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 2}


def around_attention(kind: str) -> list[str]:
    """Kinds of three layers: attention between two others."""
    return [kind, "full_attention", kind]


DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA_LIKE, head_dim=16)),
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
    "lfm2": lambda: hf.Lfm2ForCausalLM(
        hf.Lfm2Config(**STATES, tie_word_embeddings=False, initializer_range=0.3, layer_types=around_attention("conv"))
    ),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(**MAMBA, state_size=4)),
    "mamba2": lambda: hf.Mamba2ForCausalLM(hf.Mamba2Config(**MAMBA, state_size=4, num_heads=8, head_dim=8, n_groups=2)),
    "falcon_mamba": lambda: hf.FalconMambaForCausalLM(hf.FalconMambaConfig(**MAMBA, state_size=4)),
    "qwen3_next": lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(**STATES, **LINEAR, **EXPERTS, head_dim=8, layer_types=around_attention("linear_attention"))
    ),
    "olmo_hybrid": lambda: hf.OlmoHybridForCausalLM(
        hf.OlmoHybridConfig(
            **STATES, **LINEAR | {"linear_num_key_heads": 4}, layer_types=around_attention("linear_attention")
        )
    ),
    "jamba": lambda: hf.JambaForCausalLM(
        hf.JambaConfig(
            **LLAMA_LIKE, attn_layer_period=2, attn_layer_offset=1, num_experts=4, mamba_d_state=4, mamba_dt_rank=4
        )
    ),
    "bamba": lambda: hf.BambaForCausalLM(hf.BambaConfig(**STATES, **HEADS_OF_STATES, attn_layer_indices=[1])),
    "falcon_h1": lambda: hf.FalconH1ForCausalLM(
        hf.FalconH1Config(**STATES, **HEADS_OF_STATES, head_dim=8, mamba_d_ssm=64)
    ),
    "granite_hybrid": lambda: hf.GraniteMoeHybridForCausalLM(
        hf.GraniteMoeHybridConfig(
            **STATES, **HEADS_OF_STATES, layer_types=["mamba", "attention", "mamba"], num_local_experts=4,
            num_experts_per_tok=2, shared_intermediate_size=16,
        )
    ),
}  # fmt: skip
# Those whose graph takes one token of each row at once
STEPWISE = {"mamba", "mamba2", "falcon_mamba", "qwen3_next", "olmo_hybrid", "jamba", "bamba", "falcon_h1"}
STEPWISE |= {"granite_hybrid"}
# Weights of this size give texts that vary.
BART_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "init_std": 0.3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
FRAMES, MELS = 40, 8
GEMMA: dict[str, Any] = {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 8, "initializer_range": 0.3}
T5: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
ENCODER_DECODERS: dict[str, Callable[[], Any]] = {
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**T5, initializer_factor=3.0, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
    ),
    "t5 of one layer": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**T5 | {"num_layers": 1}, initializer_factor=3.0, decoder_start_token_id=0)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(**BART_LIKE, max_position_embeddings=128, forced_eos_token_id=7)
    ),
    "t5gemma": lambda: hf.T5GemmaForConditionalGeneration(
        hf.T5GemmaConfig(encoder=GEMMA, decoder=GEMMA, vocab_size=VOCABULARY)
    ),
    # Its encoder attends to blocks of 5 tokens: at positions of padding all is masked.
    "longt5": lambda: hf.LongT5ForConditionalGeneration(
        hf.LongT5Config(**T5, initializer_factor=3.0, decoder_start_token_id=0, local_radius=4)
    ),
    "whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **BART_LIKE,
            num_mel_bins=MELS,
            max_source_positions=FRAMES // 2,
            max_target_positions=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            begin_suppress_tokens=[3, 4],
            suppress_tokens=[5, 6],
        )
    ),
}
VIT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VIT |= {"image_size": 16, "patch_size": 4, "initializer_range": 0.3}
OF_ENCODER: dict[str, Any] = {"is_decoder": True, "add_cross_attention": True}
MBART: dict[str, Any] = {name: value for name, value in BART_LIKE.items() if not name.startswith("encoder")}
MBART |= {"max_position_embeddings": 128, "pad_token_id": 0, **OF_ENCODER}


def _image_to_text(encoder: Any, decoder: Any) -> Any:
    module = hf.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    for config in (module.config, module.generation_config):
        config.decoder_start_token_id, config.pad_token_id = 1, 0
    return module


ENCODER_DECODERS |= {
    "trocr": lambda: _image_to_text(
        hf.ViTModel(hf.ViTConfig(**VIT)), hf.TrOCRForCausalLM(hf.TrOCRConfig(**MBART, cross_attention_hidden_size=32))
    ),
    "vit-gpt2": lambda: _image_to_text(
        hf.ViTModel(hf.ViTConfig(**VIT)), hf.GPT2LMHeadModel(hf.GPT2Config(**GPT, initializer_range=0.3, **OF_ENCODER))
    ),
    "donut": lambda: _image_to_text(
        hf.DonutSwinModel(
            hf.DonutSwinConfig(
                image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4,
                initializer_range=0.3,
            )
        ),
        hf.MBartForCausalLM(hf.MBartConfig(**MBART, is_encoder_decoder=False)),
    ),
}  # fmt: skip
PROMPTS = ([5, 9, 11, 30], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [42])  # one batch of three lengths


def small_decoder(name: str, folder: Path) -> Path:
    """A model with random weights and a tokenizer. No token ends a text."""
    torch.manual_seed(0)
    module = DECODERS[name]().eval()
    module.generation_config.eos_token_id = None
    module.generation_config.pad_token_id = 0
    module.save_pretrained(folder)
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}w1 {{ message['content'] }} w2{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def exported_decoder(name: str) -> tuple[Any, ir.Model]:
    """A decoder in eval mode, and a copy of its graph with a cache. A process exports it once: that takes 4 s."""
    module, program = _exported_decoder(name)
    return module, program.clone()


@functools.cache
def _exported_decoder(name: str) -> tuple[Any, ir.Model]:
    with tempfile.TemporaryDirectory() as folder:  # loaded as by commands: tests of these have the same graph
        module: Any = load_model(str(small_decoder(name, Path(folder)))).module
    if name == "opt":
        module.config.use_cache = False  # which an export with a cache overrides while it runs
    return module, export_decoder(module)


def small_tokenizer() -> Any:
    """A tokenizer whose words are w1, w2 and so on, by their ids."""
    words = {"<pad>": 0} | {f"w{number}": number for number in range(1, VOCABULARY)}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>")


def small_encoder_decoder(name: str, folder: Path) -> Path:
    """A model with an encoder and random weights. No token ends a text."""
    torch.manual_seed(0)
    module = ENCODER_DECODERS[name]().eval()
    module.generation_config.eos_token_id = None
    module.save_pretrained(folder)
    return folder


def encoder_decoder_adapter(base: Path, folder: Path, *, seed: int = 1, targets: str = "all-linear") -> Path:
    """A PEFT adapter that changes the texts."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(_encoder_decoder(base), config).save_pretrained(folder)
    return folder


def _encoder_decoder(base: Path) -> Any:
    config: Any = hf.AutoConfig.from_pretrained(base)
    return getattr(hf, config.architectures[0]).from_pretrained(base).eval()


def sounds() -> list[NDArray[np.float32]]:
    """Features of three sounds, as an encoder reads them: [MELS, FRAMES]."""
    drawn = np.random.default_rng(0).standard_normal((3, MELS, FRAMES))
    return list(drawn.astype(np.float32))


def images() -> list[NDArray[np.float32]]:
    """Pixels of three images: [3, 16, 16]."""
    return list(np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32))


def expected_texts(
    base: Path, adapter: Path | None = None, *, count: int = 64, first: Sequence[int] = ()
) -> list[list[int]]:
    """What transformers generates for PROMPTS, or for the sounds, one batch, taking the most probable tokens.

    `first` are the first tokens of the decoder behind images, which are in the result.
    """
    module = _encoder_decoder(base)
    reads_texts = module.main_input_name == "input_ids"
    pad, model = module.generation_config.pad_token_id, module
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(module, adapter).eval()
    if reads_texts:
        longest = max(map(len, PROMPTS))
        ids = torch.tensor([[*prompt, *[pad] * (longest - len(prompt))] for prompt in PROMPTS])
        mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in PROMPTS])
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
        tokens: list[list[int]] = made[:, 1:].tolist()
        return tokens
    if module.main_input_name == "pixel_values":
        shown: list[list[int]] = model.generate(
            pixel_values=torch.tensor(np.stack(images())), max_new_tokens=count, do_sample=False,
            **({"decoder_input_ids": torch.tensor([first] * 3)} if first else {}),
        )[:, 1:].tolist()  # fmt: skip
        return shown
    features = torch.tensor(np.stack(sounds()))
    own: list[list[int]] = model.generate(input_features=features, max_new_tokens=count, do_sample=False).tolist()
    return own


def decoder_adapter(base: Path, folder: Path, *, seed: int = 1, targets: str | list[str] = "all-linear") -> Path:
    """A PEFT adapter on all linear layers, or on these, that changes the texts."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
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
    size = np.abs(expected).max()  # LFM2's logits reach 6.6, and PyTorch's own error is 7e-6 there
    assert size > 0.1
    np.testing.assert_allclose(found[mask == 1], expected[mask == 1], rtol=0, atol=2e-6 * max(1, size))
