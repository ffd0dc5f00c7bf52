"""Small models of transformers' architectures, with seeded weights, as `save_pretrained` writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.pytorch_utils import Conv1D

TEXT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
ENCODER_DECODER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
ENCODER_DECODER |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
ENCODER_DECODER |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
GPT = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
SPEECH = {**TEXT, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 8}
SPEECH |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}


def _clip(model: str) -> Any:
    config = getattr(hf, f"{model}Config")
    text, vision = getattr(hf, f"{model}TextConfig"), getattr(hf, f"{model}VisionConfig")
    return config(
        text_config=text(**TEXT, max_position_embeddings=40, eos_token_id=2, bos_token_id=1, pad_token_id=0).to_dict(),
        vision_config=vision(**VISION, **IMAGE).to_dict(),
        projection_dim=8,
    )


def _blip() -> Any:
    text = {**TEXT, "encoder_hidden_size": 16, "max_position_embeddings": 40, "projection_dim": 8}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
    return hf.BlipConfig(
        text_config=text, vision_config={**VISION, **IMAGE, "projection_dim": 8}, image_text_hidden_size=8
    )


def _clap() -> Any:
    audio: dict[str, Any] = {"spec_size": 32, "num_mel_bins": 8, "window_size": 4, "patch_size": 4, "hidden_size": 16}
    audio |= {"patch_stride": (4, 4), "patch_embeds_hidden_size": 8, "depths": (1, 1), "num_attention_heads": (2, 2)}
    audio |= {"projection_dim": 8}
    text = {**TEXT, "max_position_embeddings": 40, "projection_dim": 8, "pad_token_id": 1}
    return hf.ClapConfig(text_config=text, audio_config=audio, projection_dim=8)


def _detr() -> Any:
    backbone = hf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], out_features=["stage2"])
    return hf.DetrConfig(
        **ENCODER_DECODER, num_queries=5, num_labels=3, use_timm_backbone=False, use_pretrained_backbone=False,
        backbone=None, backbone_config=backbone,
    )  # fmt: skip


# Of the language models with images among their tokens; the 5 is an image's token.
LANGUAGE = {**TEXT, "hidden_size": 32, "num_key_value_heads": 2, "head_dim": 16}
GRID = {"depth": 2, "num_heads": 2, "patch_size": 4, "in_channels": 3}


def _llava() -> Any:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, **IMAGE), text_config=hf.LlamaConfig(**LANGUAGE),
        image_token_index=5,
    )  # fmt: skip


def _llava_next() -> Any:
    return hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, **IMAGE), text_config=hf.LlamaConfig(**LANGUAGE),
        image_token_index=5, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32], [16, 48]],
    )  # fmt: skip


def _pixtral(name: str) -> Any:
    vision = hf.PixtralVisionConfig(**VISION, **IMAGE, head_dim=8)
    merging = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
    merging = merging if name == "Llava" else {"spatial_merge_size": 2}
    text = {**LANGUAGE, "model_type": "mistral"}
    return getattr(hf, f"{name}Config")(vision_config=vision, text_config=text, image_token_index=5, **merging)


def _paligemma() -> Any:
    vision = {**VISION, **IMAGE, "model_type": "siglip_vision_model", "vision_use_head": False}
    return hf.PaliGemmaConfig(
        vision_config=vision, text_config={**LANGUAGE, "model_type": "gemma"}, image_token_index=5, projection_dim=32
    )


def _gemma3() -> Any:
    return hf.Gemma3Config(
        text_config={**LANGUAGE, "sliding_window": 64}, vision_config={**VISION, **IMAGE, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=5, boi_token_index=6, eoi_token_index=7,
    )  # fmt: skip


def _internvl() -> Any:
    vision = {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}
    text = {**LANGUAGE, "model_type": "qwen2"}
    return hf.InternVLConfig(text_config=text, vision_config=vision, image_token_id=5)


def _idefics3(name: str) -> Any:
    vision = {**VISION, "image_size": 16, "patch_size": 4}
    text = {**LANGUAGE, "model_type": "llama", "pad_token_id": 0}
    return getattr(hf, f"{name}Config")(text_config=text, vision_config=vision, image_token_id=5, scale_factor=2)


def _qwen_vl(name: str, vision: dict[str, Any]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {**LANGUAGE, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2}
    tokens = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    return getattr(hf, f"{name}Config")(text_config=text, vision_config={**GRID, **vision}, **tokens)


# name -> class, and a function that makes its config
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    # Texts
    "bert": ("BertModel", lambda: hf.BertConfig(**TEXT, max_position_embeddings=64)),
    "roberta": ("RobertaModel", lambda: hf.RobertaConfig(**TEXT, max_position_embeddings=66)),
    "distilbert": (
        "DistilBertModel",
        lambda: hf.DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    ),
    "electra": ("ElectraModel", lambda: hf.ElectraConfig(**TEXT, embedding_size=16)),
    "deberta": ("DebertaV2Model", lambda: hf.DebertaV2Config(**TEXT, type_vocab_size=0)),
    "modernbert": (
        "ModernBertModel",
        lambda: hf.ModernBertConfig(
            **TEXT, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2
        ),
    ),
    "llama": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**TEXT)),
    "qwen2": ("Qwen2ForCausalLM", lambda: hf.Qwen2Config(**TEXT, num_key_value_heads=2)),
    "gpt2": ("GPT2LMHeadModel", lambda: hf.GPT2Config(**GPT, bos_token_id=1, eos_token_id=2)),
    "opt": (
        "OPTForCausalLM",
        lambda: hf.OPTConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
            word_embed_proj_dim=16,
        ),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        lambda: hf.T5Config(
            vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
            eos_token_id=2,
        ),
    ),
    "bart": (
        "BartForConditionalGeneration",
        lambda: hf.BartConfig(
            **ENCODER_DECODER, vocab_size=60, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=2, forced_eos_token_id=2,
        ),
    ),
    "mbart": (
        "MBartForConditionalGeneration",
        lambda: hf.MBartConfig(**ENCODER_DECODER, vocab_size=60, max_position_embeddings=64, pad_token_id=1),
    ),
    "layoutlm": ("LayoutLMModel", lambda: hf.LayoutLMConfig(**TEXT, max_2d_position_embeddings=100)),
    # Images
    "vit": ("ViTForImageClassification", lambda: hf.ViTConfig(**VISION, **IMAGE, num_labels=3)),
    "deit": ("DeiTForImageClassification", lambda: hf.DeiTConfig(**VISION, **IMAGE, num_labels=3)),
    "swin": (
        "SwinForImageClassification",
        lambda: hf.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3
        ),
    ),
    "convnext": (
        "ConvNextForImageClassification",
        lambda: hf.ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3, image_size=32, layer_scale_init_value=1.0
        ),
    ),
    "dinov2": (
        "Dinov2ForImageClassification",
        lambda: hf.Dinov2Config(**{**VISION, "mlp_ratio": 2}, **IMAGE, num_labels=3),
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        lambda: hf.SegformerConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_attention_heads=[1, 2], sr_ratios=[2, 1], num_encoder_blocks=2,
            patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
        ),
    ),
    "detr": ("DetrForObjectDetection", _detr),
    # Sound
    "whisper": (
        "WhisperForConditionalGeneration",
        lambda: hf.WhisperConfig(
            **ENCODER_DECODER, vocab_size=60, num_mel_bins=8, max_source_positions=20, max_target_positions=24,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1, suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
    ),
    "wav2vec2": ("Wav2Vec2ForCTC", lambda: hf.Wav2Vec2Config(**SPEECH)),
    "hubert": ("HubertForCTC", lambda: hf.HubertConfig(**SPEECH)),
    # Both, and texts with images
    "clip": ("CLIPModel", lambda: _clip("CLIP")),
    "siglip": ("SiglipModel", lambda: _clip("Siglip")),
    "blip": ("BlipForConditionalGeneration", _blip),
    "clap": ("ClapModel", _clap),
    # Texts with images among their tokens
    "llava": ("LlavaForConditionalGeneration", _llava),
    "llava_next": ("LlavaNextForConditionalGeneration", _llava_next),
    "pixtral": ("LlavaForConditionalGeneration", lambda: _pixtral("Llava")),
    "mistral3": ("Mistral3ForConditionalGeneration", lambda: _pixtral("Mistral3")),
    "paligemma": ("PaliGemmaForConditionalGeneration", _paligemma),
    "gemma3": ("Gemma3ForConditionalGeneration", _gemma3),
    "internvl": ("InternVLForConditionalGeneration", _internvl),
    "idefics3": ("Idefics3ForConditionalGeneration", lambda: _idefics3("Idefics3")),
    "smolvlm": ("SmolVLMForConditionalGeneration", lambda: _idefics3("SmolVLM")),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        lambda: _qwen_vl("Qwen2VL", {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}),
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        lambda: _qwen_vl(
            "Qwen2_5_VL",
            {
                "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 16,
                "fullatt_block_indexes": [1],
            },
        ),
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        lambda: _qwen_vl(
            "Qwen3VL",
            {
                "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
        ),
    ),
}  # fmt: skip


INSIDE = r"layer|block|stage|decoder|projector|merger|\bh\b"  # a part of the names of adapted layers


def small_adapter(name: str, base: Path, folder: Path, *, seed: int = 1, inside: str = INSIDE) -> Path:
    """Save an adapter, as PEFT writes it, for all linear layers inside the blocks of a small model."""
    torch.manual_seed(seed)
    model = getattr(hf, MODELS[name][0]).from_pretrained(base)
    outside = re.compile(r"head|predictions")
    targets = [
        module_name
        for module_name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and re.search(inside, module_name)
        and not outside.search(module_name)
    ]
    options = peft.LoraConfig(
        target_modules=targets, r=4, lora_alpha=2, init_lora_weights=False, fan_in_fan_out=name == "gpt2"
    )
    peft.get_peft_model(model, options).save_pretrained(folder)
    return folder


def small_model(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Save a small model of this architecture, with seeded weights, and return its folder."""
    architecture, config = MODELS[name]
    torch.manual_seed(seed)
    getattr(hf, architecture)(config()).save_pretrained(folder)
    return folder


WORDS = ["<pad>", "<unk>", "<eos>", "bad", "good", "very", "film", "a", "the"]


def words_tokenizer(folder: Path, *, pad: str | None = "<pad>") -> Path:
    """Save a tokenizer of nine words, which ends each text, in a model's folder."""
    tokens = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 2)])
    special = {"unk_token": "<unk>", "eos_token": "<eos>"} | ({"pad_token": pad} if pad else {})
    hf.PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(folder)
    return folder


def backtracking(folder: Path) -> Path:
    """Let the tokenizer in a folder split texts by a pattern that takes years on many letters a."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+b"},
        "behavior": "Isolated",
        "invert": False,
    }
    path.write_text(json.dumps(content))
    return folder
