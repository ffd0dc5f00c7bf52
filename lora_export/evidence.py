"""A verdict with what led to it, and what can be judged by proofs and graphs that were there before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export import parity
from lora_export.diagnosis import Diagnosis
from lora_export.errors import InputRefused, RuntimeRefused, Undecided
from lora_export.onnx_runner import Arrays, OnnxRunner, Placement, Runner

AGAINST = "the base graph"  # what a record says of a verdict without a PyTorch model
UNCHANGED = "its answers are those of the graph that it was made from, to the last bit"
NODE_BY_NODE = (
    "its answers are those of the graph that it was made from, to the last bit, where onnxruntime runs both node by "
    "node; optimised, it fuses other nodes of them"
)
NOT_BY_FP64 = "whether that graph is the model's was not decided: its answers are too coarse for a verdict in fp64"
NEAR = 0.1  # of PyTorch's error that two graphs may be apart which differ in what onnxruntime fuses alone
PRECISION = {"error", "tail", "bulk", "features"}  # gates that put a candidate's error beside its peer's


@dataclass(frozen=True, eq=False)
class Proof:
    """A verdict with what it takes to trust and to repeat it."""

    verdict: parity.Verdict
    placement: Placement | None  # None where PyTorch itself ran the candidate
    about: Mapping[str, Any]  # versions, seed, adapters, and the inputs' shapes
    inputs: Mapping[str, Arrays] = field(default_factory=dict, repr=False)  # case -> what everybody was given
    cases: tuple[parity.Case, ...] = field(default=(), repr=False)  # and what they made of it
    ended_with: int | None = None  # the exit code of what ended it before anything was measured
    diagnosis: Diagnosis | None = None  # where the candidate goes wrong, and why; or that it nowhere does

    @property
    def exit_code(self) -> int:
        return self.verdict.exit_code if self.ended_with is None else self.ended_with


def prove_by_origin(
    proof: Proof, candidate: OnnxRunner, origin: Path, ask: Callable[[OnnxRunner], Mapping[str, Arrays]]
) -> Proof:
    """Judge a graph that takes adapters, without one, by the graph that it was made from; `proof` where it is another.

    `proof` is the one that could not be decided: a base that rounds what it multiplies, to int8 or to half
    precision, can lie too far from its model in fp64, and then its own answers are all that it has to give. They
    have to be its bits; where onnxruntime fuses other nodes of the two, those of both node by node, and as they run
    they may be apart by a tenth of how far PyTorch itself lies from fp64. `ask` gives a graph the inputs of the
    proof and returns its answers by case. Raises InputRefused for an origin that takes or returns something else.
    """
    answers = ask(candidate)
    if not candidate.takes_adapters or bits_that_differ(answers, ask(candidate)):
        return proof
    before = _asked(OnnxRunner(origin, candidate.provider), ask, answers)
    told = UNCHANGED
    if apart := bits_that_differ(answers, before):
        if not all(_is_near(case, answers, before) for case in proof.cases):
            return proof
        told = f"{NODE_BY_NODE} ({apart[0]})"
        answers = ask(candidate.node_by_node())
        before = _asked(OnnxRunner(origin, candidate.provider, plain=True), ask, answers)
        if bits_that_differ(answers, before):
            return proof
    cases = []
    for case in proof.cases:
        own, was = (_named_as(case.referee, there[case.name]) for there in (answers, before))
        cases.append(replace(case, candidate=own, referee=was, deployed=was, peer=AGAINST))
    notes = [told, NOT_BY_FP64, *proof.verdict.notes]
    verdict = parity.judge(cases, dtype=proof.verdict.dtype, perturbed=proof.verdict.perturbed, notes=notes)
    return replace(proof, verdict=verdict, about={**proof.about, "against": AGAINST}, cases=tuple(cases))


def _asked(
    origin: OnnxRunner, ask: Callable[[OnnxRunner], Mapping[str, Arrays]], like: Mapping[str, Arrays]
) -> Mapping[str, Arrays]:
    refused = f"{origin.path} is not what the candidate was made from:"
    try:
        answers = ask(origin)
    except RuntimeRefused as error:
        raise InputRefused(f"{refused} {error}") from error
    if any(answers[case].keys() != outputs.keys() for case, outputs in like.items()):
        raise InputRefused(f"{refused} it has other outputs")
    return answers


def _is_near(case: parity.Case, answers: Mapping[str, Arrays], before: Mapping[str, Arrays]) -> bool:
    """Whether two graphs' answers lie together, beside what rounding costs PyTorch there."""
    own, was = (_named_as(case.referee, there[case.name]) for there in (answers, before))
    return all(
        parity.rms(own[name].astype(np.float64) - was[name]) <= NEAR * _error(truth, case.deployed[name])
        for name, truth in case.referee.items()
        if own[name].dtype.kind == "f"
    )


def _named_as(reference: parity.Arrays, answer: Arrays) -> Arrays:
    """The outputs that the reference has, by its names; in their order where a graph's own names mean nothing."""
    if reference.keys() <= answer.keys():
        return {name: answer[name] for name in reference}
    return dict(zip(reference, answer.values(), strict=True))


