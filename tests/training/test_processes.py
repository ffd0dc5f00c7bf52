"""A training of one process: nothing to sum or wait for. `test_loop.py` starts two."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def test_a_group_is_gone_before_the_process_ends(tmp_path: Path) -> None:
    """Otherwise its threads are still there: PyTorch then aborted 7 of 8 runs of three processes on two cores."""
    script = """if True:
        import atexit, sys, weakref
        import torch.distributed as dist
        from lora_export.training import processes

        group = lambda: None
        atexit.register(lambda: print("at the end:", group()))
        if sys.argv[1:]:
            dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=0, world_size=1)
            group = weakref.ref(dist.group.WORLD)
        processes.leave_at_exit()
        processes.leave_at_exit()
        import torch.distributed.nn.functional  # as accelerate does
        print("before:", type(group()).__name__)
    """
    for words, before in (((str(tmp_path / "group"),), "ProcessGroup"), ((), "NoneType")):
        run = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
        assert run.stdout == f"before: {before}\nat the end: None\n"


@pytest.mark.parametrize("variable", SHARDING)
def test_a_base_in_parts_is_refused_by_name(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --use_fsdp` and its like set these variables."""
    monkeypatch.setenv(variable, "true")
    with pytest.raises(WrongUsage, match=f"accelerate is configured for {SHARDING[variable]}, which this training"):
        accelerator_for("cpu")
    monkeypatch.setenv(variable, "false")
    accelerator_for("cpu")
