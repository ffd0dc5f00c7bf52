"""Further small models of the matrix: decoders, encoders and models of images, beside those of `small_models`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

from support.small_models import ENCODER_DECODER, IMAGE, TEXT, VISION

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Heads of 16: onnxruntime's attention with a cache takes no smaller ones.
DECODER = {**TEXT, **IDS, "hidden_size": 32, "num_key_value_heads": 2}
HEADS = {**DECODER, "head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}


def _of(name: str, **fields: Any) -> Callable[[], Any]:
    return lambda: getattr(hf, f"{name}Config")(**fields)


def _sam() -> Any:
    vision = {
        **VISION,
        **IMAGE,
        "output_channels": 8,
        "mlp_dim": 32,
        "window_size": 2,
        "global_attn_indexes": [1],
        "num_pos_feats": 4,
    }
    vision |= {"initializer_range": 0.02}  # its own, 1e-10, would leave nothing of an image
    decoder = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 16}
    decoder |= {"iou_head_hidden_dim": 8, "attention_downsample_rate": 2}
    prompts = {"hidden_size": 8, "image_size": 16, "patch_size": 4, "mask_input_channels": 4}
    return hf.SamConfig(vision_config=vision, mask_decoder_config=decoder, prompt_encoder_config=prompts)


def _parakeet() -> Any:
    encoder = {
        **TEXT,
        "num_mel_bins": 8,
        "subsampling_factor": 4,
        "subsampling_conv_channels": 4,
        "conv_kernel_size": 3,
    }
    return hf.ParakeetCTCConfig(encoder_config=encoder, vocab_size=20, pad_token_id=19)


def _t5gemma() -> Any:
    part = {**HEADS, "num_hidden_layers": 2, "sliding_window": 8}
    return hf.T5GemmaConfig(encoder=part, decoder=part, vocab_size=60)


SERIES = {"context_length": 16, "patch_length": 4, "patch_stride": 4, "num_input_channels": 3, "d_model": 16}
CHARACTERS = {name: value for name, value in TEXT.items() if name != "vocab_size"}
MOONSHINE = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, **IDS, "decoder_start_token_id": 1}
MOONSHINE |= {
    f"{part}_num_{what}": 2 for part in ("encoder", "decoder") for what in ("hidden_layers", "attention_heads")
}

# name -> class, and a function that makes its config
MORE_MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    # Encoders
    "mpnet": ("MPNetModel", _of("MPNet", **TEXT, max_position_embeddings=66)),
    "albert": ("AlbertModel", _of("Albert", **TEXT, embedding_size=16, max_position_embeddings=64)),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", _of("XLMRoberta", **TEXT, max_position_embeddings=66)),
    "camembert": ("CamembertForMaskedLM", _of("Camembert", **TEXT, max_position_embeddings=66)),
    "squeezebert": (
        "SqueezeBertModel",
        _of(
            "SqueezeBert", **TEXT, embedding_size=16, q_groups=1, k_groups=1, v_groups=1, post_attention_groups=1,
            intermediate_groups=1, output_groups=1,
        ),
    ),
    "pegasus": (
        "PegasusForConditionalGeneration",
        _of("Pegasus", **ENCODER_DECODER, vocab_size=60, max_position_embeddings=64, **IDS, decoder_start_token_id=0),
    ),
    "t5gemma": ("T5GemmaForConditionalGeneration", _t5gemma),
    "longt5": (
        "LongT5ForConditionalGeneration",
        _of(
            "LongT5", vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, local_radius=4,
            decoder_start_token_id=0,
        ),
    ),
    # Decoders
    "gpt_neox": ("GPTNeoXForCausalLM", _of("GPTNeoX", **TEXT)),
    "gptj": ("GPTJForCausalLM", _of("GPTJ", vocab_size=60, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)),
    "llama": ("LlamaForCausalLM", _of("Llama", **DECODER)),
    "qwen2": ("Qwen2ForCausalLM", _of("Qwen2", **DECODER)),
    "mistral": ("MistralForCausalLM", _of("Mistral", **DECODER)),
    "mixtral": ("MixtralForCausalLM", _of("Mixtral", **DECODER, num_local_experts=4)),
    "qwen3": ("Qwen3ForCausalLM", _of("Qwen3", **HEADS)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _of("Qwen3Moe", **HEADS, **EXPERTS, num_experts=4)),
    "gemma2": ("Gemma2ForCausalLM", _of("Gemma2", **HEADS, sliding_window=8)),
    "gemma3_text": ("Gemma3ForCausalLM", _of("Gemma3Text", **HEADS, sliding_window=8)),
    "phi": ("PhiForCausalLM", _of("Phi", **DECODER)),
    "phi3": ("Phi3ForCausalLM", _of("Phi3", **DECODER)),
    "falcon": ("FalconForCausalLM", _of("Falcon", **TEXT, **IDS)),
    "bloom": ("BloomForCausalLM", _of("Bloom", vocab_size=60, hidden_size=16, n_layer=2, n_head=2)),
    "mamba": ("MambaForCausalLM", _of("Mamba", vocab_size=60, hidden_size=16, num_hidden_layers=2, state_size=4)),
    "smollm3": ("SmolLM3ForCausalLM", _of("SmolLM3", **DECODER)),
    "olmo2": ("Olmo2ForCausalLM", _of("Olmo2", **DECODER)),
    "granite": ("GraniteForCausalLM", _of("Granite", **DECODER)),
    "helium": ("HeliumForCausalLM", _of("Helium", **HEADS)),
    "glm": ("GlmForCausalLM", _of("Glm", **HEADS)),
    "glm4": ("Glm4ForCausalLM", _of("Glm4", **HEADS)),
    "cohere": ("CohereForCausalLM", _of("Cohere", **DECODER)),
    "cohere2": ("Cohere2ForCausalLM", _of("Cohere2", **DECODER, sliding_window=8)),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        _of(
            "DeepseekV3", **DECODER, **LATENT, **EXPERTS, n_routed_experts=4, n_group=2, topk_group=1,
            first_k_dense_replace=1,
        ),
    ),
    "gpt_oss": (
        "GptOssForCausalLM", _of("GptOss", **HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    ),
    "stablelm": ("StableLmForCausalLM", _of("StableLm", **DECODER)),
    "starcoder2": ("Starcoder2ForCausalLM", _of("Starcoder2", **DECODER)),
    # Images
    "beit": ("BeitForImageClassification", _of("Beit", **VISION, **IMAGE, num_labels=3)),
    "resnet": (
        "ResNetForImageClassification",
        _of("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3),
    ),
    "dinov3": ("DINOv3ViTModel", _of("DINOv3ViT", **VISION, **IMAGE)),
    "sam": ("SamModel", _sam),
    "vjepa2": (
        "VJEPA2Model",
        _of(
            "VJEPA2", **VISION, patch_size=8, crop_size=16, frames_per_clip=4, tubelet_size=2, pred_hidden_size=16,
            pred_num_attention_heads=2, pred_num_hidden_layers=1, mlp_ratio=2,
        ),
    ),
    # Pages, characters, sounds, series
    "bros": ("BrosModel", _of("Bros", **TEXT | {"hidden_size": 64}, max_position_embeddings=40)),
    "canine": (
        "CanineModel",
        _of(
            "Canine", **CHARACTERS, num_hash_buckets=64, num_hash_functions=2, downsampling_rate=2,
            local_transformer_stride=8,
        ),
    ),
    "parakeet": ("ParakeetForCTC", _parakeet),
    "moonshine": ("MoonshineForConditionalGeneration", _of("Moonshine", **MOONSHINE)),
    "patchtst": (
        "PatchTSTForPrediction",
        _of("PatchTST", **SERIES, num_attention_heads=2, ffn_dim=32, num_hidden_layers=2, prediction_length=5),
    ),
    "patchtsmixer": ("PatchTSMixerForPrediction", _of("PatchTSMixer", **SERIES, num_layers=2, prediction_length=5)),
    # Texts with images among their tokens
}  # fmt: skip
