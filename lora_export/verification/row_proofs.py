"""Proofs of a graph whose runs choose their adapters: each adapter alone, several on one row, and all in one batch.

Or their strengths: as they are by default, and others.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.callbacks import ignore
from lora_export.errors import InputRefused, Undecided, count
from lora_export.formats.contract import without_absent
from lora_export.options.spelling import named
from lora_export.runtime.kv_cache import graph_of
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, RowsRunner, Runner, StrengthsRunner
from lora_export.runtime.three_graphs import EncoderDecoderRunner
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import OnProofStep
from lora_export.verification.compare_outputs import named_as, same_bits
from lora_export.verification.parity import Outcome
from lora_export.verification.proof import Proof, prove
from lora_export.verification.references import References

BASE = "the base"
MIXED = "mixed batches"
SEVERAL = "several adapters on a row"
MOVED = "replaced adapters"
DEFAULT_STRENGTHS, STRENGTHS = "default strengths", "other strengths"
MOST_SLOTS = 64  # slots whose adapters are judged after they were replaced
# Powers of two, so that B times them has the bits of B, and no two alike
OTHER_STRENGTHS = (0.5, -0.25, -2.0, -0.5, 0.25, 2.0, -1.0, -4.0, 0.125, 4.0, -0.125, 0.0625)
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


def prove_candidate(
    candidate: Runner, references: References, *, prove: Prove = prove, step: OnProofStep = ignore
) -> Proof:
    """The proof of a candidate; where its rows choose adapters or its runs strengths, of all that they may choose."""
    if isinstance(candidate, RowsRunner) and candidate.takes_rows:
        return prove_rows(candidate, references, prove=prove, step=step)
    proof = prove(candidate, references.with_adapters(references.adapters, references.strengths), step=step)
    others = prove_strengths(candidate, references, prove=prove, step=functools.partial(_step_of, STRENGTHS, step))
    if others is None:
        return proof
    verdict = parity.joint_verdict({DEFAULT_STRENGTHS: proof.verdict, STRENGTHS: others.verdict})
    return replace(proof, verdict=verdict, diagnosis=proof.diagnosis or others.diagnosis)


def prove_strengths(
    candidate: Runner, references: References, *, prove: Prove = prove, step: OnProofStep = ignore
) -> Proof | None:
    """Judge a graph whose runs choose the strengths of its adapters, at other ones than the default.

    No two of up to twelve adapters have the same, so that exchanged ones are found. None where the graph has no such
    input, or no adapter is active. Raises InputRefused where the graph has strengths of other adapters.
    """
    adapters = references.adapters
    if not isinstance(candidate, StrengthsRunner) or not (names := candidate.adapters_with_strength) or not adapters:
        return None
    if (graph := graph_of(candidate)) is not None and graph.lacks_adapter:
        return None
    if len(names) > 1 and not {adapter.name for adapter in adapters} >= set(names):
        raise InputRefused(
            f"{candidate.path} has the strengths of {', '.join(names)}. Give these adapters by these names: "
            f"{named('adapters', 'NAME=ADAPTER')}"
        )
    chosen = dict(zip(names, itertools.cycle(OTHER_STRENGTHS), strict=False))
    given = references.strengths or (1.0,) * len(adapters)
    factors = _factors(candidate, chosen, [adapter.name for adapter in adapters])
    scaled = [strength * factor for strength, factor in zip(given, factors, strict=True)]
    runner = references.as_run(candidate.with_strengths(list(chosen.values())))
    return prove(runner, references.with_adapters(adapters, scaled), step=step)


def _factors(candidate: Runner, chosen: Mapping[str, float], adapters: Sequence[str]) -> list[float]:
    """The factor of each adapter; 1 of those that were merged into the weights beside it.

    The only factor belongs to the adapter of this name, or of the file that is active; without such a one to all.
    """
    if len(chosen) == 1:
        ((name, factor),) = chosen.items()
        graph = graph_of(candidate)
        file = None if graph is None else graph.adapter_file
        names = {name, "" if file is None else file.stem}
        chosen = {one: factor for one in adapters if one in names} or dict.fromkeys(adapters, factor)
    return [chosen.get(one, 1.0) for one in adapters]


def _prove_several(candidate: RowsRunner, references: References, prove: Prove, step: OnProofStep) -> Proof:
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


def _prove_mixed(
    candidate: RowsRunner, references: References, proofs: Sequence[Proof], several: Proof | None
) -> Proof:
    """Judge batches whose rows have each adapter in turn, and the base.

    `proofs` are, by id, those of whole batches with one adapter, on the same inputs, the base's first. With `several`,
    the proof of rows with several adapters, there are such rows, too, and a single one at each place (see
    `mixed_rows`). Where the largest batch has fewer rows than there are kinds, there are further batches. Raises
    Undecided where no output has a row for each row of the batch.
    """
    rows = mixed_rows(len(proofs) - 1, candidate.adapters_per_row if several else 1)
    every = [*proofs, several] if several else list(proofs)
    return _judged(every, _cases_of_rows(candidate, references, every, rows, with_scales=several is not None))


def _prove_moved(candidate: RowsRunner, references: References, proofs: Sequence[Proof]) -> Proof | None:
    """Judge batches of a graph of slots after another adapter, or none, took the place of that of each slot.

    `proofs` are those of `_prove_mixed`. None for a graph without slots. Of many slots, MOST_SLOTS are judged, the
    first and the last among them. As a control, each adapter is compared with the one in the slot beside it: the
    verdict is `undecided` where it cannot distinguish them.
    """
    moved = candidate.with_moved_adapters() if isinstance(candidate, OnnxRunner | EncoderDecoderRunner) else None
    if moved is None:
        return None
    runner, now = moved
    slots = np.unique(np.linspace(1, len(now), min(len(now), MOST_SLOTS)).astype(int)).tolist()
    rows = [MixedRow((slot,), (1.0,), now[slot - 1]) for slot in slots]
    proof = _judged(proofs, _cases_of_rows(runner, references, proofs, rows, with_scales=False))
    names = candidate.adapters_by_row or []
    reasons = [
        parity.Reason(
            Outcome.UNDECIDED,
            "neighbour's slot",
            f"{names[one - 1]} and {names[other - 1]} in the slot beside it compute nearly the same: this check cannot "
            "distinguish a neighbour's slot",
            remedy="adapters that differ more",
        )
        for one, other in itertools.pairwise(range(1, len(proofs)))
        if not _is_distinguished(proofs[one], proofs[other])
    ]
    return replace(proof, verdict=parity.with_reasons(proof.verdict, *reasons))


def _is_distinguished(proof: Proof, neighbour: Proof) -> bool:
    """Whether the candidate with the neighbour's adapter is different from the reference of this one."""
    others = {case.name: case.candidate for case in neighbour.cases}
    cases = [replace(case, candidate=others[case.name]) for case in proof.cases if case.name in others]
    return parity.judge(cases, dtype=proof.verdict.dtype).outcome is Outcome.DIFFERENT


