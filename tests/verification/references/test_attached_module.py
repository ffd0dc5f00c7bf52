"""A module with adapters attached: the reference, and the controls, in fp64."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from lora_export.errors import InputRefused, MatchError
from lora_export.lora import LoraPair
from lora_export.models import stored_parameter
from lora_export.models.load import from_module
from lora_export.runtime import torch_runners
from lora_export.verification.module_copies import widened
from lora_export.verification.references import attached_module
from lora_export.verification.references.attached_module import AttachedModule, attach_adapters, with_labels
from support import graphs
from support.small_layers import PAIR, a_linear, an_adapter

CASES = {"first": {"input": np.float32([[1, 1, 2]])}}  # W x + bias = [10, 20], ΔW x = [-2, -4]
WHOLE = {"weight": np.float32([[0, 0, 1], [0, 0, 2]])}


@pytest.fixture(autouse=True, params=[1 << 30, 0], ids=["widened", "large"])
def most_widened(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module is small, or large: one whose weights stay as they are."""
    monkeypatch.setattr(stored_parameter, "MOST_WIDENED_WEIGHTS", request.param)


def ran(attached: AttachedModule, role: str) -> list[float]:
    with widened(attached.module):
        (outputs,) = attached.run([role], CASES)[role].by_case.values()
    (value,) = outputs.values()
    assert value.dtype == np.float64
    return [round(float(number), 9) for number in value[0]]


def with_pair(**fields: object) -> AttachedModule:
    return AttachedModule(attach_adapters(a_linear(), [an_adapter({"weight": PAIR})], None), **fields)  # type: ignore[arg-type]


def test_each_role_has_the_adapter_at_its_strength() -> None:
    attached = with_pair()
    assert attached.groups == (("reference", "base", "scaled"),)
    for _ in range(2):  # a role leaves nothing behind
        assert ran(attached, "reference") == [8, 16]
        assert ran(attached, "base") == [10, 20]
        assert ran(attached, "scaled") == [7.8, 15.6]


def test_strengths_belong_to_adapters() -> None:
    module = attach_adapters(a_linear(), [an_adapter({"weight": PAIR})], [3.0])
    assert ran(AttachedModule(module), "reference") == [4, 8] and not module.training
    with pytest.raises(InputRefused, match="strengths are given, and no adapters that they belong to"):
        attach_adapters(a_linear(), [], [3.0])
    with pytest.raises(MatchError):
        attach_adapters(a_linear(), [an_adapter({"other": PAIR})], None)


def test_without_pairs_the_control_scales_the_whole_tensors() -> None:
    adapter = an_adapter({}, replaced=WHOLE)
    alone = AttachedModule(attach_adapters(a_linear(), [adapter], None), has_pairs=False)
    assert ran(alone, "reference") == [3, 3]  # [2, 4] + bias
    assert ran(alone, "base") == [10, 20]
    assert ran(alone, "scaled") == [3 - 0.7, 3 - 1.7]  # a tenth farther from the base


def test_beside_pairs_a_replaced_tensor_stays_in_every_control() -> None:
    adapter = an_adapter({"weight": PAIR}, replaced={"bias": np.float32([5, 5])})
    attached = AttachedModule(attach_adapters(a_linear(), [adapter], None))
    assert ran(attached, "reference") == [12, 22] and ran(attached, "base") == [14, 26]


def test_rounded_weights_are_used_in_every_role_but_one() -> None:
    tens = {"weight": lambda sums: 10 * np.round(sums / 10)}
    attached = with_pair(rounding=tens)
    assert attached.groups == (("reference",), ("scaled",), ("base", "attached"))
    # W + ΔW = [[3, 2, 1], [8, 5, 2]] -> [[0, 0, 0], [10, 0, 0]]; W -> [[0, 0, 0], [0, 0, 10]]
    assert ran(attached, "reference") == [1, 9]
    assert ran(attached, "base") == [1, 19]
    assert ran(attached, "attached") == [8, 16]


def test_the_rounded_module_shares_what_is_not_rounded() -> None:
    attached = with_pair(rounding={"weight": "bfloat16"})
    made = attached.rounded_module()
    assert made.bias.data_ptr() == attached.module.bias.data_ptr()
    assert torch.equal(made.weight, torch.tensor([[3.0, 2, 1], [8, 5, 2]]))


class Chooses(nn.Module):
    """A module that keeps what it was given between its layers, and fails where that is another run's."""

    fails = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(3, 3, bias=False) for _ in range(2))

    def keep(self, length: int) -> None:
        self.length = length

    def kept(self) -> int:
        return self.length

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.keep(len(input))
        outputs = self.second(self.first(input))
        if self.fails and len(input) != self.kept():
            raise ValueError(f"{self.kept()} rows became {len(input)}")
        return outputs * self.kept()


