"""What the top-k operators of a module choose, such as routers of experts: recorded, or taken over from another run.

A choice is a jump: where two scores are nearer than rounding moves them, either is right, and the outputs of the two
differ by far more than rounding. So a reference takes the candidate's choice there (`NearTies`). How far rounding moves
scores is measured by those of PyTorch as deployed, with the choices of the reference before (`margins_of`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

TOP_K = frozenset({torch.topk, torch.Tensor.topk})
RANKS_TOGETHER = 3  # ranks whose errors are taken together: of one rank in few rows, an error may be small by chance


class Call(NamedTuple):
    """One call of a top-k operator in a forward pass."""

    owner: str  # path of the module that calls it
    number: int  # of the call in one forward pass of this module, from 0
    shape: tuple[int, ...]  # of the scores, the axis of the choice last


class Choice(NamedTuple):
    """What a call chose. The greatest scores are the best, whatever the operator looked for."""

    scores: torch.Tensor  # [..., n]
    indices: torch.Tensor  # [..., k]
    is_ordered: bool = True  # whether the best is the first; else their order means nothing

    @property
    def best(self) -> torch.Tensor:
        """The scores that were chosen, [..., k]."""
        return self.scores.gather(-1, self.indices)

    def differs_from(self, indices: torch.Tensor) -> torch.Tensor:
        """Whether other places were chosen than these, in any order; bool [...]."""
        return (self.indices.sort(-1).values != indices.sort(-1).values).any(-1)

    @property
    def is_forced(self) -> torch.Tensor:
        """Whether others were chosen than top-k would; bool [...]."""
        return self.differs_from(self.scores.topk(self.indices.shape[-1]).indices)

    @property
    def is_free(self) -> torch.Tensor:
        """Whether all scores are equal, so that any choice is as good; bool [...]."""
        return self.scores.amax(-1) == self.scores.amin(-1)


Choose = Callable[[Call, Choice], torch.Tensor]  # the indices that the call returns
Choices = Mapping[Call, Choice]
ChosenIndices = Mapping[Call, torch.Tensor]
Margins = Mapping[tuple[str, int], torch.Tensor]  # owner and number of a call -> [k], for each rank


@contextlib.contextmanager
def choosing(module: nn.Module, choose: Choose, owners: Collection[str] | None = None) -> Iterator[None]:
    """Ask `choose` at each call of top-k on floats in these modules, all where it is None.

    So do copies that are made meanwhile, and other threads. The operators of a compiled function are not seen.
    """
    with contextlib.ExitStack() as hooks:
        for name, part in module.named_modules():
            if owners is None or name in owners:
                enter, leave = _hooks(name, choose)
                hooks.callback(part.register_forward_pre_hook(enter).remove)
                hooks.callback(part.register_forward_hook(leave, always_call=True).remove)
        yield


def _hooks(owner: str, choose: Choose) -> tuple[Callable[..., None], Callable[..., None]]:
    """What is called before and after the forward pass of a module. A copy of the module has them, too."""
    active = threading.local()

    def enter(*_: object) -> None:
        mode = _Choosing(owner, choose)
        active.modes = [*getattr(active, "modes", ()), mode]
        mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(*_: object) -> None:
        active.modes.pop().__exit__(None, None, None)

    return enter, leave


class _Choosing(TorchFunctionMode):
    """While it is active, `choose` decides what top-k returns."""

    def __init__(self, owner: str, choose: Choose):
        super().__init__()
        self._owner, self._choose, self._calls = owner, choose, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "out" or value is not None}
        if func not in TOP_K or "out" in kwargs:
            return func(*args, **kwargs)
        return self._top_k(*args, **kwargs)

    def _top_k(self, input: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        # As an operator of ATen, which the modes of the modules around this one let pass.
        result = torch.ops.aten.topk.default(input, k, dim, largest, sorted)
        if not input.is_floating_point():
            return torch.return_types.topk(result)
        scores = input.movedim(dim, -1)
        own = Choice(scores if largest else -scores, result[1].movedim(dim, -1), sorted)
        call = Call(self._owner, self._calls, tuple(scores.shape))
        self._calls += 1
        indices = self._choose(call, own)
        if indices is own.indices:
            return torch.return_types.topk(result)
        indices = indices.movedim(-1, dim)
        return torch.return_types.topk((input.gather(dim, indices), indices))


@dataclass(frozen=True, eq=False)
class Recorder:
    """A `Choose` that keeps what every call returns: what `choose` returns, or its own choice."""

    choose: Choose | None = None
    found: dict[Call, Choice] = field(default_factory=dict)
    repeated: set[Call] = field(default_factory=set)  # made more than once: no choice of another run belongs to one

    def __call__(self, call: Call, own: Choice) -> torch.Tensor:
        indices = own.indices if self.choose is None else self.choose(call, own)
        if call in self.found:
            self.repeated.add(call)
        self.found[call] = Choice(own.scores.detach().cpu(), indices.detach().cpu(), own.is_ordered)
        return indices


@dataclass(frozen=True, eq=False)
class Forced:
    """A `Choose` of these indices; of its own where a call has none."""

    indices: ChosenIndices

    def __call__(self, call: Call, own: Choice) -> torch.Tensor:
        return self.indices[call].to(own.indices) if call in self.indices else own.indices


@dataclass(frozen=True, eq=False)
class NearTies:
    """A `Choose` of the wanted indices where scores tie within the margins; of its own elsewhere.

    At each rank, the wanted score may be so far from its own: another order of the same is another choice.
    """

    wanted: ChosenIndices
    margins: Margins

    def __call__(self, call: Call, own: Choice) -> torch.Tensor:
        if call not in self.wanted:
            return own.indices
        wanted = Choice(own.scores, self.wanted[call].to(own.indices))
        best, best_wanted = (
            each.best if own.is_ordered else each.best.sort(-1, descending=True).values for each in (own, wanted)
        )
        distance = (best_wanted - best).abs()
        margin = self.margins[call.owner, call.number][: distance.shape[-1]]
        is_tie = (distance <= margin.to(distance)).all(-1, keepdim=True)
        return torch.where(is_tie, wanted.indices, own.indices)


def margins_of(runs: Iterable[tuple[Choices, Choices]]) -> Margins:
    """How far apart two scores may be that a right computation may take for each other, [k] in fp64 for each call.

    k is the largest of all cases: DeepSeek-V3.2 chooses all tokens of a short text.

    `runs` are, for each case, those of the reference and those of PyTorch with the same choices. Both scores may be off
    by the largest error at this rank and the next ones, in any row of any case.
    """
    margins: dict[tuple[str, int], torch.Tensor] = {}
    for reference, deployed in runs:
        for call, choice in reference.items():
            errors = _errors_by_rank(choice, deployed[call].scores)
            around = nn.functional.max_pool1d(errors[None], RANKS_TOGETHER, 1, RANKS_TOGETHER // 2)[0]
            margin, at = 2 * around[: choice.indices.shape[-1]], (call.owner, call.number)
            short, long = sorted((margins.get(at, margin), margin), key=len)
            margins[at] = torch.cat((torch.maximum(short, long[: len(short)]), long[len(short) :]))
    return margins


def _errors_by_rank(choice: Choice, peer: torch.Tensor) -> torch.Tensor:
    """The largest error of the peer's scores in any row, for each score that was chosen and the best that was not."""
    truth = choice.scores.double()
    ranks = truth.argsort(-1, descending=True)[..., : choice.indices.shape[-1] + 1]
    best = truth.gather(-1, ranks)
    errors = (peer.double().gather(-1, ranks) - best).abs()
    errors = torch.maximum(errors, torch.finfo(peer.dtype).eps * best.abs())
    return torch.where(errors.isfinite(), errors, 0.0).reshape(-1, ranks.shape[-1]).amax(0)


def apart(calls: Mapping[str, Iterable[Call]]) -> list[list[str]]:
    """The cases in groups, those together of which no two make the same call: it tells whose it is."""
    groups: list[dict[str, set[Call]]] = []  # the calls by case
    for case, own in calls.items():
        mine = set(own)
        group = next((group for group in groups if all(map(mine.isdisjoint, group.values()))), None)
        if group is None:
            groups.append(group := {})
        group[case] = mine
    return [list(group) for group in groups]
