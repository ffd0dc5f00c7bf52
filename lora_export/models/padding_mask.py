"""Random attention masks, for models of text."""

from __future__ import annotations

import torch
from torch import Tensor


def padding_mask(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A mask (batch, sequence): 1 for tokens, 0 for padding, at the end of some rows and at the beginning of others.

    Every row but the first has padding.
    """
    # A mask of ones alone would never test whether the model reads it.
    lengths = torch.randint(max(1, shape[1] // 2), shape[1] + 1, (shape[0], 1), generator=generator)
    lengths[1:] = torch.clamp(lengths[1:], max=max(1, shape[1] - 2))
    mask = (torch.arange(shape[1]) < lengths).long()
    mask[2::2] = mask[2::2].flip(1)  # padding at the beginning: a candidate that only reads the lengths must fail
    return mask
