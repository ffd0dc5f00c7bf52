"""What the candidate answers, and answers again: to the cases, to inputs drawn anew, and as its provider ships."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from lora_export.errors import LoraExportError, RuntimeRefused
from lora_export.models.model import Model
from lora_export.runtime.runner import Arrays, Placement, Runner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification import parity
from lora_export.verification.compare_outputs import bits, differ, distances, from_first_token
from lora_export.verification.inputs import REDRAWS
from lora_export.verification.inputs.model_inputs import draw

Note = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Asked:
    """What the candidate answered, before anybody else is asked."""

    answers: Mapping[str, Arrays]  # by case
    refusals: Sequence[str]
    varied: Sequence[_Varied] = ()  # nothing of these where a case was refused
    again: Arrays | None = None  # the first case once more, after all others


class _Varied(NamedTuple):
    """One input drawn anew, the others held."""

    input: str
    before: Arrays
    after: Arrays
    changed: bool  # the candidate's answer


def ask(candidate: Runner, model: Model, inputs: Mapping[str, Arrays], seed: int, step: Note) -> Asked:
    answers, refusals = {}, []
    for name, arrays in inputs.items():
        step(f"case {name}")
        try:
            answers[name] = candidate.run(arrays)
        except RuntimeRefused as refusal:
            refusals.append(f"the candidate refused case {name}: {refusal}")
    if refusals:
        return Asked(answers, refusals)
    step("inputs, one by one")
    varied = list(_varied(model, candidate, inputs, seed))
    return Asked(answers, (), varied, candidate.run(next(iter(inputs.values()))))


def _varied(model: Model, candidate: Runner, inputs: Mapping[str, Arrays], seed: int) -> Iterator[_Varied]:
    """For each input: does another draw of it, the others held, change the candidate's answer?"""
    before = list(inputs.values())[min(2, len(inputs) - 1)]
    sizes = {symbol: before[name].shape[axis] for name, axes in model.axes.items() for axis, symbol in axes.items()}
    draws = [draw(model, candidate, sizes, seed + 1000 + number) for number in range(REDRAWS)]
    answered = candidate.run(before)
    for name in model.input_names:
        fresh = next((draw[name] for draw in draws if not np.array_equal(draw[name], before[name])), None)
        if fresh is None:
            continue  # `never_varied` tells of it
        after = {**before, name: fresh}
        yield _Varied(name, before, after, differ(answered, candidate.run(after)))


def sensitivity_of(asked: Asked, deployed: ModuleRunner) -> Iterator[parity.Sensitivity]:
    """The same of PyTorch's answer."""
    if not asked.varied:
        return
    expected = deployed.run(asked.varied[0].before)
    for there in asked.varied:
        yield parity.Sensitivity(there.input, differ(expected, deployed.run(there.after)), there.changed)


def never_varied(model: Model, tried: Sequence[parity.Sensitivity], refusals: Sequence[str]) -> list[str]:
    """Inputs that are the same in every draw, such as a mask of ones in a factory's example."""
    constant = [] if refusals else [name for name in model.input_names if name not in {there.input for there in tried}]
    return [
        f"the input {name} is the same in every draw: whether it matters was not tried. --inputs can"
        for name in constant
    ]


def aligned(answer: Arrays, reference: Arrays, candidate: Runner, deployed: ModuleRunner) -> Arrays:
    """The candidate's outputs under the reference's names: by order where either side's names mean nothing."""
    if (candidate.names_known and deployed.names_known) or len(answer) != len(reference):
        return answer
    return dict(zip(reference, answer.values(), strict=True))


def asked_again(answer: Arrays, case: parity.Case, arrays: Arrays) -> Iterator[parity.Case]:
    """The first case once more, with what came after all others, where that is not the same bit for bit.

    Dropout, an adapter that was let go, or a cache that outlives a call show themselves here.
    """
    if answer.keys() != case.candidate.keys() and len(answer) == len(case.candidate):
        answer = dict(zip(case.candidate, answer.values(), strict=True))  # names that mean nothing
    if answer.keys() != case.candidate.keys() or any(bits(case.candidate[key]) != bits(answer[key]) for key in answer):
        yield from_first_token(replace(case, name=f"{case.name}, asked again", candidate=answer), arrays)


def as_shipped(
    candidate: Runner, deployed: ModuleRunner, cases: Sequence[parity.Case], inputs: Mapping[str, Arrays]
) -> list[str]:
    """How far off the candidate is where its provider has its own settings; nothing where a proof leaves it those."""
    placement: Placement | None = getattr(candidate, "placement", None)
    if placement is None or not placement.options:
        return []
    settings = ", ".join(f"{name}={value}" for name, value in placement.options.items())
    told = f"not judged: with {placement.requested_provider}'s own settings, in place of {settings}, "
    try:
        shipped: Runner = candidate.with_provider_defaults()  # type: ignore[attr-defined]
        answers = [aligned(shipped.run(inputs[case.name]), dict(case.reference), shipped, deployed) for case in cases]
    except LoraExportError as error:
        return [f"{told}it did not run: {str(error).splitlines()[0]}"]
    itself = [
        from_first_token(replace(case, candidate=answer), inputs[case.name])
        for case, answer in zip(cases, answers, strict=True)
    ]
    judged, found = distances(cases), []
    for output, (off, share) in distances(itself).items():
        of_effect = "" if share is None else f", {parity.percent(share)} of what the adapter does"
        found.append(f"{output} is off by {off:.3g} (as judged by {judged[output][0]:.3g}){of_effect}")
    return [told + "; ".join(found)]