def prove_mixed(candidate: Runner, proofs: Sequence[Proof], ids: Sequence[int]) -> Proof:
    """Judge a candidate whose batches mix adapters, as `ids` over and over along the batch, against what was proven.

    `proofs` are, by id, those of whole batches with one adapter, on the same inputs, the base's first. Each row
    has to be what it was there. Raises Undecided where no output has a row for each row of the batch.
    """
    cases = []
    for number, (name, arrays) in enumerate(proofs[0].inputs.items()):
        alone = [proof.cases[number] for proof in proofs]
        batch = len(next(iter(arrays.values())))
        outputs = [key for key, value in alone[0].referee.items() if value.ndim and len(value) == batch]
        if not outputs:
            raise Undecided(f"no output has a row for each row of the batch ({name}): a mixed batch cannot be judged")
        answer = _named_as(alone[0].referee, candidate.run(arrays))
        case = _mixed(alone, np.resize(np.array(ids), batch), {key: answer[key] for key in outputs})
        cases.append(from_first_token(case, arrays))
    verdict = parity.judge(cases, dtype=proofs[-1].verdict.dtype)
    return Proof(verdict, proofs[0].placement, proofs[-1].about, proofs[0].inputs, tuple(cases))


def _mixed(alone: Sequence[parity.Case], ids: NDArray[Any], answer: Arrays) -> parity.Case:
    """A case whose every row is, on every side, the row of the case of its adapter."""

    def rows(answers: Sequence[parity.Arrays]) -> Arrays:
        return {key: np.stack([answers[chosen][key][row] for row, chosen in enumerate(ids)]) for key in answer}

    return parity.Case(
        name=f"{alone[0].name}, adapters {', '.join(map(str, ids))}",
        inputs_summary=alone[0].inputs_summary,
        referee=rows([case.referee for case in alone]),
        deployed=rows([case.deployed for case in alone]),
        candidate=answer,
        base=rows([alone[0].referee for _ in alone]),
        louder=rows([case.louder or case.referee for case in alone]),
        peer=alone[-1].peer,
    )


def differs_in_precision_alone(verdict: parity.Verdict) -> bool:
    """Whether all that is held against a candidate is to be farther from the referee than its peer is."""
    against = {reason.gate for reason in verdict.reasons if reason.outcome is parity.Outcome.DIFFERENT}
    return bool(against) and against <= PRECISION


def by_the_farther(cases: Sequence[parity.Case], others: Sequence[parity.Case]) -> list[parity.Case]:
    """The cases with, of each output, whichever of both peers' answers lies farther from the referee.

    An adapter that is large beside its weight costs more digits once it is merged, in whoever merges it: a sum of
    large numbers that nearly cancel is what W + ΔW then has to make of x, and A x is not. A right merge may not be
    blamed for that.
    """

    def farther(case: parity.Case, other: parity.Case) -> parity.Case:
        chosen = {
            name: max((value, other.deployed.get(name, value)), key=lambda answer: _error(case.referee[name], answer))
            for name, value in case.deployed.items()
        }
        return replace(case, deployed=chosen)

    return [farther(case, other) for case, other in zip(cases, others, strict=True)]


def _error(referee: NDArray[Any], answer: NDArray[Any]) -> float:
    return parity.rms(answer.astype(np.float64) - referee)


def distances(cases: Sequence[parity.Case]) -> dict[str, tuple[float, float | None]]:
    """Output -> rmse(O,R) over all cases together, and as a share of what the adapter does; None without an adapter."""

    def apart(one: Callable[[parity.Case], parity.Arrays], output: str) -> float:
        errors = [one(case)[output].astype(np.float64) - case.referee[output] for case in cases]
        return parity.rms(np.concatenate([error.ravel() for error in errors]))

    found = {}
    for output in cases[0].referee:
        error = apart(lambda case: case.candidate, output)
        effect = None if cases[0].base is None else apart(lambda case: case.base or {}, output)
        found[output] = error, error / effect if effect else None
    return found


def before_first_token(arrays: Arrays) -> NDArray[np.bool_]:
    """Where [batch, sequence] rows are padded at their beginning. Empty where there is no mask."""
    mask = arrays.get("attention_mask", np.ones((0, 0), np.int64))
    return np.cumsum(mask, axis=1) == 0 if mask.ndim == 2 else np.zeros((0, 0), bool)


def from_first_token(case: parity.Case, arrays: Arrays) -> parity.Case:
    """The case with the referee's numbers on every side where a row's padding comes before its tokens.

    There a decoder attends to nothing, and what comes of that nobody promises: with a cache it is something else
    than without. What is not finite there stays.
    """
    nothing = before_first_token(arrays)

    def settled(answers: Arrays) -> Arrays:
        made = dict(answers)
        for name, truth in case.referee.items():
            value = answers.get(name)
            if value is not None and truth.ndim > 2 and value.shape == truth.shape and truth.shape[:2] == nothing.shape:
                there = nothing & np.isfinite(value).reshape(*nothing.shape, -1).all(-1)
                made[name] = value.copy()
                made[name][there] = truth[there].astype(value.dtype)
        return made

    sides = ("deployed", "candidate", "base", "louder", "attached")
    given: dict[str, Arrays | None] = {side: getattr(case, side) for side in sides}
    made: dict[str, Any] = {side: settled(value) for side, value in given.items() if value is not None}
    return replace(case, **made)


def bits_that_differ(answers: Mapping[str, Arrays], others: Mapping[str, Arrays]) -> list[str]:
    """Where answers, by case, are not the same bit for bit: `case, output: largest difference`."""
    return [
        f"{case}, {name}: {_largest_difference(value, others[case][name])}"
        for case, outputs in answers.items()
        for name, value in outputs.items()
        if bits(value) != bits(others[case][name])
    ]


def bits(array: NDArray[Any]) -> tuple[Any, ...]:
    """What makes two arrays the same to the last bit."""
    return array.dtype, array.shape, array.tobytes()


def _largest_difference(one: NDArray[Any], other: NDArray[Any]) -> str:
    if one.shape != other.shape:
        return f"{one.shape} and {other.shape}"
    return f"{np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0):.3g}"


def differ(one: Arrays, other: Arrays) -> bool:
    """Whether any output is another."""
    return any(not np.array_equal(value, other[name]) for name, value in one.items())
