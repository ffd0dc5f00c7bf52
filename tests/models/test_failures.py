"""A failure of a model's own code has the model's name; a machine without memory is no failure of the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.models.failures import named_failures
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner


def test_the_message_names_model_inputs_and_innermost_cause() -> None:
    with (
        pytest.raises(RuntimeRefused, match=r"^Linear itself fails on the inputs \(x, y\): 7 of 8$"),
        named_failures(nn.Linear(1, 1), ["x", "y"]),
    ):
        raise KeyError("outer") from ValueError("7 of 8\n\nmore")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("can't start new thread"),
        InputRefused("an input of ours"),
    ],
)
def test_other_failures_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, named_failures(nn.Linear(1, 1), ["x"]):
        raise error
    assert raised.value is error


def test_runners_name_the_model_that_fails() -> None:
    x = {"input": torch.ones(2, 3).numpy()}
    for runner in (ModuleRunner(nn.Linear(4, 4)), Fp64Runner(nn.Linear(4, 4).double())):
        with pytest.raises(RuntimeRefused, match=r"^Linear itself fails on the inputs \(input\): mat1 and mat2 shapes"):
            runner.run(x)
