"""Verdicts that rest on other proofs: a graph against the one it was made from, and batches that mix adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, RuntimeRefused, Undecided
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.verification import parity
from lora_export.verification.compare_outputs import bits_that_differ, error_of, from_first_token, named_as
from lora_export.verification.proof import Proof

AGAINST = "the base graph"  # what a record says of a verdict without a PyTorch model

UNCHANGED = "its answers are those of the graph that it was made from, to the last bit"

NODE_BY_NODE = (
    "its answers are those of the graph that it was made from, to the last bit, where onnxruntime runs both node by "
    "node; optimised, it fuses other nodes of them"
)

NOT_BY_FP64 = "whether that graph is the model's was not decided: its answers are too coarse for a verdict in fp64"

NEAR = 0.1  # of PyTorch's error that two graphs may be apart which differ in what onnxruntime fuses alone


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
        answers = ask(candidate.unoptimised())
        before = _asked(OnnxRunner(origin, candidate.provider, optimise=False), ask, answers)
        if bits_that_differ(answers, before):
            return proof
    cases = []
    for case in proof.cases:
        own, was = (named_as(case.reference, there[case.name]) for there in (answers, before))
        cases.append(replace(case, candidate=own, reference=was, deployed=was, peer=AGAINST))
    notes = [told, NOT_BY_FP64, *proof.verdict.notes]
    verdict = parity.judge(cases, dtype=proof.verdict.dtype, sensitivity=proof.verdict.sensitivity, notes=notes)
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
    own, was = (named_as(case.reference, there[case.name]) for there in (answers, before))
    return all(
        parity.rms(own[name].astype(np.float64) - was[name]) <= NEAR * error_of(truth, case.deployed[name])
        for name, truth in case.reference.items()
        if own[name].dtype.kind == "f"
    )


def prove_mixed(candidate: Runner, proofs: Sequence[Proof], ids: Sequence[int]) -> Proof:
    """Judge a candidate whose batches mix adapters, as `ids` over and over along the batch, against what was proven.

    `proofs` are, by id, those of whole batches with one adapter, on the same inputs, the base's first. Each row
    has to be what it was there. Raises Undecided where no output has a row for each row of the batch.
    """
    cases = []
    for number, (name, arrays) in enumerate(proofs[0].inputs.items()):
        alone = [proof.cases[number] for proof in proofs]
        batch = len(next(iter(arrays.values())))
        outputs = [key for key, value in alone[0].reference.items() if value.ndim and len(value) == batch]
        if not outputs:
            raise Undecided(f"no output has a row for each row of the batch ({name}): a mixed batch cannot be judged")
        answer = named_as(alone[0].reference, candidate.run(arrays))
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
        reference=rows([case.reference for case in alone]),
        deployed=rows([case.deployed for case in alone]),
        candidate=answer,
        base=rows([alone[0].reference for _ in alone]),
        scaled=rows([case.scaled or case.reference for case in alone]),
        peer=alone[-1].peer,
    )
