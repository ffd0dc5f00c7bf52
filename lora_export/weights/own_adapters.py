"""Checkpoints whose weights hold adapters of their own, read without these: see `formats/task_adapters.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_export.errors import InputRefused
from lora_export.formats.task_adapters import (
    STACKED_ADAPTER,
    plain_name,
    refuse_other_parametrizations,
    task_names,
    tasks_of,
)
from lora_export.storage.safetensors_file import TensorFile


def without_adapters(
    shards: Mapping[str, TensorFile], config: Mapping[str, Any]
) -> tuple[dict[str, TensorFile], tuple[str, ...]]:
    """The shards without the adapters of their own, under plain names, and the tasks of these. Most have none.

    Raises InputRefused where a weight is stored with and without them, and for other parametrizations.
    """
    entries = (entry for shard in shards.values() for entry in shard.entries.values())
    stacked = [entry for entry in entries if STACKED_ADAPTER.fullmatch(entry.name)]
    if not stacked:
        return dict(shards), ()
    plain: dict[str, TensorFile] = {}
    for name, shard in shards.items():
        refuse_other_parametrizations(shard.entries, shard.path)
        kept = {each: new for each in shard.entries if (new := plain_name(each)) is not None}
        if len(set(kept.values())) < len(kept):
            raise InputRefused(f"{shard.path} contains a weight as itself, and as that of a parametrization")
        plain[name] = replace(shard, entries={new: replace(shard.entries[old], name=new) for old, new in kept.items()})
    return plain, task_names(config, tasks_of(stacked[0].shape))
