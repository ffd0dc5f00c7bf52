"""Parameters whose values are read when something computes with them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its name everywhere
from torch import Tensor, nn

from lora_export.models.stored_parameter import StoredParameter, packed, read_stored, state_of
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner

VALUES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
X = torch.tensor([[1.0, 0.0, 2.0]])


def stored(values: Tensor = VALUES, dtype: torch.dtype = torch.float32) -> StoredParameter:
    made = packed(values, dtype)
    assert isinstance(made, StoredParameter)
    return made


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: F.linear(X, w),
        lambda w: X @ w.T,
        lambda w: w.t().contiguous(),
        lambda w: w[1],
        lambda w: torch.cat([w, w]),
        lambda w: w.data * 2,
        lambda w: w.detach().clone(),
        lambda w: F.embedding(torch.tensor([1, 1]), w),
        lambda w: w.double(),
        lambda w: w.to(torch.float64),
        lambda w: w + 1,
        lambda w: torch.from_numpy(w.numpy()),
    ],
)
def test_functions_get_the_values_in_the_dtype_of_the_parameter(compute: object) -> None:
    found, expected = compute(stored(VALUES.bfloat16())), compute(VALUES)  # type: ignore[operator]
    assert type(found) is Tensor
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_facts_are_those_of_the_tensor_and_nothing_is_read() -> None:
    def refuse() -> Tensor:
        raise AssertionError("read")

    made = StoredParameter((2, 3), refuse, torch.float32)
    assert (made.shape, made.dtype, made.ndim, made.numel(), made.nbytes) == ((2, 3), torch.float32, 2, 6, 24)
    assert (made.stride(), made.is_contiguous(), len(made), made.requires_grad) == ((3, 1), True, 2, False)
    assert isinstance(made, nn.Parameter)
    assert repr(made) == "StoredParameter((2, 3), torch.float32)"


def test_two_parameters_are_not_taken_for_one_tied_tensor() -> None:
    assert stored().data_ptr() != stored().data_ptr()


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.copy_(VALUES),
        lambda w: w.mul_(2),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.__iadd__(1),
        lambda w: setattr(w, "data", VALUES),
    ],
)
def test_no_change_is_lost_in_silence(change: object) -> None:
    with pytest.raises(RuntimeError, match="cannot be changed"):
        change(stored())  # type: ignore[operator]


def test_the_values_of_the_placeholder_itself_are_nan() -> None:
    with torch._C.DisableTorchFunctionSubclass():
        assert F.linear(X, stored()).isnan().all()


def test_copies_and_state_do_not_read() -> None:
    module = nn.Linear(3, 2, bias=False)
    module.weight = stored()
    own = copy.deepcopy(module)
    assert isinstance(own.weight, StoredParameter)
    assert isinstance(state_of(own)["weight"], StoredParameter)
    assert torch.equal(own.weight.detach(), VALUES)


class Reads(nn.Module):
    """Computes with a weight in several ways, and asks for its dtype."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight) if type(weight) is Tensor else weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.to(self.weight.dtype)
        return {
            "linear": F.linear(x, self.weight),
            "turned": x @ self.weight.T,
            "split": torch.cat([x @ part.t() for part in self.weight.split(1)], -1),
            "rows": F.embedding(torch.tensor([1]), self.weight),
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp64_and_fp32_runs_are_those_of_a_module_in_memory(dtype: torch.dtype) -> None:
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole, read = Reads(values.float()), Reads(stored(values))
    inputs = {"x": torch.randn(4, 3).numpy()}
    for run in (lambda module: ModuleRunner(module).run(inputs), lambda module: Fp64Runner(module).run(inputs)):
        expected, found = run(whole), run(read)
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert (found[name] == value).all()
    narrow: set[str] = set()
    Fp64Runner(read, narrow).run(inputs)
    assert not narrow


def test_stored_parameters_are_read_into_memory_once() -> None:
    made = []

    def values() -> torch.Tensor:
        made.append(1)
        return torch.arange(6.0).reshape(2, 3).bfloat16()

    module = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(3, 2))
    module[0].weight = module[1].weight = StoredParameter((2, 3), values)
    bias = module[1].bias
    read_stored(module)
    assert made == [1] and module[0].weight is module[1].weight and module[1].bias is bias
    assert type(module[0].weight) is nn.Parameter and not module[0].weight.requires_grad
    assert torch.equal(module[0].weight, torch.arange(6.0).reshape(2, 3))
