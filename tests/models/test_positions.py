"""Where a model gets the positions of its tokens from."""

from __future__ import annotations

import pytest
from torch import nn

from lora_export.models.positions import counts_by_mask, takes_positions
from support.generators import DECODERS


@pytest.mark.parametrize(("name", "by_mask"), [("llama", False), ("gpt2", False), ("opt", True)])
def test_models_that_count_the_ones_of_the_mask_are_found(name: str, by_mask: bool) -> None:
    module = DECODERS[name]().eval()
    assert takes_positions(module)
    assert counts_by_mask(module) is by_mask


def test_models_without_positions_are_known() -> None:
    assert not takes_positions(nn.Linear(2, 2)) and not takes_positions(DECODERS["bloom"]())
