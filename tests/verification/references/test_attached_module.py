"""A module with adapters attached: the reference, and the controls, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lora_export.errors import InputRefused, MatchError
from lora_export.lora import LoraPair
from lora_export.models import stored_parameter
from lora_export.models.load import from_module
from lora_export.verification.module_copies import widened
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
        (outputs,) = attached.run(role, CASES, set()).values()
    (value,) = outputs.values()
    assert value.dtype == np.float64
    return [round(float(number), 9) for number in value[0]]


def with_pair(**fields: object) -> AttachedModule:
    return AttachedModule(attach_adapters(a_linear(), [an_adapter({"weight": PAIR})], None), **fields)  # type: ignore[arg-type]


def test_each_role_has_the_adapter_at_its_strength() -> None:
    attached = with_pair()
    assert attached.roles == ("reference", "base", "scaled")
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
    assert attached.roles == ("reference", "base", "scaled", "attached")
    # W + ΔW = [[3, 2, 1], [8, 5, 2]] -> [[0, 0, 0], [10, 0, 0]]; W -> [[0, 0, 0], [0, 0, 10]]
    assert ran(attached, "reference") == [1, 9]
    assert ran(attached, "base") == [1, 19]
    assert ran(attached, "attached") == [8, 16]


def test_the_rounded_module_shares_what_is_not_rounded() -> None:
    attached = with_pair(rounding={"weight": "bfloat16"})
    made = attached.rounded_module()
    assert made.bias.data_ptr() == attached.module.bias.data_ptr()
    assert torch.equal(made.weight, torch.tensor([[3.0, 2, 1], [8, 5, 2]]))


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
