"""A training of one process: nothing to sum or wait for. `test_loop.py` starts two."""

from __future__ import annotations

import torch
from torch import nn

from lora_export.training.processes import (
    rank,
    sum_gradients,
    sum_over_processes,
    take_from_first,
    wait_for_all,
    world_size,
)


def test_one_process_is_alone() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), 3.0)
    sum_gradients([parameter])
    wait_for_all()
    take_from_first([parameter.data], "cpu")
    assert parameter.tolist() == [1, 1]
    assert (rank(), world_size(), sum_over_processes([1.5, 2], "cpu"), parameter.grad.tolist()) == (
        0,
        1,
        [1.5, 2],
        [3, 3],
    )
