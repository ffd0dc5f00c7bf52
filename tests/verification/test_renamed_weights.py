"""Merged folders in half precision whose weights transformers renames or stacks while it loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

import lora_export
from support import experts

Models = Callable[[], tuple[PreTrainedModel, peft.PeftModel]]


def vit() -> tuple[PreTrainedModel, peft.PeftModel]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **sizes)).to(torch.bfloat16)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_alpha=8)
    return model, peft.get_peft_model(model, config)


def mixtral() -> tuple[PreTrainedModel, peft.PeftModel]:
    model = experts.tiny_model("mixtral").to(torch.bfloat16)
    return model, experts.peft_model("mixtral", model)


@pytest.fixture(scope="module", params=[vit, mixtral])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, its adapter, and the two merged."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    _, wrapped = request.param()
    wrapped.save_pretrained(folder / "adapter")
    wrapped.unload().save_pretrained(folder / "base")
    lora_export.merge(folder / "base", folder / "adapter", folder / "merged")
    return folder


def verified(folder: Path, candidate: str) -> str:
    return lora_export.verify(folder / candidate, model=folder / "base", adapters=[folder / "adapter"]).verdict.outcome


def test_a_right_merge_is_the_same(merged: Path) -> None:
    assert verified(merged, "merged") == "same"


def test_a_weight_that_is_rounded_wrongly_is_different(merged: Path) -> None:
    """The first changed weight of the file, each value one step of bfloat16 further."""
    (folder := merged / "wrong").mkdir()
    for path in (merged / "merged").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors, base = (load_file(merged / name / "model.safetensors") for name in ("merged", "base"))
    name = next(name for name in tensors if not torch.equal(tensors[name], base[name]))
    bits = tensors[name].view(torch.int16)
    tensors[name] = (bits + 1).view(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert np.isfinite(tensors[name].float().numpy()).all()
    assert verified(merged, "wrong") == "different"
