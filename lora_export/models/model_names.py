"""What may name a model of PyTorch: a folder, a factory or a program of torch.export. Needs no PyTorch."""

from __future__ import annotations

from pathlib import Path

from lora_export.errors import InputRefused


def refuse_no_model(source: str | Path) -> None:
    """Raise InputRefused for what names no model. What it names may still be missing or damaged inside.

    This is for before anything is read: what else a command reads may take long.
    """
    location, _, attribute = str(source).rpartition(":")
    is_factory = bool(location and attribute)
    if not (Path(source).is_dir() or str(source).endswith(".pt2") or is_factory):
        raise InputRefused(
            f"{str(source)!r} is no model: give a Hugging Face folder that exists, `package.module:factory`, "
            "`file.py:factory` or a .pt2 file"
        )
