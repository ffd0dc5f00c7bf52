"""Folders of DeepSpeed's ZeRO, whose shards are pickles of its classes: recognised, and refused with the way out."""

from __future__ import annotations

from pathlib import Path

from lora_export.errors import InputRefused

_SHARD = "*zero_pp_rank_*_states.pt"
_SCRIPT = "zero_to_fp32.py"  # DeepSpeed puts it into each of its checkpoints


def refuse_shards(path: Path) -> None:
    """Raise InputRefused for a folder with shards of ZeRO, or of a checkpoint that has such a folder inside."""
    if not path.is_dir() or not any((*path.glob(_SHARD), *path.glob(f"*/{_SHARD}"))):
        return
    folder = path if any(path.glob(f"*/{_SHARD}")) else path.parent
    raise InputRefused(
        f"{path} has shards of DeepSpeed's ZeRO, which only DeepSpeed reads. Gather them with the script that it saved "
        f"there: python {folder / _SCRIPT} {folder} OUT (with its flags safe_serialization and "
        "exclude_frozen_parameters). Then put adapter_config.json beside OUT/model.safetensors, and name OUT"
    )
