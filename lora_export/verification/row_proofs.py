"""Proofs of a graph whose rows choose their adapters: each adapter alone, several on one row, and all in one batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lora_export.errors import InputRefused
from lora_export.options.spelling import named
from lora_export.runtime.encoder_decoder import EncoderDecoderRunner
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Runner
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import OnProofStep, no_step
from lora_export.verification.mixed_batches import mixed_cases
from lora_export.verification.proof import Proof, prove
from lora_export.verification.references import References

BASE = "the base"
MIXED = "mixed batches"
SEVERAL = "several adapters on a row"
SCALES_OF_SEVERAL = (0.75, -0.5, 0.375)  # of the adapters on one row, over and over

Prove = Callable[..., Proof]  # `prove`, perhaps with some of its options


class SeveralOnRow(NamedTuple):
    """The adapters on one row, and the factor of each."""

    ids: tuple[int, ...]
    scales: tuple[float, ...]


def several_on_row(adapters: int, per_row: int) -> SeveralOnRow:
    """Each id once, as far as the row reaches; the first ids again then."""
    numbers = range(per_row)
    ids = tuple(1 + number % adapters for number in numbers)
    return SeveralOnRow(ids, tuple(SCALES_OF_SEVERAL[number % len(SCALES_OF_SEVERAL)] for number in numbers))


def prove_several(
    candidate: OnnxRunner | EncoderDecoderRunner,
    references: References,
    *,
    prove: Prove = prove,
    step: OnProofStep = no_step,
) -> Proof:
    """Judge a graph whose rows have several adapters, by the sum of these. Errors are those of `prove`."""
    ids, scales = several_on_row(len(references.adapters), candidate.adapters_per_row)
    strengths = references.strengths or (1.0,) * len(references.adapters)
    used = sorted(set(ids))
    total = [sum(scale for each, scale in zip(ids, scales, strict=True) if each == one) for one in used]
    own = references.with_adapters(
        [references.adapters[one - 1] for one in used],
        [strengths[one - 1] * factor for one, factor in zip(used, total, strict=True)],
    )
    return prove(references.as_run(candidate.with_rows([ids], [scales])), own, step=step)


def prove_mixed(
    candidate: OnnxRunner | EncoderDecoderRunner,
    references: References,
    proofs: Sequence[Proof],
    several: Proof | None = None,
) -> Proof:
    """Judge batches whose rows have each adapter in turn, and the base.

    `proofs` are, by id, those of whole batches with one adapter, on the same inputs, the base's first. With `several`,
    that of `prove_several`, the first row has several adapters. Raises Undecided where no output has a row for each
    row of the batch.
    """
    order = [*range(1, len(proofs)), 0]
    if several is None:
        return judge_mixed(references.as_run(candidate.with_rows(order)), proofs, order)
    on_row = several_on_row(len(proofs) - 1, candidate.adapters_per_row)
    rest = candidate.adapters_per_row - 1
    ids = [on_row.ids, *([number, *[0] * rest] for number in order)]
    scales = [on_row.scales, *([1.0] * (1 + rest) for _ in order)]
    runner = references.as_run(candidate.with_rows(ids, scales))
    labels = [*map(str, range(len(proofs))), "+".join(map(str, on_row.ids))]
    return judge_mixed(runner, [*proofs, several], [len(proofs), *order], labels)


def judge_mixed(
    candidate: Runner, proofs: Sequence[Proof], order: Sequence[int], labels: Sequence[str] | None = None
) -> Proof:
    """Judge a candidate whose rows have different adapters, as `order` over and over along the batch.

    `proofs` are those of whole batches whose rows all have the same adapters, on the same inputs, the base's first.
    `order` has the place of each row's proof among them: each row has to be what it is there. `labels` name the places,
    which are the ids of the adapters without them. Raises Undecided where no output has a row for each row of the
    batch.
    """
    first, last = proofs[0], proofs[-1]
    cases = mixed_cases(candidate, first.inputs, [proof.cases for proof in proofs], order, labels)
    return Proof(parity.judge(cases, dtype=last.verdict.dtype), first.placement, last.about, first.inputs, cases)


def prove_rows(
    candidate: OnnxRunner | EncoderDecoderRunner,
    references: References,
    *,
    prove: Prove = prove,
    step: OnProofStep = no_step,
) -> Proof:
    """Judge a graph whose rows choose their adapters: the base, each adapter alone, and all of them in one batch.

    The adapters of `references` are those of the graph, in the order of their ids. `prove` may have options of its own.
    Errors are those of `prove`. Raises InputRefused, too, where the graph holds another number of adapters.
    """
    adapters, strengths = references.adapters, references.strengths
    names = candidate.adapters_by_row
    if names is not None and len(names) != len(adapters):
        raise InputRefused(
            f"{candidate.path} holds {len(names)} adapters ({', '.join(names)}) and {len(adapters)} were given: give "
            f"them in that order, or prove one by {named('adapter_id')}"
        )
    roles = [BASE, *(adapter.name for adapter in adapters)]
    alone = []
    for number, role in enumerate(roles):
        own = slice(number - 1, number) if number else slice(0)
        alone.append(
            prove(
                references.as_run(candidate.with_rows([number])),
                references.with_adapters(adapters[own], strengths[own] if strengths else None),
                step=functools.partial(_step_of, role, step),
            )
        )
    verdicts = dict(zip(roles, (proof.verdict for proof in alone), strict=True))
    several = None
    if candidate.adapters_per_row > 1:
        several = prove_several(candidate, references, prove=prove, step=functools.partial(_step_of, SEVERAL, step))
        verdicts[SEVERAL] = several.verdict
    step(MIXED)
    verdicts[MIXED] = prove_mixed(candidate, references, alone, several).verdict
    about = {**alone[-1].about, "adapters": [record for proof in alone for record in proof.about["adapters"]]}
    diagnosed = (proof.diagnosis for proof in (*alone, several) if proof is not None and proof.diagnosis)
    return replace(alone[0], verdict=parity.joint_verdict(verdicts), about=about, diagnosis=next(diagnosed, None))


def _step_of(role: str, step: OnProofStep, name: str) -> None:
    step(f"{role}, {name}")