def _cases_of_rows(
    candidate: RowsRunner,
    references: References,
    proofs: Sequence[Proof],
    rows: Sequence[MixedRow],
    *,
    with_scales: bool,
) -> list[parity.Case]:
    """The cases of batches that have each of these rows at least once."""
    largest = max(len(next(iter(arrays.values()))) for arrays in proofs[0].inputs.values())
    cases: list[parity.Case] = []
    for begin in range(0, len(rows), largest):
        own = [*rows[begin:], *rows[:begin]]
        ids, scales = [list(row.ids) for row in own], [list(row.scales) for row in own]
        runner = candidate.with_rows(ids, scales) if with_scales else candidate.with_rows([row.ids[0] for row in own])
        cases += _mixed_cases(references.as_run(runner), proofs, own)
    return cases


class MixedRow(NamedTuple):
    """A row of a mixed batch: its adapters, the factor of each, and the place of its proof among those given."""

    ids: tuple[int, ...]
    scales: tuple[float, ...]
    proof: int

    def __str__(self) -> str:
        """The ids, as in `1+2`, without the places after the last adapter."""
        last = max((place for place, number in enumerate(self.ids) if number), default=0)
        return "+".join(map(str, self.ids[: last + 1]))


def mixed_rows(adapters: int, per_row: int) -> list[MixedRow]:
    """The kinds of rows of mixed batches: each adapter by itself, and the base.

    Where a row has several adapters, those of `several_on_row` in both orders come first, and each place holds the
    only adapter of a row once.
    """
    if per_row == 1:
        return [MixedRow((number,), (1.0,), number) for number in [*range(1, adapters + 1), 0]]
    ids, scales = several_on_row(adapters, per_row)
    rows = [MixedRow(ids, scales, adapters + 1), MixedRow(ids[::-1], scales[::-1], adapters + 1)]
    for number in range(max(adapters, per_row)):
        one, place = 1 + number % adapters, (1 + number) % per_row
        own = tuple(one if other == place else 0 for other in range(per_row))
        rows.append(MixedRow(own, (1.0,) * per_row, one))
    return [*rows, MixedRow((0,) * per_row, (1.0,) * per_row, 0)]


