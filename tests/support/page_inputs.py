"""The files that README, guide and the examples in `--help` name: a model, texts, adapters, graphs."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertModel, PreTrainedTokenizerFast

from lora_export.names.diffusion_layouts import other_layouts
from support import genai
from support.cli import call
from support.diffusion import adapter_file, clip_text_model, linear_shapes, random_pairs, unet
from support.exporters import a_llama, save_tokenizer
from support.fleets import stay_here
from support.graphs import quantised
from support.peft_models import fill

TOPICS = {
    "account": ["login", "password", "reset", "locked", "email", "blocked"],
    "billing": ["invoice", "refund", "price", "paid", "charge", "card"],
    "hardware": ["screen", "keyboard", "mouse", "battery", "broken", "noisy"],
}
FILLERS = ["the", "a", "of", "is", "my", "your", "please", "help", "with", "and", "not", "new", "old"]
WORDS = ["[PAD]", "[UNK]", *FILLERS, *(word for words in TOPICS.values() for word in words)]


class PageInputs:
    """Makes a file or folder at its first use, with a fixed seed, and copies it to whichever page names it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = functools.cache(self._path)

    def copy(self, name: str, target: Path) -> None:
        """Put an input into a page's folder."""
        source = self.path(name)
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        copy(source, target / name)

    def _path(self, name: str) -> Path:
        MAKERS[name](self, self.folder / name)
        return self.folder / name


def _base(_: PageInputs, path: Path) -> None:
    """A BERT of one layer, and a tokenizer of whole words."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(path)


def _texts(_: PageInputs, path: Path) -> None:
    rng = random.Random(0)
    lines = []
    for number in range(90):
        label = sorted(TOPICS)[number % 3]
        words = rng.sample(TOPICS[label], 2) + rng.sample(FILLERS, 4)
        rng.shuffle(words)
        lines.append(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def _adapter(inputs: PageInputs, path: Path) -> None:
    base, data = inputs.path("base"), inputs.path("texts.jsonl")
    assert call("train", base, "--data", data, "-o", path, "--target", "query,value", "--learning-rate", "1e-2") == 0


def _tuned(inputs: PageInputs, path: Path) -> None:
    """The base with other values in every matrix."""
    model = AutoModel.from_pretrained(inputs.path("base"))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)


def _kept(inputs: PageInputs, path: Path) -> None:
    """A merge of `fr` into the base; its residual is beside it."""
    base, adapter = inputs.path("base"), inputs.path("fr")
    assert call("merge", base, adapter, "-o", path, "--keep-residual", path.with_name("kept.residual")) == 0


def _peft_adapter(seed: int, base: str = "base", targets: str | list[str] = "all-linear") -> Callable[..., None]:
    def make(inputs: PageInputs, path: Path) -> None:
        model = AutoModel.from_pretrained(inputs.path(base)) if base == "base" else _decoder_module()
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
        model = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(seed)
        fill(model, std=0.1, generator=generator)
        model.save_pretrained(path)

    return make


def _loha(inputs: PageInputs, path: Path) -> None:
    torch.manual_seed(4)
    config = peft.LoHaConfig(r=2, alpha=4, target_modules=["query", "value"], init_weights=False)
    peft.get_peft_model(AutoModel.from_pretrained(inputs.path("base")), config).save_pretrained(path)


def _decoder_module() -> nn.Module:
    torch.manual_seed(0)
    return a_llama()


def _decoder(_: PageInputs, path: Path) -> None:
    _decoder_module().save_pretrained(path)
    save_tokenizer(path)


def _generating(inputs: PageInputs, path: Path) -> None:
    adapter = f"pirate={inputs.path('pirate')}"
    options = ("--lora", "inputs", "--with-cache", "--no-verify", "-o", path)
    assert call("onnx", inputs.path("decoder"), "-a", adapter, *options) == 0


def _genai(inputs: PageInputs, path: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    genai.build_genai_graph(inputs.path("decoder"), path, "fp32")


def _base_graph(inputs: PageInputs, path: Path) -> None:
    assert call("onnx", inputs.path("base"), "-o", path, "--no-verify") == 0


def _quantised_graph(inputs: PageInputs, path: Path) -> None:
    ir.save(quantised(ir.load(inputs.path("base.onnx")), bits=4), path)


def _model_graph(inputs: PageInputs, path: Path) -> None:
    assert call("onnx", inputs.path("base"), "-a", inputs.path("adapter"), "-o", path, "--no-verify") == 0


def _served_graph(inputs: PageInputs, path: Path) -> None:
    base, adapters = inputs.path("base.onnx"), [f"{name}={inputs.path(name)}" for name in ("fr", "de")]
    words = [word for adapter in adapters for word in ("-a", adapter)]
    assert call("onnx", base, *words, "--lora", "inputs", "-o", path, "--no-verify") == 0


def _merged(inputs: PageInputs, path: Path) -> None:
    assert call("merge", inputs.path("base"), inputs.path("adapter"), "-o", path) == 0


def _net(_: PageInputs, path: Path) -> None:
    """The file that the page `models` shows."""
    from support.pages import blocks

    (text,) = [block.text for block in blocks("models") if block.info == path.name]
    path.write_text(text, encoding="utf-8")


def _numbers(_: PageInputs, path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 5, 16)).astype(np.float32)
    np.savez(path, x=x, labels=np.tanh(x[..., :4]))


def _net_adapter(inputs: PageInputs, path: Path) -> None:
    net, data = inputs.path("net.py"), inputs.path("numbers.npz")
    assert call("train", f"{net}:make", "--data", data, "-o", path, "--rank", "4", "--learning-rate", "1e-2") == 0


def _classifier(inputs: PageInputs, path: Path) -> None:
    """The base with a head for the labels of the texts."""
    torch.manual_seed(0)
    labels = dict(enumerate(TOPICS))
    config = {
        "num_labels": len(labels),
        "id2label": labels,
        "label2id": {name: number for number, name in labels.items()},
    }
    AutoModelForSequenceClassification.from_pretrained(inputs.path("base"), **config).save_pretrained(path)
    for file in inputs.path("base").glob("tokenizer*"):
        shutil.copy(file, path)


def _customers(inputs: PageInputs, path: Path) -> None:
    """Twenty adapters, each with a head of its own for two to four labels."""
    for number in range(1, 21):
        torch.manual_seed(number)
        labels = 2 + number % 3
        model = AutoModelForSequenceClassification.from_pretrained(inputs.path("base"), num_labels=labels)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
        model = peft.get_peft_model(model, config)
        fill(model, std=0.1)
        model.save_pretrained(path / f"customer-{number:02}")


def _sdxl(_: PageInputs, path: Path) -> None:
    """A pipeline like Stable Diffusion XL: a UNet and two text encoders."""
    models = {"unet": unet(like_sdxl=True), **dict.fromkeys(("text_encoder", "text_encoder_2"), clip_text_model())}
    index: dict[str, object] = {"_class_name": "StableDiffusionXLPipeline"}
    for name, model in models.items():
        model.save_pretrained(path / name)
        index[name] = ["diffusers" if name == "unet" else "transformers", type(model).__name__]
    (path / "model_index.json").write_text(json.dumps(index))


def _style(seed: int) -> Callable[..., None]:
    """A file of kohya's scripts: pairs of random numbers on attention layers, under the flattened original names."""

    def make(_: PageInputs, path: Path) -> None:
        own = unet(like_sdxl=True)
        (layout,) = other_layouts({name: tuple(value.shape) for name, value in own.state_dict().items()})
        shapes = linear_shapes(own)
        named = {
            f"unet.{name.removesuffix('.weight')}": shapes[tensor.conversion.weights[0].removesuffix(".weight")]
            for name, tensor in layout.tensors.items()
            if name.startswith("middle_block") and name.endswith(("attn2.to_q.weight", "attn2.to_v.weight"))
        }
        text = {name: shape for name, shape in linear_shapes(clip_text_model()).items() if "q_proj" in name}
        named |= {f"te{number}.text_model.{name}": shape for number in (1, 2) for name, shape in text.items()}
        adapter_file(path, random_pairs(named, rank=4, seed=seed), prefix="lora_", flattened=True, alpha=2)

    return make


