"""Modules as deployed and in fp64, and TorchScript files."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import nn

from lora_export.errors import RuntimeRefused
from lora_export.models.stored_parameter import StoredParameter
from lora_export.runtime import torch_runners
from lora_export.runtime.runner import TooSlow
from lora_export.runtime.torch_runners import ModuleRunner


class Casting(nn.Module):
    """Casts to narrower floats inside, as Llama's norms do, in several ways."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = x.to(torch.float32) / 3
        b = x.float() / 7
        c = torch.softmax(x, dim=-1, dtype=torch.float32)
        return a + b + c + x.half() / 5 + x.bfloat16().to(torch.float16) / 9


class Parts(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"last": x, "layers": (x + 1, x + 2), "nothing": None}


def test_fp64_runner_replaces_casts_to_narrower_floats() -> None:
    x = np.array([[0.1, 0.2, 0.7]])
    reference = torch_runners.Fp64Runner(Casting().double())
    result = reference.run({"x": x})["output_0"]
    softmax = np.exp(x) / np.exp(x).sum()
    np.testing.assert_allclose(result, x / 3 + x / 7 + x / 5 + x / 9 + softmax, rtol=1e-15)  # fp32: off by 1e-8
    assert reference.narrow_operators == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fp64_runner_records_operators_below_fp64(dtype: torch.dtype) -> None:
    class AlwaysNarrow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + ones.exp()

    ones = torch.ones(3, dtype=dtype)
    reference = torch_runners.Fp64Runner(AlwaysNarrow().double())
    reference.run({"x": np.zeros((1, 3))})
    assert any("exp" in operator for operator in reference.narrow_operators)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["wide", "narrow"])
def test_fp64_runner_computes_products_of_experts(dtype: torch.dtype) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0)))

        def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            return nn.functional.grouped_mm(x, self.weights, offs=ends)

    rows, ends = np.random.default_rng(0).normal(size=(5, 16)), np.array([2, 2, 5, 5], np.int32)  # two have no rows
    experts = Experts().to(dtype)
    with pytest.raises(RuntimeError, match="Double"):
        experts(torch.from_numpy(rows), torch.from_numpy(ends))
    reference = torch_runners.Fp64Runner(experts)
    output = reference.run({"x": rows, "ends": ends})["output_0"]
    weights = experts.weights.detach().double().numpy()
    np.testing.assert_allclose(
        output, np.concatenate([rows[:2] @ weights[0], rows[2:] @ weights[2]]), rtol=1e-14, atol=1e-14
    )
    assert not reference.narrow_operators


def test_fp64_runner_restores_the_default_dtype() -> None:
    torch_runners.Fp64Runner(nn.Identity().double()).run({"input": np.zeros((1, 3))})
    assert torch.get_default_dtype() == torch.float32


def test_outputs_have_the_mappings_names_and_numbered_parts() -> None:
    runner = torch_runners.ModuleRunner(Parts())
    result = runner.run({"x": np.array([5.0], np.float32)})
    assert {name: value.tolist() for name, value in result.items()} == {
        "last": [5.0],
        "layers.0": [6.0],
        "layers.1": [7.0],
    }
    assert runner.names_known


def test_unnamed_outputs_are_numbered() -> None:
    runner = torch_runners.ModuleRunner(nn.Identity())
    assert list(runner.run({"input": np.zeros((1, 2), np.float32)})) == ["output_0"]
    assert not runner.names_known


def test_a_scalar_stays_a_scalar() -> None:
    for dtype in (np.float32, np.int64, ml_dtypes.bfloat16):
        assert torch_runners.to_tensor(np.asarray(3, dtype)).shape == ()


def test_bf16_module_returns_bf16() -> None:
    module = nn.Linear(2, 1, bias=False).bfloat16()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0]]))
    output = torch_runners.ModuleRunner(module).run({"input": np.array([[3.0, 4.0]], np.float32)})
    assert output["output_0"].dtype == ml_dtypes.bfloat16
    assert output["output_0"].astype(np.float32).tolist() == [[11.0]]


