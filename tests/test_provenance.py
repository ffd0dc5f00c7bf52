"""The record of where an output comes from, and the refusal of a second merge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lora_export import plan, provenance
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair
from lora_export.plan import Layout, Plan, TensorSpec
from lora_export.version import __version__

BASE = Path("base.safetensors")


def adapter(name: str, sha256: str) -> Adapter:
    pair = LoraPair(a=np.array([[1, 2]]), b=np.array([[1], [3]]), scale=1.0)
    return Adapter(name, "peft", {"fc": pair}, sha256=sha256)


def made(*adapters: Adapter) -> Plan:
    return plan.make(adapters, [TensorSpec("fc.weight", (2, 2), "float32", Layout.OUT_IN)])


def test_a_record_contains_earlier_adapters_first():
    earlier = ({"name": "old", "sha256": "00"},)
    record = provenance.record([adapter("new", "11")], [0.5], {"m": {"sha256": "22"}}, earlier, {"dtype": "keep"})
    assert record == {
        "made_by": f"lora-export {__version__}",
        "base": {"m": {"sha256": "22"}},
        "adapters": [
            {"name": "old", "sha256": "00"},
            {"name": "new", "format": "peft", "sha256": "11", "weight": 0.5, "ranks": [1], "alphas": [1.0]},
        ],
        "settings": {"dtype": "keep"},
    }


def test_a_recorded_adapter_is_refused_under_any_name():
    history = provenance.adapter_records([adapter("old", "11" * 32)], [1.0])
    with pytest.raises(InputRefused) as refused:
        provenance.refuse_second_merge([adapter("new", "11" * 32)], BASE, history)
    assert str(refused.value) == (
        "base.safetensors already contains the adapter new (merged as old, sha256 111111111111). Merge into the "
        "original base instead"
    )
    provenance.refuse_second_merge([adapter("old", "22" * 32)], BASE, history)


def test_adapters_without_a_hash_are_not_recognised():
    history = provenance.adapter_records([adapter("old", "")], [1.0])
    provenance.refuse_second_merge([adapter("old", "")], BASE, history)


def test_a_history_is_read_from_the_text_of_a_record():
    history = provenance.adapter_records([adapter("old", "11")], [2.0])
    record = provenance.record([], [], {}, history, {})
    assert list(provenance.read_history(json.dumps(record), BASE)) == history
    assert provenance.history({}, BASE) == ()


@pytest.mark.parametrize("adapters", [{}, "a", ["a"], [{"sha256": 1}]])
def test_a_damaged_record_is_refused(adapters):
    with pytest.raises(InputRefused, match=r"^base\.safetensors: the record of an earlier merge is damaged"):
        provenance.history({"adapters": adapters}, BASE)


def test_ranks_and_alphas_are_recorded_once_each() -> None:
    pairs = {
        str(number): LoraPair(a=np.ones((rank, 2)), b=np.ones((2, rank)), scale=scale)
        for number, (rank, scale) in enumerate([(4, 2.0), (4, 2.0), (1, 0.1)])
    }
    adapter = Adapter("new", "peft", pairs)
    stabilised = Adapter("new", "peft", pairs, metadata={"use_rslora": True})
    records = provenance.adapter_records([adapter, stabilised, Adapter("whole", "peft", {})], [1.0, 1.0, 1.0])
    assert [(one.get("ranks"), one.get("alphas")) for one in records] == [
        ([1, 4], [0.1, 8.0]),
        ([1, 4], [0.1, 4.0]),
        (None, None),
    ]


def test_the_sizes_for_which_a_file_was_made_are_read() -> None:
    assert provenance.read_longest({provenance.LONGEST_KEY: '{"sequence": 704}'}, BASE) == {"sequence": 704}
    assert provenance.read_longest({}, BASE) == {}


@pytest.mark.parametrize("text", ["[704]", '{"sequence": 0}', '{"sequence": "a"}', '{"sequence": true}', 704, None])
def test_damaged_sizes_are_refused(text: object) -> None:
    with pytest.raises(InputRefused, match=r"base\.safetensors"):
        provenance.read_longest({provenance.LONGEST_KEY: text}, BASE)
