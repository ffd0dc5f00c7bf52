"""A model in a Hugging Face folder. Nothing is downloaded, and no code of the folder is run."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.lora import Adapter
from lora_export.models.model import TRACED, Axes, Inputs, Make, Model, Sizes
from lora_export.models.pt2.example_inputs import padding_mask
from lora_export.storage import json_files
from lora_export.weights.checkpoint import CONFIG, code_of_its_own, open_checkpoint
from lora_export.weights.task_head import config_for_labels, config_with_heads


def load_tokenizer(model: Model) -> Any:
    """The tokenizer that lies in a Hugging Face model's folder. Raises InputRefused where there is none."""
    if not model.is_huggingface:
        raise InputRefused(f"{model.source} has no tokenizer: it is no Hugging Face folder. Give arrays (.npz)")
    transformers = _transformers()
    with _quiet(transformers):
        try:
            return transformers.AutoTokenizer.from_pretrained(model.source, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputRefused(f"{model.source} has no tokenizer: {str(error).splitlines()[0]}") from error


def from_folder(folder: Path, adapters: Sequence[Adapter], labels: Sequence[str], dtype: torch.dtype) -> Model:
    open_checkpoint(folder)  # refuses what is damaged, quantised or pickled before anything is built from it
    if not (folder / CONFIG).is_file():
        raise InputRefused(f"{folder} has no {CONFIG}: it holds weights, but does not say of which model")
    raw = config_with_heads(json_files.read_json(folder / CONFIG), adapters)
    if labels:
        if not raw.get("architectures"):
            raise InputRefused(f"{folder / CONFIG} names no architecture, so that I cannot tell its classifier")
        raw = config_for_labels(raw, labels)
    if code := code_of_its_own(raw):
        raise InputRefused(
            f"{folder / CONFIG} names code of its own ({code}), which is never run from here. Build the model in a "
            "factory, `file.py:factory`, where you trust it"
        )
    if "model_type" not in raw:
        raise InputRefused(f"{folder / CONFIG} has no model_type")
    transformers = _transformers()
    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.for_model(**raw)
        except (ValueError, KeyError) as error:
            raise InputRefused(f"{folder / CONFIG}: transformers does not know this model ({error})") from error
        architecture = (raw.get("architectures") or ["AutoModel"])[0]
        cls = getattr(transformers, architecture, None)
        if cls is None:
            raise InputRefused(f"{folder / CONFIG}: transformers has no class {architecture}")
        if getattr(config, "use_cache", False):
            config.use_cache = False  # a graph without a cache: one call, one answer
        try:
            module = cls.from_pretrained(folder, config=config, local_files_only=True, dtype=dtype)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputRefused(f"{folder}: transformers cannot load it as {architecture}: {error}") from error
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        # Out of the mapped file: who cuts that short meanwhile would end this process, and a proof that widens the
        # model tensor by tensor would hold all of both.
        tensor.data = tensor.data.clone()
    module.eval()
    axes, make = _huggingface_inputs(module)
    sizes = {symbol: TRACED[symbol] for symbol in {symbol for there in axes.values() for symbol in there.values()}}
    return Model(str(folder), module, axes, make, sizes, is_huggingface=True)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise EnvironmentLacking(
            f"a Hugging Face model needs transformers ({error}): pip install 'lora-export[hf]'"
        ) from error


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no load report: a head that is still fresh is what we asked for."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _huggingface_inputs(module: Any) -> tuple[Axes, Make]:
    """What the model takes and how to make it: ids in range, masks with padding, images of the right size."""
    config = module.config
    takes = set(inspect.signature(module.forward).parameters)
    if module.main_input_name == "pixel_values":
        height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size

        def make_images(sizes: Sizes, generator: torch.Generator) -> Inputs:
            shape = (sizes["batch"], config.num_channels, height, width)
            return {"pixel_values": torch.rand(shape, generator=generator) * 2 - 1}

        return {"pixel_values": {0: "batch"}}, make_images
    if module.main_input_name != "input_ids":
        raise InputRefused(
            f"{type(module).__name__} takes {module.main_input_name}, for which I cannot make inputs yet. Wrap it in a "
            "factory that returns (module, example_inputs)"
        )
    text = config.get_text_config()
    token_types = getattr(text, "type_vocab_size", 0) or 0

    def make_text(sizes: Sizes, generator: torch.Generator) -> Inputs:
        shape = (sizes["batch"], sizes["sequence"])
        inputs = {"input_ids": torch.randint(0, text.vocab_size, shape, generator=generator)}
        inputs["attention_mask"] = padding_mask(shape, generator)
        if "token_type_ids" in takes and token_types > 1:
            inputs["token_type_ids"] = torch.randint(0, token_types, shape, generator=generator)
        if "decoder_input_ids" in takes:
            target = (sizes["batch"], sizes["target"])
            inputs["decoder_input_ids"] = torch.randint(0, text.vocab_size, target, generator=generator)
        return inputs

    names = make_text(TRACED, torch.Generator().manual_seed(0))
    axes = {name: {0: "batch", 1: "target" if name.startswith("decoder") else "sequence"} for name in names}
    return axes, make_text
