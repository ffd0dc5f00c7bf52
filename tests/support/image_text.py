"""Small models that read images among their tokens, with processors made without downloads, and images for them."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from support.small_models import MODELS, small_model

# As in the configs of `small_models`, where 5 is an image's token
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<video>", "<image>", "<video_pad>", "<vision_start>", "<vision_end>"]
TILES = ["<fake_token_around_image>", "<global-img>", *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2))]
PARTS = [*TILES, "[IMG_BREAK]", "[IMG_END]"]
WORDS = ["what", "is", "on", "this", "picture", "and", "that", "one", "?", ":", "compare", "with"]
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} :"
)
TARGETS = r".*(q_proj|v_proj|qkv|fc1|down_proj|linear_[12]|projector\.linear|merger\.mlp\.0|modality_projection\.proj)"
UNREAD = r".*vision_tower\.encoder\.layers\.1\..*"  # LLaVA takes the last layer but one


def image_text_model(name: str, folder: Path) -> Path:
    """A model of `small_models` with a tokenizer and a processor in its folder."""
    small_model(name, folder)
    model = getattr(hf, MODELS[name][0]).from_pretrained(folder)
    with torch.no_grad():  # as they are drawn, all texts go on with one token
        for key, parameter in model.named_parameters():
            if not parameter.any() and "mm_input_projection" in key:
                parameter.normal_(std=0.02)  # Gemma 3's projector is made of zeros
            if parameter.ndim > 1 and not (model.config.tie_word_embeddings and "embed_tokens" in key):
                is_divided = key.endswith("multi_modal_projector.linear.weight")  # PaliGemma's features, by its width
                parameter.mul_(64 if is_divided else 8)
    model.save_pretrained(folder)
    image_text_processor(name, folder)
    return folder


def image_text_processor(name: str, folder: Path) -> None:
    """The image processor and the tokenizer of a model."""
    PROCESSORS.get(name, _qwen2_vl)().save_pretrained(folder)
    tokenizer = _tokenizer()
    tokenizer.chat_template = CHAT.replace("<image>", MARKERS.get(name, "<image>"))
    tokenizer.save_pretrained(folder)


# What a prompt has where an image is read; for all others <image>
MARKERS = {"gemma3": "<vision_start>"}
SQUARE = {"height": 16, "width": 16}
IN_TILES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}


def _qwen2_vl() -> Any:
    size = {"shortest_edge": 64, "longest_edge": 4096}
    return hf.Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, size=size)


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": lambda: hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SQUARE),
    "llava_next": lambda: hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32], [16, 48]]
    ),
    **dict.fromkeys(("pixtral", "mistral3"), lambda: hf.PixtralImageProcessorPil(size={"longest_edge": 40})),
    "gemma3": lambda: hf.Gemma3ImageProcessorPil(size=SQUARE),
    "paligemma": lambda: hf.SiglipImageProcessorPil(size=SQUARE, image_seq_length=16),
    "internvl": lambda: hf.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=False, max_patches=4),
    "idefics3": lambda: hf.Idefics3ImageProcessorPil(**IN_TILES),
    "smolvlm": lambda: hf.SmolVLMImageProcessorPil(**IN_TILES),
}


def _tokenizer() -> Any:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS, *PARTS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    extra = {"image_token": "<image>", "video_token": "<video_pad>"}
    extra |= {"vision_bos_token": "<vision_start>", "vision_eos_token": "<vision_end>"}
    extra |= {"boi_token": "<vision_start>", "eoi_token": "<vision_end>"}  # Gemma 3
    extra |= {"start_image_token": "<vision_start>", "end_image_token": "<vision_end>"}  # InternVL
    extra |= {"context_image_token": "<image>"} | {f"part_{number}": token for number, token in enumerate(PARTS)}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=extra,
    )  # fmt: skip


def image_text_adapter(name: str, base: Path, folder: Path, *, inside: str = "", seed: int = 1) -> Path:
    """An adapter of tower, projector and decoder; of the modules alone whose names have `inside`."""
    torch.manual_seed(seed)
    model = getattr(hf, MODELS[name][0]).from_pretrained(base)
    config = peft.LoraConfig(
        r=2, lora_alpha=8, init_lora_weights=False, target_modules=f"(?!{UNREAD}).*{inside}{TARGETS}"
    )
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


def image_files(folder: Path, *sizes: tuple[int, int]) -> list[Path]:
    """Images of these widths and heights, each with its own noise."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(folder / f"image{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def generated_by_transformers(
    name: str, base: Path, adapter: Path | None, texts: Sequence[str], images: Sequence[Sequence[Path]], tokens: int
) -> list[list[int]]:
    """The new tokens of `transformers.generate`, each text alone, with the adapter of PEFT."""
    model = getattr(hf, MODELS[name][0]).from_pretrained(base).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    found = []
    for text, paths in zip(texts, images, strict=True):
        inputs = processor_inputs(name, base, text, [Image.open(path) for path in paths])
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        found.append(made[0, inputs["input_ids"].shape[1] :].tolist())
    return found


def processor_inputs(name: str, base: Path, text: str, images: Sequence[Any]) -> dict[str, Any]:
    """What the processor of a model makes of a text with images."""
    parts = hf.AutoImageProcessor.from_pretrained(base), hf.AutoTokenizer.from_pretrained(base)
    if name in FULL_PROCESSORS:
        made = dict(FULL_PROCESSORS[name](*parts)(images=[list(images)], text=[text], return_tensors="pt"))
        return {key: value for key, value in made.items() if key not in ("labels", "num_crops", "rows", "cols")}
    processor, tokenizer = parts
    inputs = dict(processor(list(images), return_tensors="pt"))
    grids = inputs.get("image_grid_thw", torch.tensor([[1, 8, 8]] * len(images)))  # LLaVA: 16 tokens of an image
    for count in grids.prod(1) // 4:  # as the processors of both do it; that of Qwen2-VL needs torchvision
        text = text.replace("<image>", " ".join(["<mark>"] * int(count)), 1)
    inputs |= dict(tokenizer([text.replace("<mark>", "<image>")], return_tensors="pt"))
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == 5).long()
    inputs.pop("token_type_ids", None)
    return inputs


