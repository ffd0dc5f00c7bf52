"""The references with the choices of the candidate, where scores of a top-k operator tie.

A right candidate in half precision sends some tokens to other experts than the references do, wherever two scores are
nearer than its rounding. PyTorch does so, too, at other tokens: then its error is not one of rounding. With the
same choices everywhere an error is one of rounding again, and a small fault shows beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lora_export.errors import count
from lora_export.runtime.runner import Arrays
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification.candidate_outputs import OnProofStep, OutputsByCase, kept
from lora_export.verification.module_copies import widened
from lora_export.verification.references.attached_module import AttachedModule
from lora_export.verification.references.candidate_choices import ChoiceReader
from lora_export.verification.references.top_k import (
    Call,
    Choice,
    Choices,
    ChosenIndices,
    Forced,
    Margins,
    NearTies,
    Recorder,
    apart,
    choosing,
    margins_of,
)

MOST_TAKEN, FEW_TAKEN = 3, 10  # rows: so many times PyTorch's own, and so many more where these are few by chance


@dataclass(frozen=True, eq=False)
class SharedChoices:
    """The candidate's choices, which references take where their own scores tie, and what the reference so chose."""

    wanted: Mapping[str, ChosenIndices]  # the candidate's, by case
    margins: Margins
    chosen: Mapping[str, Choices]  # by the reference
    peer_rows: int  # in which PyTorch would choose otherwise than the reference

    @property
    def taken_rows(self) -> int:
        """In which the reference took the candidate's choice in place of a better one."""
        return sum(int((choice.is_forced & ~choice.is_free).sum()) for choice in self._choices)

    @property
    def free_rows(self) -> int:
        """In which it took one of equal scores: at padding whose embedding is 0, all experts have the same."""
        return sum(int((choice.is_forced & choice.is_free).sum()) for choice in self._choices)

    @property
    def _choices(self) -> list[Choice]:
        return [choice for own in self.chosen.values() for choice in own.values()]

    @property
    def is_by_rounding(self) -> bool:
        """Whether the reference took hardly more rows than PyTorch would choose otherwise."""
        return self.taken_rows <= MOST_TAKEN * self.peer_rows + FEW_TAKEN

    @property
    def note(self) -> str:
        """What a verdict reports of them."""
        rows = sum(choice.is_forced.numel() for choice in self._choices)
        free = f", and in {count(self.free_rows, 'row')} whose scores are all equal" if self.free_rows else ""
        return (
            f"where scores of top-k operators tie within PyTorch's own error, the references took the candidate's "
            f"choice: in {self.taken_rows:,} of {count(rows, 'row')}{free}. PyTorch, which would choose otherwise in "
            f"{self.peer_rows:,}, was measured with the same choices"
        )

    def at_ties(self, module: nn.Module, *cases: str) -> contextlib.AbstractContextManager[None]:
        """Runs of a reference on these cases take the candidate's choices where their own scores tie."""
        return choosing(module, NearTies(_joined(self.wanted, cases), self.margins), _owners(self.margins))

    def everywhere(self, module: nn.Module, case: str) -> contextlib.AbstractContextManager[None]:
        """Runs of PyTorch on this case choose what the reference chose."""
        return choosing(module, Forced(_indices(self.chosen[case])), _owners(self.margins))

    def run_deployed(self, deployed: ModuleRunner, cases: Mapping[str, Arrays]) -> OutputsByCase:
        """The outputs of PyTorch as deployed, by case."""
        found = {}
        for name, arrays in cases.items():
            with self.everywhere(deployed.module, name):
                found[name] = kept(deployed.run(arrays))
        return found

    def run_references(
        self, attached: AttachedModule, groups: Sequence[Sequence[str]], cases: Mapping[str, Arrays]
    ) -> dict[str, dict[str, Arrays]]:
        """The outputs of references, by role and case."""
        found: dict[str, dict[str, Arrays]] = {}
        for names in apart(self.wanted):
            with widened(attached.module), self.at_ties(attached.module, *names):
                for roles in groups:
                    for role, own in attached.run(roles, {name: cases[name] for name in names}).items():
                        found.setdefault(role, {}).update(own.by_case)
        return found


