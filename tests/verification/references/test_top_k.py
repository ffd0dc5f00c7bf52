"""What top-k operators choose: recorded, forced, and taken over where scores tie."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn

from lora_export.verification.references.top_k import (
    Call,
    Choice,
    Forced,
    NearTies,
    Recorder,
    apart,
    choosing,
    margins_of,
)


class Router(nn.Module):
    def __init__(self, *, largest: bool = True, dim: int = -1, as_method: bool = False):
        super().__init__()
        self.how, self.as_method = {"dim": dim, "largest": largest}, as_method

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        if self.as_method:
            values, indices = scores.topk(2, **self.how)
        else:
            values, indices = torch.topk(input=scores, k=2, out=None, **self.how)
        return values + 10 * indices


class Nested(nn.Module):
    """A module that calls top-k itself, twice, around one that does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Router()

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.topk(2).values + self.inner(scores) + scores.topk(1).indices


SCORES = torch.tensor([[0.1, 0.4, 0.3, 0.2], [4.0, 1.0, 2.0, 3.0]])


def test_each_call_belongs_to_the_innermost_module() -> None:
    recorder = Recorder()
    with choosing(module := Nested(), recorder):
        module(SCORES)
    shape = tuple(SCORES.shape)
    assert list(recorder.found) == [Call("", 0, shape), Call("inner", 0, shape), Call("", 1, shape)]
    assert not recorder.repeated
    with choosing(module, recorder):
        module(SCORES)
    assert recorder.repeated == recorder.found.keys()
    module(SCORES)  # the hooks are gone
    assert not module.inner._forward_hooks
    assert not module.inner._forward_pre_hooks


@pytest.mark.parametrize("as_method", [False, True])
@pytest.mark.parametrize(("largest", "dim"), [(True, -1), (False, -1), (True, 0), (False, 0)])
def test_forced_choices_have_their_own_values(largest: bool, dim: int, as_method: bool) -> None:
    module = Router(largest=largest, dim=dim, as_method=as_method)
    recorder = Recorder()
    scores = SCORES if dim else SCORES.T.contiguous()
    with choosing(module, recorder):
        assert torch.equal(module(scores), module(scores))
    ((call, own),) = recorder.found.items()
    assert torch.equal(own.best, SCORES.topk(2, largest=largest).values * (1 if largest else -1))
    wanted = torch.tensor([[3, 1], [0, 2]])
    with choosing(module, Forced({call: wanted}), {""}):
        forced = module(scores)
    expected = SCORES.gather(-1, wanted) + 10 * wanted
    assert torch.equal(forced, expected if dim else expected.T)


def test_integers_are_chosen_as_ever() -> None:
    recorder, module = Recorder(lambda call, own: own.indices.flip(-1)), Router()
    with choosing(module, recorder):
        assert torch.equal(module(SCORES.long()), Router()(SCORES.long()))
    assert not recorder.found


def test_copies_and_other_threads_choose_alike() -> None:
    module, found = Router(), []
    shape = tuple(SCORES.shape)
    with choosing(module, Forced({Call("", 0, shape): torch.zeros(2, 2, dtype=torch.long)})):
        made = copy.deepcopy(module)
        thread = threading.Thread(target=lambda: found.append(made(SCORES)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], SCORES[:, :1].expand(2, 2))


def test_a_module_that_fails_leaves_no_choice_behind() -> None:
    class Fails(Router):
        def forward(self, scores: torch.Tensor) -> torch.Tensor:
            super().forward(scores)
            raise ValueError

    with choosing(module := Fails(), Forced({})), pytest.raises(ValueError):
        module(SCORES)
    assert torch.equal(torch.topk(SCORES, 2).indices[1], torch.tensor([0, 3]))
    assert torch.overrides._get_current_function_mode_stack() == []


def near_ties(wanted: list[list[int]], margins: list[float], *, is_ordered: bool = True) -> torch.Tensor:
    call = Call("", 0, tuple(SCORES.shape))
    choose = NearTies({call: torch.tensor(wanted)}, {("", 0): torch.tensor(margins, dtype=torch.float64)})
    return choose(call, Choice(SCORES, SCORES.topk(2).indices, is_ordered))


