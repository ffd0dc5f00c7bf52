"""Random attention masks."""

from __future__ import annotations

import torch

from lora_export.models.padding_mask import padding_mask


def test_every_row_but_the_first_has_padding_at_one_end() -> None:
    for seed in range(20):
        mask = padding_mask((5, 9), torch.Generator().manual_seed(seed))
        assert mask.shape == (5, 9) and set(mask.unique().tolist()) == {0, 1}
        assert (mask[1:].sum(1) < 9).all() and (mask.sum(1) >= 4).all()
        assert (mask[[1, 3], -1] == 0).all() and (mask[[2, 4], 0] == 0).all()
