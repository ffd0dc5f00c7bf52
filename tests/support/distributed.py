"""Checkpoints of torch.distributed.checkpoint, made in one process: whole, or in two shards as two of them save it."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata


def save_whole(folder: Path, state: Mapping[str, Any]) -> Path:
    """Save a state, nested or flat, as the only process does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
    return folder


def read_metadata(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301  it was saved here


def save_in_shards(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
    """Save the first and the other rows of each tensor as two processes do, with torch's own records of both."""
    merged = Metadata({}, {}, {})
    for rank, rows in enumerate((slice(0, 1), slice(1, None))):
        own = save_whole(folder / f"rank{rank}", {name: value[rows].clone() for name, value in state.items()})
        (file,) = own.glob("*.distcp")
        file.rename(folder / f"__{rank}_0.distcp")
        found = read_metadata(own)
        (own / ".metadata").unlink()
        own.rmdir()
        for index, info in found.storage_data.items():
            whole, part = state[index.fqn], found.state_dict_metadata[index.fqn]
            offset = torch.Size([rank, *[0] * (whole.ndim - 1)])
            chunk = ChunkStorageMetadata(offset, part.size)
            chunks = [*getattr(merged.state_dict_metadata.get(index.fqn), "chunks", []), chunk]
            merged.state_dict_metadata[index.fqn] = TensorStorageMetadata(part.properties, whole.size(), chunks)
            merged.storage_data[MetadataIndex(index.fqn, offset)] = replace(info, relative_path=f"__{rank}_0.distcp")
    (folder / ".metadata").write_bytes(pickle.dumps(merged))
    return folder


def lora_state(outer: str = "", rank: int = 2) -> dict[str, torch.Tensor]:
    """The tensors of an adapter of PEFT in training, with its base and an optimiser, under the names of the model."""
    inner = f"{outer}base_model.model."
    generator = torch.Generator().manual_seed(1)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    return {
        f"{inner}fc.lora_A.default.weight": integers(rank, 6),
        f"{inner}fc.lora_B.default.weight": integers(4, rank),
        f"{inner}fc.base_layer.weight": integers(4, 6),
        f"optim.state.{inner}fc.lora_A.default.weight.exp_avg": integers(rank, 6),
    }


def config(folder: Path, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    of_peft = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["fc"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(of_peft))
    return folder