def shared_choices(
    attached: AttachedModule,
    deployed: ModuleRunner,
    reader: ChoiceReader,
    cases: Mapping[str, Arrays],
    outputs: OutputsByCase,
    step: OnProofStep,
) -> SharedChoices | None:
    """The choices of candidate and reference, and how near scores must be to tie.

    `reader` reads those of the candidate, which computed `outputs`. None where the model has no top-k, all choose the
    same, the candidate's choices cannot be read, and where it would have its own in many more rows than PyTorch:
    rounding is not what chooses there.
    """
    peer = _of_peer(deployed, cases)
    if not peer:
        return None
    step("what top-k operators choose")
    read = reader(cases, outputs)
    wanted = {name: _by_call(own, read[name]) for name, own in peer.items()} if read else {}
    if not wanted or not all(wanted.values()):
        return None
    own = _of_reference(attached, cases, wanted)
    others = [*wanted.items(), *((name, _indices(found)) for name, found in peer.items())]
    differ = (own[case][call].differs_from(indices) for case, found in others for call, indices in found.items())
    if not any(bool(each.any()) for each in differ):
        return None
    peer = _of_peer(deployed, cases, {name: _indices(found) for name, found in own.items()})
    margins = margins_of((own[name], peer[name]) for name in cases)
    chosen = _of_reference(attached, cases, wanted, margins)
    shared = SharedChoices(wanted, margins, chosen, _forced_rows(peer))
    return shared if shared.is_by_rounding else None


def _forced_rows(choices: Mapping[str, Choices]) -> int:
    """The rows in which others were chosen than those of the best scores."""
    return sum(int(choice.is_forced.sum()) for own in choices.values() for choice in own.values())


def _of_peer(
    deployed: ModuleRunner, cases: Mapping[str, Arrays], forced: Mapping[str, ChosenIndices] | None = None
) -> dict[str, Choices]:
    """What PyTorch chooses in each case; nothing where it has no choice in one, or a call comes twice."""
    found: dict[str, Choices] = {}
    for name, arrays in cases.items():
        recorder = Recorder(Forced(forced[name]) if forced else None)
        with choosing(deployed.module, recorder):
            deployed.run(arrays)
        if not recorder.found or recorder.repeated:
            return {}
        found[name] = recorder.found
    return found


def _of_reference(
    attached: AttachedModule,
    cases: Mapping[str, Arrays],
    wanted: Mapping[str, ChosenIndices],
    margins: Margins | None = None,
) -> dict[str, Choices]:
    """What the reference chooses in each case: its own, or the wanted within the margins."""
    found: dict[str, Choices] = {}
    for names in apart(wanted):
        recorder = Recorder(None if margins is None else NearTies(_joined(wanted, names), margins))
        with widened(attached.module), choosing(attached.module, recorder):
            attached.run(["reference"], {name: cases[name] for name in names})
        found |= {name: {call: recorder.found[call] for call in wanted[name]} for name in names}
    return found


def _by_call(calls: Choices, chosen: Sequence[torch.Tensor]) -> dict[Call, torch.Tensor]:
    """The candidate's indices for PyTorch's calls, which are in the same order; nothing where they do not fit."""
    fit = len(calls) == len(chosen) and all(
        own.indices.shape[-1] == indices.shape[-1]
        and own.indices.numel() == indices.numel()
        and bool((indices < call.shape[-1]).all())
        for (call, own), indices in zip(calls.items(), chosen, strict=True)
    )
    if not fit:
        return {}
    return {call: indices.reshape(calls[call].indices.shape) for call, indices in zip(calls, chosen, strict=True)}


def _indices(choices: Choices) -> dict[Call, torch.Tensor]:
    return {call: choice.indices for call, choice in choices.items()}


def _joined(wanted: Mapping[str, ChosenIndices], cases: Collection[str]) -> dict[Call, torch.Tensor]:
    """The indices of cases that no call is common to."""
    return {call: indices for name in cases for call, indices in wanted[name].items()}


def _owners(calls: Collection[tuple[str, int]]) -> set[str]:
    return {owner for owner, _ in calls}
