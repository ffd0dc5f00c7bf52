"""Copies of modules that share or convert tensors, and modules widened in place."""

from __future__ import annotations

import pytest
import torch

from lora_export.models import stored_parameter
from lora_export.verification import module_copies
from lora_export.verification.module_copies import is_large, limit_outputs, shared_copy, widened


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widening_keeps_shared_tensors_and_restores_every_bit(dtype: torch.dtype) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3)).to(dtype)
    module[2].weight = torch.nn.Parameter(module[0].weight.detach())  # another parameter, the same memory
    sharing = shared_copy(module)
    bits = {name: value.clone() for name, value in module.state_dict().items()}

    class Interrupted(Exception):
        pass

    with pytest.raises(Interrupted), widened(module):
        for each in (module, sharing):
            dtypes = {name: value.dtype for name, value in each.state_dict().items()}
            assert dtypes.pop("1.num_batches_tracked") is torch.int64 and set(dtypes.values()) == {torch.float64}
        assert module[0].weight.data_ptr() == module[2].weight.data_ptr() == sharing[0].weight.data_ptr()
        raise Interrupted
    for each in (module, sharing):
        assert all(torch.equal(bits[name], value) for name, value in each.state_dict().items())
        assert {value.dtype for value in each.parameters()} == {dtype}
    assert module[0].weight.data_ptr() == module[2].weight.data_ptr()


def test_outputs_of_a_copy_are_limited() -> None:
    class Both(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": x, "hidden": x + 1}

    module, x = Both(), torch.ones(2)
    copy = shared_copy(module)
    limit_outputs(copy, ("logits", "lacking"))
    assert list(copy(x)) == list(shared_copy(copy)(x=x)) == ["logits"] and isinstance(copy, Both)
    assert list(module(x)) == ["logits", "hidden"]


def test_a_large_module_keeps_its_weights_unless_a_part_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.Linear(3, 3)  # 12 numbers, 96 bytes in fp64
    compiled = torch.nn.Sequential(linear, torch.jit.script(torch.nn.Linear(3, 3)))
    assert not is_large(linear)
    released = []
    monkeypatch.setattr(module_copies, "release_memory", released.append)
    for most, large in [(95, True), (96, False)]:
        monkeypatch.setattr(stored_parameter, "MOST_WIDENED_WEIGHTS", most)
        assert (is_large(linear), is_large(compiled)) == (large, False)
        with widened(linear):
            assert linear.weight.dtype is (torch.float32 if large else torch.float64)
        assert released == ([] if large else [96])  # the memory that fp64 took is given back
