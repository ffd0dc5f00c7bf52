"""The config and the tokenizer of a GGUF file: as transformers reads them out of it, else those beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.extras import optional_package
from lora_export.models.processors import open_processor, open_tokenizer, refusing_failures
from lora_export.weights.gguf.base import GgufBase

# A key of a file, without its architecture -> what configs of transformers call it
FURTHER_KEYS = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "norm_epsilon"),
    "rope.freq_base": ("rope_theta",),
    "rope.scaling.factor": ("factor",),
    "attention.key_length": ("head_dim",),
    "attention.sliding_window": ("sliding_window",),
}

MOST_UNLIKE = 0.01  # of the tokens: converters spell a few special ones in another way


def save_config(base: GgufBase, folder: Path, *, with_tokenizer: bool) -> None:
    """Write what a Hugging Face folder has beside the weights.

    What transformers does not read out of the file is that of the file's folder: config.json, and a tokenizer. Raises
    EnvironmentLacking without transformers or gguf, and InputRefused where neither has it, and for the config of
    another model.
    """
    optional_package("transformers", "a Hugging Face model needs", "hf")
    optional_package("gguf", "transformers reads GGUF files by", "gguf")
    config = _config(base)
    config.architectures = [base.names.class_name]
    config.save_pretrained(folder)
    if with_tokenizer:
        _tokenizer(base.file.path).save_pretrained(folder)


def _config(base: GgufBase) -> Any:
    file, failure = base.file.path, "transformers does not read the config of this GGUF file"
    try:
        return _of_file("AutoConfig", file, failure)
    except InputRefused as error:
        beside = file.parent / "config.json"
        if not beside.is_file():
            raise InputRefused(f"{str(error).rstrip('.')}. Put the model's config.json beside it") from error
    config = open_processor("AutoConfig", file.parent, needs="a Hugging Face model needs", failure=str(beside))
    wrong = [f"{name} {own!r}, not {its!r}" for name, its, own in _stated_by_both(base, config) if not _agree(its, own)]
    if wrong:
        raise InputRefused(f"{beside} is not that of {file.name}: it has {', '.join(wrong)}")
    if hasattr(config, "quantization_config"):  # of other files of the model
        del config.quantization_config
    config.dtype = "float32"  # of the weights, which have been blocks
    return config


def _tokenizer(file: Path) -> Any:
    failure = (
        "transformers does not read the tokenizer of this GGUF file. Give arrays of `input_ids` (.npz), or put the "
        "model's tokenizer beside it"
    )
    try:
        return _of_file("AutoTokenizer", file, failure)
    except InputRefused:
        found = open_tokenizer(file.parent, needed=False)
        if found is None:
            raise
    _refuse_other_words(file, found)
    return found


def _refuse_other_words(file: Path, tokenizer: Any) -> None:
    """Raise InputRefused for a tokenizer whose tokens are not those of a GGUF file that lists its own."""
    gguf = optional_package("gguf", "transformers reads GGUF files by", "gguf")
    with refusing_failures(f"{file}: its tokens cannot be read"):
        field = gguf.GGUFReader(file).fields.get("tokenizer.ggml.tokens")
        words = None if field is None else field.contents()
    if words is None:
        return
    own = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    unlike = sum(_bare(one) != _bare(its) for one, its in zip(own, words, strict=False)) + max(0, len(own) - len(words))
    if unlike > MOST_UNLIKE * len(own):
        differ = f"{unlike:,} of its {len(own):,} tokens are others"
        raise InputRefused(f"the tokenizer in {file.parent} is not that of {file.name}: {differ}")


def _bare(token: str | None) -> str:
    """A token without the mark that it begins or continues a word: llama.cpp turns WordPiece's into SentencePiece's."""
    return (token or "").removeprefix("##").removeprefix("\u2581")


def _of_file(auto_class: str, file: Path, failure: str) -> Any:
    transformers = optional_package("transformers", "a Hugging Face model needs", "hf")
    source = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    with refusing_failures(failure):
        return getattr(transformers, auto_class).from_pretrained(file.parent, **source)


def _stated_by_both(base: GgufBase, config: Any) -> Iterator[tuple[str, Any, Any]]:
    """The names of what the file and a config state, and both values: also of what no shape of a weight shows."""
    own = {**(getattr(config, "rope_parameters", None) or {}), **config.to_dict(), "model_type": config.model_type}
    stated = base.checkpoint.config
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    yield from ((name, stated[name], own[name]) for name in names if stated.get(name) and own.get(name))
    architecture = base.file.value("general.architecture")
    for key, spellings in FURTHER_KEYS.items():
        value = base.file.value(f"{architecture}.{key}")
        yield from ((name, value, own[name]) for name in spellings if value is not None and own.get(name) is not None)


def _agree(its: Any, own: Any) -> bool:
    """Whether two values are one; the file has fp32."""
    is_number = isinstance(its, float) and isinstance(own, int | float)
    return math.isclose(its, own, rel_tol=1e-6) if is_number else bool(its == own)
