"""What may name a model: a folder, a factory, a program of torch.export or a graph. Needs no PyTorch."""

from __future__ import annotations

from pathlib import Path

from lora_export.errors import InputRefused
from lora_export.storage.input_files import must_exist

MODEL_FILES = (".onnx", ".pt2")


def refuse_no_model(source: str | Path) -> None:
    """Raise InputRefused for what names no model. What it names may still be missing or damaged inside.

    This is for before anything is read: what else a command reads may take long.
    """
    name = str(source)
    if Path(name).is_dir():
        return
    if name.endswith(MODEL_FILES):
        must_exist(Path(name), "model")
        return
    location, _, attribute = name.rpartition(":")
    if not location or not attribute:
        raise InputRefused(
            f"{name!r} is no model: give a Hugging Face folder that exists, `package.module:factory`, "
            "`file.py:factory` or a .pt2 file"
        )
