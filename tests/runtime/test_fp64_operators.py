"""A module whose weights stay narrow computes what it computes in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import nn

from lora_export.runtime import torch_runners
from lora_export.runtime.torch_runners import Fp64Runner

NARROW = [torch.float32, torch.float16, torch.bfloat16]
WORDS, WIDTH = 12, 8


class Everything(nn.Module):
    """Weights that are read in many ways: by layers, by functions, by rows, as views, by other modules, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)  # reads out_proj.weight itself
        self.bare = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.experts = nn.Parameter(torch.randn(4, WIDTH, WIDTH))
        self.register_buffer("table", torch.randn(WORDS, WIDTH))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        x = self.norm(self.inner(x.to(self.bare.dtype)))
        x = x + self.attention(x, x, x)[0] + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.table[ids].to(torch.float32) + self.table[: ids.shape[1]].float()
        x = x @ self.bare.T + torch.matmul(x, self.bare.view(WIDTH, WIDTH)) + x @ self.experts[2]
        x = x + F.linear(x, self.bare[:, torch.arange(WIDTH)], self.inner.bias)
        x += self.bare.mean() + self.bare[0] * 2
        x = x + torch.stack([expert.sum(0) for expert in self.experts]).sum(0) + self.bare.norm()
        return F.linear(torch.softmax(x, -1, dtype=torch.float32), self.words.weight)  # tied


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("most_widened", [1 << 30, 3 * WIDTH * 8], ids=["whole layers", "three outputs at once"])
def test_narrow_weights_compute_what_fp64_ones_do(
    dtype: torch.dtype, most_widened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_runners, "MOST_WIDENED", most_widened)
    torch.manual_seed(0)
    module = Everything().eval().to(dtype)
    before = {name: tensor.clone() for name, tensor in tensors(module).items()}
    narrow, wide = Fp64Runner(module), Fp64Runner(copy.deepcopy(module).double())
    ids = np.array([[1, 5, 3], [0, 11, 2]])
    own, expected = narrow.run({"ids": ids})["output_0"], wide.run({"ids": ids})["output_0"]
    assert own.dtype == np.float64
    np.testing.assert_allclose(own, expected, rtol=1e-13, atol=1e-13)
    assert narrow.narrow_operators == set()
    assert all(tensor.dtype == dtype and tensor.equal(before[name]) for name, tensor in tensors(module).items())


class Local(nn.Module):
    """Computes with a narrow tensor that is no weight."""

    def __init__(self, compute: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.weight, self.compute = nn.Parameter(torch.ones(3)), compute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.compute(torch.ones(3, dtype=torch.float32).numpy().sum() * CONSTANT)


CONSTANT = torch.ones(3)


def test_a_narrow_tensor_that_is_no_weight_is_still_recorded() -> None:
    runner = Fp64Runner(Local(torch.exp))
    runner.run({"x": np.zeros((1, 3))})
    assert any("exp" in operator for operator in runner.narrow_operators)


def test_memory_of_widened_weights_is_used_again() -> None:
    operators = torch_runners.Fp64Operators(nn.Linear(1, 1), torch_runners.NarrowOperators(set()))
    values = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    first = operators._in_scratch(values)
    assert first.dtype == torch.float64 and first.equal(values.double())
    second = operators._in_scratch(-values[:1])
    assert second.equal(-values[:1].double()) and second.data_ptr() == first.data_ptr()
    assert operators._in_scratch(torch.ones(4, 3)).equal(torch.ones(4, 3, dtype=torch.float64))
