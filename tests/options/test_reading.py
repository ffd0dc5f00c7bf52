"""What a user states about the files of adapters."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lora_export.errors import InputRefused, WrongUsage
from lora_export.options.reading import ReadOptions


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"moe_b_layout": "expert_major"}, "moe_b_layout= is 'expert_major'; it must be rank_major or grouped_by"),
        ({"lora_rank": 0}, "lora_rank= is 0; it must be at least 1"),
        ({"lora_alpha": 0.0}, "lora_alpha= is 0; it must be above 0"),
        ({"lora_alpha": math.nan}, "lora_alpha= is nan; it must be above 0"),
    ],
)
def test_a_value_that_does_not_exist_is_wrong_usage(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongUsage, match=message):
        ReadOptions(**wrong)


@pytest.mark.parametrize(("field", "value"), [("lora_rank", 4), ("lora_alpha", 8.0)])
def test_stating_what_an_adapter_records_is_refused(field: str, value: float) -> None:
    with pytest.raises(InputRefused, match=f"{field}= is for adapters that do not record it; this one does, in f.json"):
        ReadOptions(**{field: value}).refuse_rank_and_alpha("f.json")
    ReadOptions(moe_b_layout="rank_major").refuse_rank_and_alpha("f.json")
