"""PEFT's kinds of adapters beside LoRA: their merge against PEFT's own."""

from __future__ import annotations

import pytest

import lora_export as le
from support.peft_kinds import CASES, differences, trained


@pytest.mark.parametrize("name", CASES)
def test_it_is_merged_as_by_peft(tmp_path, name):
    one = trained(CASES[name], tmp_path)
    le.merge(one.base, one.adapter, tmp_path / "out.safetensors", layout=CASES[name].layout)
    found = differences(one, tmp_path / "out.safetensors")
    assert len(found) >= len(CASES[name].targets)
    assert max(found.values()) < 3e-6
