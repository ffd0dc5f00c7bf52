"""What is more than pairs of plain LoRA is named; all of it, for all adapters."""

from __future__ import annotations

import numpy as np
import pytest

from lora_export.adapters.plain_pairs import refuse_beyond_pairs
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair

PAIR = LoraPair(np.ones((1, 2)), np.ones((3, 1)), 1.0)
PLAIN = Adapter("plain", "peft", {"fc": PAIR})
BESIDES = {"replaced": {"head.weight": np.ones(2)}, "biases": {"fc": np.ones(3)}, "added": {"n.weight": np.ones(2)}}
WHOLE = Adapter("whole", "peft", {"fc": PAIR}, **BESIDES)


def test_everything_is_named_at_once() -> None:
    with pytest.raises(InputRefused) as refused:
        refuse_beyond_pairs([PLAIN, WHOLE, Adapter("empty", "peft", {})], "x")
    assert str(refused.value).splitlines() == [
        "x can contain pairs of A and B alone. Nothing was written.",
        "  whole: head.weight is saved whole",
        "  whole: fc has a bias of B",
        "  whole: n.weight has a change of a vector, such as the weight of a norm",
        "  empty: it has no pair",
    ]
    assert "plain:" not in str(refused.value)


def test_whole_tensors_may_be_allowed() -> None:
    with pytest.raises(InputRefused) as refused:
        refuse_beyond_pairs([WHOLE], "x", whole_ok=True)
    assert "head.weight" not in str(refused.value) and "bias of B" in str(refused.value)