def _judged(proofs: Sequence[Proof], cases: Sequence[parity.Case]) -> Proof:
    first, last = proofs[0], proofs[-1]
    notes = tuple(
        f"{name} has numbers between the rows of a batch: those between rows with different adapters were not judged"
        for name in _outputs_between_rows(first)
    )
    tolerance = last.about.get("tolerance") or {}  # which the user demands of these rows, too
    verdict = parity.judge(cases, dtype=last.verdict.dtype, findings=parity.Findings(notes), **tolerance)
    return Proof(verdict, first.placement, last.about, first.inputs, tuple(cases))


def _outputs_between_rows(proof: Proof) -> list[str]:
    """The outputs with numbers for each two rows of a batch, as CLIP has them for each image and text.

    Their first two axes have the size of the batch, whatever this is: nothing is known from batches of one size, or
    where texts always have as many tokens.
    """
    sizes = [len(next(iter(arrays.values()))) for arrays in proof.inputs.values()]
    each_alike = zip(proof.inputs.values(), sizes, strict=True)
    if len(set(sizes)) < 2 or all(any(x.shape[1:2] == (size,) for x in each.values()) for each, size in each_alike):
        return []
    return [
        name
        for name in proof.cases[0].reference
        if all(case.reference[name].shape[:2] == (size, size) for case, size in zip(proof.cases, sizes, strict=True))
    ]


def _mixed_cases(candidate: Runner, proofs: Sequence[Proof], rows: Sequence[MixedRow]) -> list[parity.Case]:
    """A case for each of the inputs that all proofs have, whose rows are these, over and over."""
    cases = []
    between_rows = _outputs_between_rows(proofs[0])
    for name, arrays in proofs[0].inputs.items():
        if not all(name in proof.inputs and same_bits(arrays, proof.inputs[name]) for proof in proofs):
            continue  # a proof has further ones where those of all reach no expert of its adapter
        alone = [case for proof in proofs for case in proof.cases if case.name == name]
        batch = len(next(iter(arrays.values())))
        by_row = [key for key, value in alone[0].reference.items() if value.ndim and len(value) == batch]
        if not by_row:
            raise Undecided(f"no output has a row for each row of the batch ({name}): a mixed batch cannot be judged")
        outputs = named_as(alone[0].reference, candidate.run(arrays))
        own = [rows[row % len(rows)] for row in range(batch)]
        places = np.array([row.proof for row in own])
        mixed = _mixed(alone, places, by_row, outputs, ", ".join(map(str, own)))
        apart = dict.fromkeys(between_rows, places[:, None] != places)
        cases.append(replace(mixed, unjudged_by_output={**mixed.unjudged_by_output, **apart}))
    return cases