@pytest.mark.parametrize(
    ("margins", "expected"),
    [([0, 0], [1, 2]), ([0, 0.09], [1, 2]), ([0, 0.11], [1, 3]), ([0.11, 0], [1, 2]), ([0, 0.11, 9], [1, 3])],
)
def test_a_wanted_score_is_taken_within_the_margin_of_its_rank(margins: list[float], expected: list[int]) -> None:
    """0.2 in place of 0.3; the second row wants what no margin allows."""
    chosen = near_ties([[1, 3], [1, 2]], margins)
    assert chosen.tolist() == [expected, [0, 3]]
    assert Choice(SCORES, chosen).is_forced.tolist() == [expected == [1, 3], False]


def test_a_choice_is_free_where_all_scores_are_equal() -> None:
    choice = Choice(torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.5]]), torch.tensor([[1], [1]]))
    assert choice.is_free.tolist() == [True, False]


def test_another_order_is_taken_where_it_ties_or_means_nothing() -> None:
    swapped = [[2, 1], [3, 0]]
    assert near_ties(swapped, [0.09, 0.09]).tolist() == [[1, 2], [0, 3]]
    assert near_ties(swapped, [0.11, 0.11]).tolist() == [[2, 1], [0, 3]]
    assert near_ties(swapped, [0.0, 0.0], is_ordered=False).tolist() == swapped


def test_masked_scores_tie_with_nothing() -> None:
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf]])
    call, own = Call("", 0, (1, 3)), Choice(scores, torch.tensor([[1, 0]]))
    choose = NearTies({call: torch.tensor([[1, 2]])}, {("", 0): torch.tensor([1.0, 1.0])})
    assert choose(call, own).tolist() == [[1, 0]]


def test_margins_are_those_of_the_largest_error_near_the_rank() -> None:
    """Beside NumPy: twice the largest error of the rank and its neighbours, over rows and cases."""
    rng = np.random.default_rng(0)
    truths, peers = rng.standard_normal((2, 5, 6)), []
    for truth in truths:
        peers.append((truth + 1e-3 * rng.standard_normal((5, 6))).astype(np.float32))
    runs = []
    for number, (truth, peer) in enumerate(zip(truths, peers, strict=True)):
        call = Call("r", 0, (5, 6)), torch.from_numpy(np.argsort(-truth)[:, :3].copy())
        runs.append(
            ({call[0]: Choice(torch.from_numpy(truth), call[1])}, {call[0]: Choice(torch.from_numpy(peer), call[1])})
        )
        assert number < 2
    errors = np.zeros(4)
    for truth, peer in zip(truths, peers, strict=True):
        order = np.argsort(-truth)[:, :4]
        error = np.abs(np.take_along_axis(peer.astype(float), order, 1) - np.take_along_axis(truth, order, 1))
        errors = np.maximum(errors, error.max(0))
    near = [max(errors[max(0, rank - 1) : rank + 2]) for rank in range(3)]
    np.testing.assert_allclose(margins_of(runs)["r", 0].numpy(), 2 * np.array(near), rtol=1e-12)


def test_exact_scores_tie_within_the_rounding_of_their_dtype() -> None:
    call, truth = Call("r", 0, (1, 3)), torch.tensor([[4.0, 2.0, 1.0]], dtype=torch.float64)
    choice = Choice(truth, torch.tensor([[0]]))
    (margin,) = margins_of([({call: choice}, {call: Choice(truth.half(), choice.indices)})]).values()
    assert margin.tolist() == [2 * 4 * torch.finfo(torch.float16).eps]


def test_margins_reach_the_most_that_any_case_chooses() -> None:
    """DeepSeek-V3.2 chooses all tokens of a short text."""
    truth = torch.tensor([[4.0, 2.0, 1.0]], dtype=torch.float64)
    runs = []
    for size, error in ((2, 0.5), (3, 0.25)):
        call, indices = Call("r", 0, (1, size)), torch.arange(size)[None]
        runs.append(({call: Choice(truth[:, :size], indices)}, {call: Choice(truth[:, :size] + error, indices)}))
    for order in (runs, runs[::-1]):
        assert margins_of(order)["r", 0].tolist() == [1.0, 1.0, 0.5]


def test_cases_of_the_same_calls_are_apart() -> None:
    one, two, three = (Call("r", 0, (size, 4)) for size in (1, 2, 3))
    assert apart({"a": [one], "b": [two], "c": [one], "d": [three]}) == [["a", "b", "d"], ["c"]]
