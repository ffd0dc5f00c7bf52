"""PEFT's adapters in checkpoints of torch.distributed.checkpoint (DCP), as FSDP and accelerate save them in shards.

The names are those of the model in training, `model.base_model.model....lora_A.default.weight`, with the base beside
them, and the optimiser. PEFT's config is in the folder, or in that around it, where the trainer saved one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_export.errors import InputRefused
from lora_export.formats import peft
from lora_export.formats.adapter_files import unwrapped
from lora_export.formats.peft_keys import ADAPTER_CONFIG, LOW_RANK_KEY, ROWS_KEY, SAVED_KEY, WRAPPER
from lora_export.lora import Adapter
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.options.spelling import named
from lora_export.storage import json_files
from lora_export.storage.artifact_kinds import is_distributed_checkpoint
from lora_export.storage.distributed_checkpoint import open_distributed_checkpoint, shards_of, text_in_metadata

DESCRIPTION = "a folder of torch.distributed.checkpoint (.metadata and *.distcp), as FSDP saves an adapter in shards"
OF_MEGATRON = re.compile(r"\.adapter\.(adapter_\w+\.)?linear_in\.")  # in names that `megatron.py` reads


def recognises(path: Path) -> bool:
    """Whether a folder is such a checkpoint, and has no names of another trainer. Nothing is unpickled."""
    return is_distributed_checkpoint(path) and not any(map(OF_MEGATRON.search, text_in_metadata(path)))


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read the adapter in such a checkpoint. Raises InputRefused with everything that is wrong with it."""
    refuse_without_permission(path, options)
    folder = next((each for each in (path, path.parent) if (each / ADAPTER_CONFIG).is_file()), path)
    config = json_files.read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else {}
    found = open_distributed_checkpoint(path, lambda key: _is_of_adapter(key, config))
    if not found.entries:
        raise InputRefused(f"{path} has no tensor of an adapter of PEFT, such as `{WRAPPER}....lora_A.default.weight`")
    names = {key: unwrapped(key) for key in found.entries}
    if len(set(names.values())) < len(names):
        raise InputRefused(f"{path} contains one tensor under two names")
    entries = {names[key]: replace(entry, name=names[key]) for key, entry in found.entries.items()}
    tensors = replace(found, entries=entries, arrays={names[key]: array for key, array in found.arrays.items()})
    adapter = peft.read_tensors(tensors, folder, name, options, *shards_of(path))
    return replace(adapter, format="dcp")


def refuse_without_permission(path: Path, options: ReadOptions) -> None:
    """Raise InputRefused where the user does not allow pickles."""
    if not options.allow_pickle:
        raise InputRefused(
            f"{path} has pickles, which can run code when they are opened. {named('allow_pickle', True)} reads the "
            "metadata as torch's own records alone, and the tensors by torch.load with weights_only=True"
        )


def _is_of_adapter(key: str, config: Mapping[str, Any]) -> bool:
    name = unwrapped(key)
    if not name.startswith(WRAPPER):  # of the optimiser, or the scheduler
        return False
    own = any(pattern.fullmatch(name) for pattern in (LOW_RANK_KEY, ROWS_KEY, SAVED_KEY))
    return own or (config.get("bias", "none") != "none" and name.endswith(".bias"))
