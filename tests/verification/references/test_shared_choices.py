"""A candidate that chooses another expert where scores tie is right; one with a fault beside it is not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lora_export import layers, plan
from lora_export.graph.onnx_file.writing import save_graph
from lora_export.models import model, stored_parameter
from lora_export.models.export import to_onnx
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Runner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification import prepared_pytorch
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.parity import Findings, Outcome
from lora_export.verification.prepared_pytorch import PreparedPyTorch
from lora_export.verification.proof import Proof, prove
from lora_export.verification.references import shared_choices
from lora_export.verification.references.top_k import Call, Choice
from support.proofs import an_adapter

ROWS, MANY_ROWS = 10, 600  # of few, hardly any processor's sums turn more than ten
ROUNDING = 2.0**-23  # relative: what any other way to compute a score in fp32 may do


class Choose(nn.Module):
    """The best expert by scores that have factors."""

    def __init__(self, factors: Sequence[float]) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return (scores * torch.tensor(self.factors)).topk(1).indices


class ChooseLast(Choose):
    """The last one of experts whose scores are 0."""

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return (scores + torch.tensor([0, 0, 0, 1e-30])).topk(1).indices


class ChooseAmongFive(Choose):
    """The fifth expert is the fourth, and a little better."""

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        scores = scores * torch.tensor(self.factors)
        return torch.cat([scores, scores[:, 3:] + 1e-6], -1).topk(1).indices.clamp(max=3)


class Mixture(nn.Module):
    """A layer, and four experts of which a token gets the best. The first two have nearly equal scores at every token.

    Another way to compute it has factors: on the layer, on the scores that choose, on what the experts return.
    """

    def __init__(
        self,
        layer: float = 1.0,
        scores: Sequence[float] = (1.0,) * 4,
        outputs: float = 1.0,
        choose: type[Choose] = Choose,
        times: int = 1,  # that it chooses
        gap: float = ROUNDING / 2,  # relative, of the first two scores
    ) -> None:
        super().__init__()
        self.dense, self.router = nn.Linear(8, 8), nn.Linear(8, 4, bias=False)
        self.experts = nn.Parameter(torch.randn(4, 8, 8))
        with torch.no_grad():
            self.router.weight[1] = self.router.weight[0] * (1 - gap)
        self.layer, self.outputs, self.times = layer, outputs, times
        self.choose = choose(scores)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.dense(x) * self.layer)
        scores = self.router(x)
        indices = torch.zeros_like(scores[:, :1], dtype=torch.long)
        for _ in range(self.times):
            indices = self.choose(scores)
        outputs = torch.einsum("bi,eoi->beo", x, self.experts) * self.outputs
        return outputs.gather(1, indices[..., None].expand(-1, -1, 8))[:, 0] * scores.softmax(-1).gather(1, indices)


TURNED = (1.0, 1 + ROUNDING, 1.0, 1.0)  # the second expert is the better one wherever the tied scores are above 0


def judged(
    as_run: Callable[[Mixture], Runner] = ModuleRunner,
    rows: int = ROWS,
    times: int = 1,
    gap: float = ROUNDING / 2,
    router: float = 1.0,  # a factor on its weights
    **factors: Any,
) -> Proof:
    torch.manual_seed(0)
    module = Mixture(times=times, gap=gap).eval()
    module.router.weight.data *= router

    def inputs(sizes: model.Sizes, generator: torch.Generator) -> model.ModelInputs:
        return {"x": torch.randn(rows + sizes["batch"], 8, generator=generator)}

    base = model.Model("mixture", module, axes={"x": {0: "batch"}}, make_inputs=inputs, traced_sizes={"batch": 2})
    adapter = an_adapter(0.1)
    candidate = Mixture(**{"scores": TURNED, "times": times, **factors}).eval()
    candidate.load_state_dict(copy.deepcopy(module.state_dict()))
    layers.fold(candidate, plan.make([adapter], layers.specs(candidate)))
    return prove(as_run(candidate), PyTorchReferences(base, [adapter]))


@pytest.fixture
def as_graph(tmp_path: Path) -> Callable[[Mixture], Runner]:
    def runner(module: Mixture) -> Runner:
        graph = to_onnx(module, {"x": torch.randn(5, 8)}, axes={"x": {0: "batch"}})
        save_graph(graph, tmp_path, "model.onnx")
        return OnnxRunner(tmp_path / "model.onnx")

    return runner


def test_another_choice_at_a_tie_is_right(as_graph: Callable[[Mixture], Runner]) -> None:
    for as_run in (ModuleRunner, as_graph):
        verdict = judged(as_run).verdict
        assert verdict.same, str(verdict)
        assert any(re.search(r"took the candidate's choice: in [1-9]\d* of 38 rows", note) for note in verdict.notes)


def test_choices_that_pytorch_cannot_make_are_not_taken() -> None:
    verdict = judged(choose=ChooseAmongFive).verdict
    assert not verdict.same and not any("took the candidate's choice" in note for note in verdict.notes)


def test_a_call_without_rows_is_read() -> None:
    call, none = Call("", 0, (0, 5)), torch.zeros(0, 2, dtype=torch.int64)
    assert list(shared_choices._by_call({call: Choice(torch.zeros(0, 5), none, True)}, [none])) == [call]


@pytest.mark.parametrize(("times", "reads"), [(0, 0), (1, 1), (2, 0)])
def test_a_candidate_is_read_where_pytorch_makes_each_call_once(
    times: int, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    monkeypatch.setattr(prepared_pytorch, "choice_reader", lambda _: lambda *given: read.append(given))
    assert not judged(times=times, layer=1.00001).verdict.same
    assert len(read) == reads


@pytest.mark.parametrize(
    ("taken", "peer", "is_by_rounding"), [(10, 0, True), (11, 0, False), (25, 5, True), (26, 5, False)]
)
def test_three_times_the_rows_of_pytorch_and_ten_more_are_by_rounding(
    taken: int, peer: int, is_by_rounding: bool
) -> None:
    scores, indices = torch.tensor([[1.0, 0.0]] * 30), torch.tensor([[1]] * taken + [[0]] * (30 - taken))
    chosen = {"a": {Call("", 0, (30, 2)): Choice(scores, indices)}}
    assert shared_choices.SharedChoices({}, {}, chosen, peer).is_by_rounding == is_by_rounding


def test_it_is_the_choice_that_makes_it_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_pytorch, "shared_choices", lambda *_: None)
    assert not judged().verdict.same


@pytest.mark.parametrize(
    "factors",
    [
        pytest.param({"layer": 1.00001}, id="layer"),
        pytest.param({"outputs": 1.00001}, id="experts"),
        pytest.param({"scores": (1.0, 1 + ROUNDING, 1.1, 1.0)}, id="choice"),
    ],
)
def test_a_fault_beside_ties_is_found(factors: Mapping[str, Any]) -> None:
    """Each is far smaller than what another expert changes."""
    verdict = judged(**factors).verdict
    assert verdict.outcome is Outcome.DIFFERENT, str(verdict)


def test_of_equal_scores_any_choice_is_right_in_any_number_of_rows() -> None:
    """As at padding whose embedding is 0."""
    verdict = judged(rows=MANY_ROWS, router=0, choose=ChooseLast, scores=(1.0,) * 4).verdict
    assert verdict.same, str(verdict)
    assert any("in 0 of 1,808 rows, and in 1,808 rows whose scores are all equal" in note for note in verdict.notes)


@pytest.mark.parametrize(("router", "gap"), [(1, 0), (1, ROUNDING / 2)])
def test_more_rows_than_rounding_turns_are_not_taken(router: float, gap: float) -> None:
    """PyTorch turns few: a candidate that takes the other one of two at every tie is not off by rounding."""
    assert not judged(rows=MANY_ROWS, router=router, gap=gap).verdict.same


def test_choices_of_a_large_module_with_rounded_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_parameter, "MOST_WIDENED_WEIGHTS", 0)

    def in_bf16(module: Mixture) -> Runner:
        module.dense.weight.data = module.dense.weight.bfloat16().float()
        return ModuleRunner(module, stored_dtypes={"dense.weight": "bfloat16"})

    verdict = judged(in_bf16).verdict
    assert verdict.same, str(verdict)
    assert any("took the candidate's choice" in note for note in verdict.notes)


def test_choices_are_taken_where_a_single_pair_is_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair is a control that runs after the first verdict."""
    calls: list[object] = []
    monkeypatch.setattr(PreparedPyTorch, "control_pairs", lambda *_: Findings(doubts=("a pair has no effect",)))
    monkeypatch.setattr(PreparedPyTorch, "run_alike", lambda _, *given: calls.append(given))
    assert judged(scores=(1.0,) * 4).verdict.outcome is Outcome.UNDECIDED
    assert len(calls) == 1


def test_pytorch_is_not_run_again_where_choices_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class OutputsAlone:
        """As a server."""

        axes: ClassVar[Mapping[str, tuple[int | None, ...]]] = {}
        names_known = True

        def __init__(self, module: Mixture) -> None:
            self.run = ModuleRunner(module).run

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(prepared_pytorch, "shared_choices", never)
    assert not judged(OutputsAlone).verdict.same
