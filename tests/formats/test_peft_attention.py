"""Output projections of nn.MultiheadAttention, as PEFT up to 0.21 trains them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from lora_export import formats
from lora_export.formats.peft_attention import as_peft_computes
from lora_export.lora import Adapter
from support.small_layers import a_pair, an_adapter


def an_attention_of_peft(folder: Path) -> Adapter:
    torch.manual_seed(0)
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    options = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["attn", "fc"], init_lora_weights=False)
    peft.get_peft_model(net, options).save_pretrained(folder)
    return formats.load(folder)


def test_the_scale_is_doubled_where_peft_adds_the_change_twice(tmp_path: Path) -> None:
    adapter = an_attention_of_peft(tmp_path)
    found = as_peft_computes(adapter)
    assert {name: pair.scale for name, pair in found.pairs.items()} == {"attn": 1.5, "attn.out_proj": 3.0, "fc": 1.5}
    assert found.spelled("attn.out_proj") == "attn.out_proj"
    assert [note.partition(";")[2] for note in found.notes] == [
        " it goes on with twice the scale, and is saved as a layer of its own"
    ]
    assert as_peft_computes(found) is found


@pytest.mark.parametrize(("version", "scale"), [("0.21.2", 3.0), ("0.22.0", 1.5), ("", 3.0), ("none", 3.0)])
def test_the_version_of_peft_decides(version: str, scale: float, tmp_path: Path) -> None:
    adapter = an_attention_of_peft(tmp_path)
    adapter = dataclasses.replace(adapter, metadata={**adapter.metadata, "peft_version": version})
    assert as_peft_computes(adapter).pairs["attn.out_proj"].scale == scale


def test_other_adapters_stay_as_they_are() -> None:
    adapter = an_adapter({"attn.out_proj": a_pair(4, 4)})
    assert as_peft_computes(adapter) is adapter
