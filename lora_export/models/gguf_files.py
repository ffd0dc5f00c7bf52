"""The config and the tokenizer of a GGUF file, as transformers reads them out of it."""

from __future__ import annotations

from pathlib import Path

from lora_export.extras import optional_package
from lora_export.models.processors import refusing_failures


def save_config(file: Path, folder: Path, class_name: str, *, with_tokenizer: bool) -> None:
    """Write what a Hugging Face folder has beside the weights. The class is transformers' class of the model.

    Raises EnvironmentLacking without transformers or gguf, and InputRefused for what transformers does not read.
    """
    transformers = optional_package("transformers", "a Hugging Face model needs", "hf")
    optional_package("gguf", "transformers reads GGUF files by", "gguf")
    source = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    with refusing_failures("transformers does not read the config of this GGUF file"):
        config = transformers.AutoConfig.from_pretrained(file.parent, **source)
    config.architectures = [class_name]
    config.save_pretrained(folder)
    if with_tokenizer:
        failure = "transformers does not read the tokenizer of this GGUF file. Give arrays of `input_ids` (.npz)"
        with refusing_failures(failure):
            transformers.AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(folder)
