"""Numbers moved by one rounding: what another right computation in fp32 may have."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import nn

from lora_export import layers, plan
from lora_export.lora import Adapter
from lora_export.models import model
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.candidate_outputs import OnProofStep
from lora_export.verification.compare_outputs import same_bits
from lora_export.verification.parity import Outcome
from lora_export.verification.prepared_pytorch import PreparedPyTorch
from lora_export.verification.proof import Proof, prove
from lora_export.verification.references import FurtherPeer, further_peers
from lora_export.verification.references.further_peers import (
    MOVED_FUNCTIONS,
    MOVED_WEIGHTS,
    MovedFunctions,
    move_weights,
)
from support.proofs import an_adapter


def neighbours(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    up, down = (torch.nextafter(values, torch.full_like(values, end)) for end in (torch.inf, -torch.inf))
    return up, down


def test_moved_weights_are_the_neighbours_of_the_weights() -> None:
    layer = torch.nn.Linear(40, 30)
    with torch.no_grad():
        layer.bias[:2] = torch.tensor([torch.inf, 0.0])
    before = layer.weight.detach().clone()
    moved = copy.deepcopy(layer)
    move_weights(moved, layer, seed=1)
    assert torch.equal(layer.weight, before)
    up, down = neighbours(before)
    goes_up = moved.weight == up
    assert torch.equal(moved.weight, torch.where(goes_up, up, down))
    assert 0.4 < goes_up.float().mean() < 0.6
    assert moved.bias[0] == torch.inf  # no number has it as a neighbour
    assert 0 < abs(moved.bias[1]) < 1e-44
    first = moved.weight.detach().clone()
    move_weights(moved, layer, seed=2)
    assert not torch.equal(moved.weight, first)
    move_weights(moved, layer, seed=1)
    assert torch.equal(moved.weight, first)


def test_moved_weights_stay_tied_and_integers_stay() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5))
    module[1].weight = module[0].weight
    module.register_buffer("ids", torch.arange(3))
    moved = copy.deepcopy(module)
    move_weights(moved, module, seed=0)
    assert moved[1].weight is moved[0].weight
    assert torch.equal(moved.ids, module.ids)


def test_results_of_functions_are_the_neighbours_of_right_ones() -> None:
    x = torch.linspace(-3, 3, 200)
    with MovedFunctions(seed=1):
        results = {name: getattr(x, name)() for name in ("exp", "sin", "cos", "exp2")}
        in_place = x.clone().exp_()
        exact = torch.cat([torch.tensor([-torch.inf, 0.0]).exp(), torch.full((1,), 9.0).log(), x**2, x + 1])
        wide = x.double().exp()
    for name, moved in {**results, "exp_": in_place}.items():
        right = getattr(x.clone(), name)()
        up, down = neighbours(right)
        assert torch.equal(moved, torch.where(moved > right, up, down))
        assert 0.4 < (moved > right).float().mean() < 0.6
    assert torch.equal(exact, torch.cat([torch.tensor([0.0, 1.0]), torch.full((1,), 9.0).log(), x**2, x + 1]))
    assert torch.equal(wide, x.double().exp())


class AtTime(nn.Module):
    """What models of diffusion make of a time step, and a layer."""

    def __init__(self, period: float = 2.0, step: float = 0.0) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.period, self.step = period, step

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(-math.log(self.period) * torch.arange(4) / 4)
        if self.step:  # another library's
            frequencies = torch.nextafter(frequencies, torch.where(frequencies == 1, 1.0, self.step))
        angles = time[:, None] * frequencies
        return self.dense(torch.cat([angles.sin(), angles.cos()], dim=1))


class AtRows(nn.Module):
    """Rows of a table, whose numbers are made of floats: a rounding down chooses another row."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.dense, self.table, self.factor = nn.Linear(8, 8), nn.Embedding(16, 8), factor

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        rows = torch.exp2(torch.arange(1.0, 4.0)).long()  # 2, 4, 8
        return self.dense(self.table(rows).sum(0) + time[:, None] / 1000) * self.factor


def in_another_way(make: type[AtTime | AtRows] = AtTime, **other: float) -> tuple[ModuleRunner, PyTorchReferences]:
    """A candidate that computes in another way, and its references."""
    torch.manual_seed(0)
    module = make().eval()

    def inputs(sizes: model.Sizes, generator: torch.Generator) -> model.ModelInputs:
        powers = torch.randint(8, 11, (100 * sizes["batch"],), generator=generator)
        return {"time": 2.0**powers}  # whose products are not rounded

    base = model.Model("time", module, axes={"time": {0: "batch"}}, make_inputs=inputs, traced_sizes={"batch": 2})
    adapter: Adapter = an_adapter()
    candidate = make(**other).eval()
    candidate.load_state_dict(copy.deepcopy(module.state_dict()))
    layers.fold(candidate, plan.make([adapter], layers.specs(candidate)))
    return ModuleRunner(candidate), PyTorchReferences(base, [adapter])


def judged(make: type[AtTime | AtRows] = AtTime, **other: float) -> Proof:
    return prove(*in_another_way(make, **other))


def test_outputs_of_a_case_do_not_depend_on_other_cases() -> None:
    candidate, references = in_another_way()
    prepared = references.prepare(candidate, references.inputs(candidate))
    *others, last = prepared.inputs.cases
    together, alone = (list(prepared.further_peers(lambda _: None, names)) for names in ([*others, last], [last]))
    assert len(together) == len(alone) and {peer.note for peer in alone} >= {MOVED_WEIGHTS, MOVED_FUNCTIONS}
    for peer, own in zip(together, alone, strict=True):
        assert same_bits(peer.outputs[last], own.outputs[last]) and peer.note == own.note


def test_a_time_steps_angle_may_be_that_of_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two is further from the right frequencies than twice PyTorch's own, whichever way that rounds."""
    asked, further = list[int](), PreparedPyTorch.further_peers

    def recorded(prepared: PreparedPyTorch, step: OnProofStep, cases: Sequence[str]) -> Iterator[FurtherPeer]:
        asked.append(len(cases))
        return further(prepared, step, cases)

    monkeypatch.setattr(PreparedPyTorch, "further_peers", recorded)
    proofs = [judged(step=step) for step in (math.inf, -math.inf)]
    assert all(proof.verdict.same for proof in proofs), list(map(str, proofs))
    assert any(MOVED_FUNCTIONS in proof.verdict.notes for proof in proofs)
    assert {*asked} == {1, len(proofs[0].cases)}
    asked.clear()
    assert judged(period=2.0001).verdict.outcome is Outcome.DIFFERENT
    assert asked == [1]  # a case that no peer excuses is enough
    monkeypatch.setattr(further_peers, "LIBRARY_FUNCTIONS", frozenset())
    assert Outcome.DIFFERENT in [judged(step=step).verdict.outcome for step in (math.inf, -math.inf)]


def test_a_run_that_chose_other_rows_allows_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged(AtRows).verdict.same
    assert judged(AtRows, factor=1.001).verdict.outcome is Outcome.DIFFERENT
    monkeypatch.setattr(further_peers, "FARTHEST_MOVED", math.inf)
    assert judged(AtRows, factor=1.001).verdict.outcome is not Outcome.DIFFERENT
