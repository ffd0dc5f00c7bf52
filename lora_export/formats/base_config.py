"""The config of the model that an adapter was trained on, for formats that do not record what it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.options.reading import ReadOptions
from lora_export.storage import json_files

MODEL_CONFIG = "config.json"


def base_config(folder: Path | None, options: ReadOptions) -> Mapping[str, Any] | None:
    """The config.json beside an adapter, else that of the base; None where there is neither.

    `folder` is that of the adapter, if any. `options.base_config` is a folder, or a file in it. Raises InputRefused for
    a damaged config.
    """
    places = [] if folder is None else [folder / MODEL_CONFIG]
    if (base := options.base_config) is not None:
        places.append((base.parent if base.is_file() else base) / MODEL_CONFIG)
    for path in places:
        if path.is_file():
            return json_files.read_model_config(path)
    return None


def size_in_config(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these fields that the config has. Raises InputRefused where it is no positive integer."""
    for name in names:
        value = config.get(name)
        if value is not None:
            if type(value) is not int or not 0 < value < 1 << 31:
                raise InputRefused(f"the base's config has {name} = {value!r}; it must be a positive integer")
            return value
    return None