def test_module_that_returns_no_tensor_is_refused() -> None:
    class NoTensors(nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "nothing"

    with pytest.raises(RuntimeRefused, match="returned str"):
        torch_runners.ModuleRunner(NoTensors()).run({"x": np.zeros(1, np.float32)})


def test_a_failure_names_the_sizes_of_the_inputs() -> None:
    with pytest.raises(RuntimeRefused, match=r"^Linear itself fails on the inputs \(input \[1, 3\]\): mat1 and mat2"):
        ModuleRunner(nn.Linear(2, 2)).run({"input": np.ones((1, 3), np.float32)})


def test_a_run_ends_at_the_first_operator_after_its_time_limit() -> None:
    class Endless(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while True:
                x = x + 1

    runner = torch_runners.ModuleRunner(Endless(), path=Path("endless"), timeout=0.2)
    with pytest.raises(TooSlow, match=r"endless did not finish within 0\.2 seconds. Allow more with timeout="):
        runner.run({"x": np.ones(3)})
    right = torch_runners.ModuleRunner(Parts(), path=Path("parts"), timeout=30)
    for _ in range(2):
        assert right.run({"x": np.ones(1)}).keys() == torch_runners.ModuleRunner(Parts()).run({"x": np.ones(1)}).keys()


# --- runs that read each weight once ---


READS: list[torch.Tensor] = []


class Streamed(nn.Module):
    """A table and two layers that are read from a file, one of them tied."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.change, self.runs = change, 0
        values = [torch.randn(7, 5).bfloat16(), torch.randn(7, 5).bfloat16()]
        self.table, self.first = (StoredParameter(each.shape, functools.partial(self.read, each)) for each in values)

    def read(self, values: torch.Tensor) -> torch.Tensor:
        READS.append(values)
        return values

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(F.linear(F.embedding(ids, self.table), self.first))
        if self.change == "state":
            self.runs += 1
        if self.change == "fails" and ids.numel() == 3:
            raise ValueError("three")
        if self.change == "random":
            x = x + torch.rand(())
        if self.change == "random from a seed":
            torch.manual_seed(0)
        if self.change == "state that is put back":
            self.runs = ids.numel()
        y = F.linear(x[..., :5], self.table, torch.ones(7))
        if self.change == "random from a seed":
            return y + torch.rand_like(y)
        if self.change == "state that is put back":
            y, self.runs = y * self.runs, 0
        return y


IDS: list[dict[str, Any]] = [{"ids": np.arange(count)[None]} for count in (2, 3, 5)]


def together(module: Streamed, **options: Any) -> list[Any] | None:
    found = ModuleRunner(module, **options).run_together(IDS, dict)
    return None if found is None else [outputs["output_0"].tolist() for outputs in found]


def test_runs_together_have_the_bits_of_single_runs() -> None:
    module = Streamed()
    expected = [ModuleRunner(module).run(inputs)["output_0"].tolist() for inputs in IDS]
    READS.clear()
    assert together(module, timeout=60.0) == expected
    assert len(READS) == 6, "three by the first run alone, and three by all"


def test_runs_that_were_as_alone_once_are_together_from_then_on() -> None:
    runner = ModuleRunner(Streamed())
    alone = [runner.run(inputs)["output_0"].tolist() for inputs in IDS[1:]]
    assert runner.run_together(IDS, dict)
    READS.clear()
    assert [outputs["output_0"].tolist() for outputs in runner.run_together(IDS[1:], dict) or ()] == alone
    assert len(READS) == 3


@pytest.mark.parametrize("change", ["state", "state that is put back", "fails", "random", "random from a seed"])
def test_runs_that_depend_on_others_or_fail_are_not_together(change: str) -> None:
    assert together(Streamed(change)) is None


def test_few_runs_large_outputs_and_modules_in_memory_are_not_together(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ModuleRunner(Streamed())
    assert runner.run_together(IDS[:2], dict) is None and runner.run_together(IDS, dict)
    monkeypatch.setattr(torch_runners, "MOST_IN_STEP", 8)
    assert runner.run_together(IDS, dict) is None
    assert ModuleRunner(nn.Linear(2, 2)).run_together([{"input": np.ones((1, 2), np.float32)}] * 3, dict) is None