def _fleet(inputs: PageInputs, path: Path) -> None:
    """A fleet of one adapter that is done. Its paths are those of these files, wherever it is copied to."""
    base, adapter = inputs.path("base"), inputs.path("fr")
    lines = [
        f'records = "{path.with_name("fleet.records")}"',
        f'[[bases]]\npath = "{base}"\nadapters = ["{adapter}"]',
        f'[[steps]]\nstep = "merge"\noutput = "{path.with_name("released")}/{{adapter}}"',
        '[[steps]]\nstep = "verify --base"',
    ]
    path.write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        stay_here(patch)
        assert call("fleet", "run", path) == 0


MAKERS: dict[str, Callable[[PageInputs, Path], None]] = {
    "base": _base,
    "texts.jsonl": _texts,
    "adapter": _adapter,
    "tuned": _tuned,
    "kept": _kept,
    "kept.residual": lambda inputs, _: inputs.path("kept"),
    "fr": _peft_adapter(1, targets=["query", "value"]),
    "de": _peft_adapter(2, targets=["query", "key", "value", "intermediate.dense"]),
    "de-loha": _loha,
    "base.onnx": _base_graph,
    "int4.onnx": _quantised_graph,
    "model.onnx": _model_graph,
    "served.onnx": _served_graph,
    "merged": _merged,
    "decoder": _decoder,
    "pirate": _peft_adapter(3, "decoder"),
    "genai": _genai,
    "served": _generating,
    "llama": lambda inputs, path: shutil.copytree(inputs.path("decoder"), path),
    "my-lora": lambda inputs, path: shutil.copytree(inputs.path("pirate"), path),
    "classifier": _classifier,
    "customers": _customers,
    "fleet.toml": _fleet,
    "sdxl": _sdxl,
    "ink.safetensors": _style(1),
    "oil.safetensors": _style(2),
    "pastel.safetensors": _style(3),
    "net.py": _net,
    "numbers.npz": _numbers,
    "net-adapter": _net_adapter,
}