class ChoosesInDictionary(Chooses):
    """One that keeps it in a dictionary, and computes with what is there."""

    fails = False

    def __init__(self) -> None:
        super().__init__()
        self.known = {"length": 0}

    def keep(self, length: int) -> None:
        self.known["length"] = 1000 + length

    def kept(self) -> int:
        return self.known["length"]


class ChoosesInBuffer(Chooses):
    """One that keeps it in a tensor, and computes with what is there."""

    fails = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("known", torch.zeros((), dtype=torch.int64))

    def keep(self, length: int) -> None:
        self.known.fill_(length)

    def kept(self) -> int:
        return int(self.known)


LENGTHS = {f"{length} rows": {"input": np.ones((length, 3), np.float32)} for length in (2, 1, 5)}
PAIR_OF_THREE = LoraPair(a=[[1, 2, 3]], b=[[1], [2], [3]], scale=1.0)


@pytest.fixture
def widenings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the weights that were widened, in order."""
    sizes: list[int] = []
    original = torch_runners.Fp64Operators._in_scratch

    def in_scratch(self: torch_runners.Fp64Operators, values: torch.Tensor) -> torch.Tensor:
        sizes.append(values.numel())
        return original(self, values)

    monkeypatch.setattr(torch_runners.Fp64Operators, "_in_scratch", in_scratch)
    return sizes


@pytest.mark.parametrize("most", [1 << 29, 100, 0])
@pytest.mark.parametrize("rounding", [{}, {"first.weight": "bfloat16", "second.weight": "bfloat16"}])
@pytest.mark.parametrize("chooses", [None, Chooses, ChoosesInDictionary, ChoosesInBuffer])
def test_runs_in_step_have_the_bits_of_runs_by_themselves(
    chooses: type[Chooses] | None,
    rounding: dict[str, str],
    most: int,
    widenings: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attached_module, "MOST_IN_STEP", most)
    torch.manual_seed(0)
    module = chooses() if chooses else nn.Sequential(OrderedDict(first=nn.Linear(3, 3), second=nn.Linear(3, 3)))
    for parameter in module.parameters():  # as a file in bf16 stores them
        parameter.data = parameter.data.bfloat16().float()
    module = attach_adapters(module, [an_adapter({"first": PAIR_OF_THREE})], None)
    found = []
    for growth in (0.0, None):
        attached = AttachedModule(module, rounding, growth=growth)
        del widenings[:]
        with widened(module):
            found.append([attached.run(roles, LENGTHS) for roles in attached.groups])
        counted = widenings.count(9)
    assert found[0] and str(found[0]) == str(found[1])
    if rounding:
        rounded = torch_runners.Fp64Runner(AttachedModule(module, rounding).rounded_module(0.0))
        by_case = found[1][2]["base"].by_case
        assert str(by_case) == str({name: rounded.run(arrays) for name, arrays in LENGTHS.items()})
    runs = 2 * len(LENGTHS) * (4 if rounding else 3)
    together = 2 * (len(attached.groups) + 2)  # a run by itself and two in step were a test
    is_large = stored_parameter.MOST_WIDENED_WEIGHTS == 0
    if is_large and most > 100:
        assert counted == (runs + 4 if chooses else together)


def test_runs_that_fail_in_step_run_by_themselves() -> None:
    module = attach_adapters(Chooses(), [an_adapter({"first": PAIR_OF_THREE})], None)
    found = [AttachedModule(module, growth=growth).run(("reference",), LENGTHS) for growth in (0.0, 1.0)]
    assert found[0]["reference"].by_case and str(found[0]) == str(found[1])


OF_BODY = LoraPair(a=[[1, 2, 3]], b=[[1], [2], [3]], scale=1.0)


def test_the_model_gets_the_labels_and_shares_all_else() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model = from_module(module, {"input": torch.ones(2, 3)})
    replaced = {"1.weight": np.ones((5, 3), np.float32), "1.bias": np.ones(5, np.float32)}
    resized = with_labels(model, [graphs.an_adapter({"0": OF_BODY}, replaced=replaced)])
    assert resized.module(torch.ones(2, 3)).shape == (2, 5) and module(torch.ones(2, 3)).shape == (2, 2)
    assert torch.equal(resized.module[1].weight, module[1].weight[[0, 1, 0, 1, 0]])
    assert resized.module[0].weight is model.module[0].weight
    assert with_labels(model, [graphs.an_adapter({"0": OF_BODY})]) is model
