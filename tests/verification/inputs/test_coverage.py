"""Pairs and rows that no input reaches make a verdict undecided: a fault in them could not show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lora_export import layers, plan
from lora_export.layers.attachments import attachment_of
from lora_export.lora import Adapter, LoraPair, TokenRows
from lora_export.models import model
from lora_export.models.load import from_module
from lora_export.verification import parity
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.inputs import coverage
from lora_export.verification.inputs.coverage import PairCoverage, RowCoverage, coverage_of_pairs
from lora_export.verification.proof import prove
from support.proofs import bf16_merge, folded


class Routed(nn.Module):
    """Each row goes through one of two experts, by its sign; long batches also through a third layer."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.long = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, result = self.dense(x), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (x[:, 0] > 0).long() == number
            result[rows] = expert(hidden[rows])
        return self.long(result) if len(x) > 64 else result


def routed(*, both: bool) -> model.Model:
    def make(sizes: model.Sizes, generator: torch.Generator) -> model.Inputs:
        x = torch.randn(sizes["batch"], 8, generator=generator)
        x[:, 0] = x[:, 0].abs()
        x[::2, 0] *= -1 if both else 1
        return {"x": x}

    torch.manual_seed(0)
    return model.Model("routed", Routed().eval(), {"x": {0: "batch"}}, make_inputs=make, traced_sizes={"batch": 4})


def an_adapter(*modules: str) -> Adapter:
    rng = np.random.default_rng(0)
    pairs = {
        module: LoraPair(a=rng.standard_normal((2, 8)), b=rng.standard_normal((8, 2)), scale=1.0) for module in modules
    }
    return Adapter(name="a", format="test", pairs=pairs, sha256="0a")


EXPERTS = ("dense", "experts.0", "experts.1")


def test_expert_without_rows_is_undecided_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = routed(both=False), an_adapter(*EXPERTS)
    verdict = prove(folded(base, adapter), PyTorchReferences(base, [adapter])).verdict
    assert verdict.outcome is parity.Outcome.UNDECIDED
    assert "no input reaches experts.0: 1 of the 3 pairs of the adapters were not computed" in str(verdict)
    assert "no output depends on" not in str(verdict), "one message for a pair is enough"
    monkeypatch.setattr(PairCoverage, "findings", parity.Findings())
    assert prove(folded(base, adapter), PyTorchReferences(base, [adapter])).verdict.same


def rare() -> model.Model:
    """Only a row that begins with more than 2.3, one in 93, goes through the second expert."""

    class Rare(Routed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.cat([x[:, :1] - 2.3, x[:, 1:]], 1))

    def make(sizes: model.Sizes, generator: torch.Generator) -> model.ModelInputs:
        return {"x": torch.randn(sizes["batch"], 8, generator=generator)}

    torch.manual_seed(0)
    return model.Model("rare", Rare().eval(), {"x": {0: "batch"}}, make_inputs=make, traced_sizes={"batch": 4})


def test_further_inputs_reach_a_rare_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = rare(), an_adapter(*EXPERTS)
    proof = prove(folded(base, adapter), PyTorchReferences(base, [adapter]))
    assert proof.verdict.same and any(name.startswith("seed 20") for name in proof.inputs)
    wrong = prove(folded(base, an_adapter(*EXPERTS[:2])), PyTorchReferences(base, [adapter])).verdict
    assert wrong.outcome is parity.Outcome.DIFFERENT
    monkeypatch.setattr(coverage, "MOST_DRAWS", 0)
    verdict = prove(folded(base, adapter), PyTorchReferences(base, [adapter])).verdict
    assert verdict.outcome is parity.Outcome.UNDECIDED and "no input reaches experts.1" in str(verdict)


def test_every_expert_with_rows_is_decided() -> None:
    base, adapter = routed(both=True), an_adapter(*EXPERTS)
    assert prove(folded(base, adapter), PyTorchReferences(base, [adapter])).verdict.same


def test_layer_for_long_inputs_alone_is_undecided() -> None:
    base, adapter = routed(both=True), an_adapter("dense", "long")
    verdict = prove(folded(base, adapter), PyTorchReferences(base, [adapter])).verdict
    assert verdict.outcome is parity.Outcome.UNDECIDED and "no input reaches long: 1 of the 2 pairs" in str(verdict)


def test_pairs_of_a_rounded_merge_are_watched_too() -> None:
    base, adapter = routed(both=False), an_adapter(*EXPERTS)
    verdict = prove(bf16_merge(base, adapter), PyTorchReferences(base, [adapter])).verdict
    assert any("no input reaches experts.0" in reason.text for reason in verdict.reasons)


def test_long_lists_of_pairs_are_cut() -> None:
    base = routed(both=False)
    module = nn.ModuleList(nn.Linear(8, 8) for _ in range(9))
    layers.attach(module, plan.make([an_adapter(*map(str, range(9)))], layers.specs(module)))
    computed = {attachment_of(module[0]).branches[0]}
    (doubt,) = coverage_of_pairs(module, {}, computed).findings.doubts
    assert "no input reaches 1, 2, 3, 4, 5 and 3 more: 8 of the 9 pairs" in doubt
    assert coverage_of_pairs(base.module, {}, ()).findings == parity.Findings()


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2, 2)  # its step comes first
        self.words = nn.Embedding(9, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        words = torch.cat([self.words(ids[:, :1]), self.words(input=ids[:, 1:])], dim=1)
        return self.last(words)


@pytest.mark.parametrize(
    ("ids", "doubts", "not_judged"),
    [
        ([0, 1], ["words.weight: none of the 2 rows that the adapter brings was looked up"], []),
        ([0, 3], [], ["words.weight: 1 of the 2 rows that the adapter brings. They were not looked up"]),
        ([7, 3], [], []),
    ],
    ids=["none", "some", "all"],
)
def test_rows_that_were_not_looked_up_are_reported(ids: list[int], doubts: list[str], not_judged: list[str]) -> None:
    model = from_module(Words(), {"ids": torch.zeros(2, 2, dtype=torch.int64)})
    rows = TokenRows(np.array([3, 7]), np.ones((2, 2)))
    pairs = {"last": LoraPair(a=np.ones((1, 2)), b=np.ones((2, 1)), scale=1.0)}
    adapter = Adapter(name="rows", format="test", pairs=pairs, token_rows={"words.weight": rows}, sha256="00")
    looked_up = RowCoverage(model.module, model, [adapter])
    model.module(torch.tensor([ids]))
    assert [doubt.partition(". ")[0] for doubt in looked_up.findings.doubts] == doubts
    assert list(looked_up.findings.not_judged) == not_judged
