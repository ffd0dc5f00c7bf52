"""What a user states about the files of adapters."""

from __future__ import annotations

import pytest

from lora_export.errors import WrongUsage
from lora_export.formats.read_options import ReadOptions


def test_an_order_of_b_that_does_not_exist_is_wrong_usage():
    assert ReadOptions("rank_major").moe_b_layout == "rank_major"
    with pytest.raises(
        WrongUsage, match="--moe-b-layout is 'expert_major'; it must be rank_major or grouped_by_expert"
    ):
        ReadOptions("expert_major")
