"""Copies of modules that share or convert tensors, and modules widened in place."""

from __future__ import annotations

import pytest
import torch

from lora_export.verification.references.module_copies import shared_copy, widened


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