def _without_videos(processor: type[Any], *parts: Any, **options: Any) -> Any:
    """A processor that also takes videos, which need torchvision, without them."""
    with mock.patch.object(processor, "check_argument_for_proper_class"):
        return processor(*parts, mock.Mock(spec=[], model_input_names=[]), **options)


def _pixtral(*parts: Any, merge: int = 1) -> Any:
    """The processor of Pixtral, with the module of its image processor that needs no torchvision."""
    package = "transformers.models.pixtral."
    pil = importlib.import_module(f"{package}image_processing_pil_pixtral")
    with mock.patch.dict(sys.modules, {f"{package}image_processing_pixtral": pil}):
        own = importlib.import_module(f"{package}processing_pixtral")
    return own.PixtralProcessor(*parts, patch_size=4, spatial_merge_size=merge, image_token="<image>")


FULL_PROCESSORS: dict[str, Callable[..., Any]] = {
    "llava_next": lambda *parts: hf.LlavaNextProcessor(
        *parts, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ),
    "pixtral": _pixtral,
    "mistral3": functools.partial(_pixtral, merge=2),
    "gemma3": lambda *parts: hf.Gemma3Processor(*parts, image_seq_length=4),
    "paligemma": hf.PaliGemmaProcessor,
    "internvl": lambda *parts: _without_videos(hf.InternVLProcessor, *parts, image_seq_length=4),
    "idefics3": lambda *parts: hf.Idefics3Processor(*parts, image_seq_len=4),
    "smolvlm": lambda *parts: hf.Idefics3Processor(*parts, image_seq_len=4),  # its own writes the same, but for videos
}
