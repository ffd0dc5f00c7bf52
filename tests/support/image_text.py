"""Small models that read images among their tokens, with processors made without downloads, and images for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from support.small_models import MODELS, small_model

# As in the configs of `small_models`, where 5 is an image's token
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<video>", "<image>", "<video_pad>", "<vision_start>", "<vision_end>"]
WORDS = ["what", "is", "on", "this", "picture", "and", "that", "one", "?", ":", "compare", "with"]
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} :"
)
TARGETS = r".*(q_proj|v_proj|qkv|fc1|down_proj|linear_1|linear_2|merger\.mlp\.0)"
UNREAD = r".*vision_tower\.encoder\.layers\.1\..*"  # LLaVA takes the last layer but one


def image_text_model(name: str, folder: Path) -> Path:
    """A model of `small_models` with a tokenizer and a processor in its folder."""
    small_model(name, folder)
    model = getattr(hf, MODELS[name][0]).from_pretrained(folder)
    with torch.no_grad():  # as they are drawn, all texts go on with one token
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer = _tokenizer()
    made: Any
    if name == "llava":
        made = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    else:
        size = {"shortest_edge": 64, "longest_edge": 4096}
        made = hf.Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2, size=size)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    extra = {"image_token": "<image>", "video_token": "<video_pad>"}
    extra |= {"vision_bos_token": "<vision_start>", "vision_eos_token": "<vision_end>"}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=extra,
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


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
    processor, tokenizer = hf.AutoImageProcessor.from_pretrained(base), hf.AutoTokenizer.from_pretrained(base)
    found = []
    for prompt, own in zip(texts, images, strict=True):
        text = prompt
        inputs = dict(processor([Image.open(path) for path in own], return_tensors="pt"))
        grids = inputs.get("image_grid_thw", torch.tensor([[1, 8, 8]] * len(own)))  # LLaVA: 16 tokens of an image
        for count in grids.prod(1) // 4:  # as the processors of both do it; that of Qwen2-VL needs torchvision
            text = text.replace("<image>", " ".join(["<mark>"] * int(count)), 1)
        inputs |= dict(tokenizer([text.replace("<mark>", "<image>")], return_tensors="pt"))
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == 5).long()
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            made = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        found.append(made[0, inputs["input_ids"].shape[1] :].tolist())
    return found