def prove_rows(
    candidate: RowsRunner, references: References, *, prove: Prove = prove, step: OnProofStep = ignore
) -> Proof:
    """Judge a graph whose rows choose their adapters: the base, each adapter alone, and all of them in one batch.

    The adapters of `references` are those of the graph, in the order of their ids. `prove` may have options of its own.
    Errors are those of `prove`. Raises InputRefused, too, where the graph holds another number of adapters.
    """
    adapters, strengths = references.adapters, references.strengths
    names = candidate.adapters_by_row
    if names is not None and len(names) != len(adapters):
        raise InputRefused(
            f"{candidate.path} has {count(len(names), 'adapter')} ({', '.join(names)}), not {len(adapters)}: give "
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
    proofs = dict(zip(roles, alone, strict=True))
    proofs |= prove_batches(candidate, references, alone, prove=prove, step=step)
    verdict = parity.joint_verdict({role: proof.verdict for role, proof in proofs.items()})
    about = {**alone[-1].about, "adapters": [record for proof in alone for record in proof.about["adapters"]]}
    diagnosed = (proof.diagnosis for proof in proofs.values() if proof.diagnosis)
    return replace(alone[0], verdict=verdict, about=about, diagnosis=next(diagnosed, None))


def prove_batches(
    candidate: RowsRunner,
    references: References,
    alone: Sequence[Proof],
    *,
    prove: Prove = prove,
    step: OnProofStep = ignore,
) -> Iterator[tuple[str, Proof]]:
    """Judge batches whose rows do not have one adapter each, or not the same; each proof with its role.

    `alone` are, by id, the proofs of whole batches with one adapter of the `references`, on the same inputs, the base's
    first.
    """
    several = None
    if candidate.adapters_per_row > 1:
        several = _prove_several(candidate, references, prove, functools.partial(_step_of, SEVERAL, step))
        yield SEVERAL, several
    step(MIXED)
    yield MIXED, _prove_mixed(candidate, references, alone, several)
    if moved := _prove_moved(candidate, references, alone):
        yield MOVED, moved


def _step_of(role: str, step: OnProofStep, name: str) -> None:
    step(f"{role}, {name}")


def _by_labels(key: str, references: Sequence[NDArray[Any]]) -> dict[str, list[int]]:
    """The rows of an output, by a name for those of one shape: heads may have different numbers of labels."""
    if len({reference.shape for reference in references}) == 1:
        return {key: list(range(len(references)))}
    groups: dict[str, list[int]] = {}
    for row, reference in enumerate(references):
        groups.setdefault(f"{key}, {reference.shape[-1]} labels", []).append(row)
    return groups


def _without_adapter(base: parity.Case, case: parity.Case) -> parity.Outputs:
    """The base's outputs beside those of a case. A head with other labels is compared without the adapter's pairs."""
    off = case.base or case.reference
    return {
        key: value if value.shape == case.reference[key].shape else off[key] for key, value in base.reference.items()
    }


def _mixed(
    alone: Sequence[parity.Case], ids: NDArray[Any], by_row: Sequence[str], outputs: Arrays, label: str
) -> parity.Case:
    """A case of the outputs `by_row`, in which every row of every run is the row of the case of its adapter."""
    groups = {key: _by_labels(key, [alone[chosen].reference[key] for chosen in ids]) for key in by_row}
    unjudged = alone[0].unjudged

    def judged(array: NDArray[Any], group: Sequence[int], *, is_whole: bool) -> NDArray[Any]:
        """The positions of some rows that are judged; `parity.Case` finds those of a whole batch itself."""
        if is_whole or unjudged is None or array.ndim < 3 or array.shape[:2] != unjudged[group].shape:
            return array
        positions: NDArray[Any] = array[~unjudged[group]]
        return positions

    def rows(runs: Sequence[parity.Outputs]) -> Arrays:
        return {
            name: judged(np.stack([runs[ids[row]][key][row] for row in group]), group, is_whole=len(own) == 1)
            for key, own in groups.items()
            for name, group in own.items()
        }

    def candidate_rows(key: str, group: Sequence[int], *, is_whole: bool) -> NDArray[Any]:
        """The candidate's rows, without the labels that their heads do not have; all of what has no such rows."""
        if outputs[key].shape[:1] != ids.shape:
            return outputs[key]
        labels = alone[ids[group[0]]].reference[key].shape[-1]
        return judged(without_absent(outputs[key][group], labels), group, is_whole=is_whole)

    return parity.Case(
        name=f"{alone[0].name}, adapters {label}",
        inputs_summary=alone[0].inputs_summary,
        reference=rows([case.reference for case in alone]),
        deployed=rows([case.deployed for case in alone]),
        candidate={
            name: candidate_rows(key, group, is_whole=len(own) == 1)
            for key, own in groups.items()
            for name, group in own.items()
            if key in outputs
        },
        base=rows([_without_adapter(alone[0], case) for case in alone]),
        scaled=rows([case.scaled or case.reference for case in alone]),
        peer=alone[-1].peer,
        unjudged=unjudged,
        unjudged_by_output=_unjudged_rows(alone, ids),
    )


def _unjudged_rows(alone: Sequence[parity.Case], ids: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
    """Output -> the positions that are not judged: of every row, those of the case of its adapter."""
    by_output: dict[str, NDArray[np.bool_]] = {}
    for number, case in enumerate(alone):
        for name, positions in case.unjudged_by_output.items():
            own = by_output.setdefault(name, np.zeros_like(positions))
            own[ids == number] = positions[ids == number]
    return by_output
