"""A training of one process: nothing to sum or wait for. `test_loop.py` starts two."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_export.errors import WrongUsage
from lora_export.training.loop import accelerator_for
from lora_export.training.processes import (
    SHARDING,
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


@pytest.mark.parametrize("variable", SHARDING)
def test_a_base_in_parts_is_refused_by_name(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --use_fsdp` and its like set these variables."""
    monkeypatch.setenv(variable, "true")
    with pytest.raises(WrongUsage, match=f"accelerate is configured for {SHARDING[variable]}: here every process"):
        accelerator_for("cpu")
    monkeypatch.setenv(variable, "false")
    accelerator_for("cpu")
