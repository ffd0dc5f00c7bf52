"""A merged GGUF file, judged against its base: fields, types, scales, codes.

    fields    All but the record of the merge have the bytes of the base's, and so do the names, shapes and sequence of
              the tensors.
    kept      A tensor that no adapter changes has the type and the bytes of the base's.
    changed   A tensor has its type of the base, or the one that the record of the file names. In blocks of the base's
              type, all but the codes has the base's bytes; where the record has new scales, these are right for V
              (`block_scales`). Each value is the nearest to V = W + Σ s·BA that its scale allows (`block_values`). In
              blocks of Q8_0 that were another type the largest number is 127. Floats are judged as in a checkpoint.
    controls  As in a checkpoint.

The rows of q and k are put into llama.cpp's order by a formula of this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export import provenance
from lora_export.errors import InputRefused
from lora_export.names.row_orders import RowOrder
from lora_export.plan import Layout, Plan, Step
from lora_export.storage.gguf_blocks import CODECS, FLAT
from lora_export.storage.gguf_file import GgufTensor
from lora_export.verification.against_checkpoint.audit_checkpoint import (
    audit_of,
    judge_all,
    judge_rounded,
    replacement_rows,
)
from lora_export.verification.against_checkpoint.block_scales import beside_codes
from lora_export.verification.against_checkpoint.block_values import ChangedBlocks, StoredBlocks, bytes_at
from lora_export.verification.against_checkpoint.changed_weight import CalibratedLayer
from lora_export.verification.against_checkpoint.in_step import Judgement
from lora_export.verification.against_checkpoint.judge_changed import judge_changed, judge_unknown_layout, judge_weight
from lora_export.verification.against_checkpoint.result import Audit, AuditedWeight, Fate
from lora_export.verification.against_checkpoint.stored_layout import StoredLayouts
from lora_export.verification.against_checkpoint.stored_tensor import StoredTensor, have_equal_bytes
from lora_export.verification.parity import SEVERITY, Findings, Outcome
from lora_export.weights.gguf.base import GgufBase

PIECE = 1 << 22  # bytes that are compared at once


def audit_gguf(
    plan: Plan,
    base: GgufBase,
    merged: GgufBase,
    types: Mapping[str, Any],
    *,
    rescaled: Container[Any] = (),
    progress: Callable[[int], None] = lambda _: None,
    calibrated: Mapping[str, CalibratedLayer] = MappingProxyType({}),
) -> Audit:
    """Judge every field and tensor of `merged`, which should be what a merge makes of `base` by this plan.

    The plan has the rows of transformers. `types` are those of promoted tensors, and `rescaled` those with new
    scales, as the record of `merged` names them.
    The weights in `calibrated` need not be rounded to nearest.
    Raises InputRefused where a file becomes shorter meanwhile, and for heads that are not those of the rows.
    """
    layouts = StoredLayouts.of(plan, base.checkpoint, {})
    steps: dict[str, list[Step]] = {}
    for step in map(layouts.stored_as, plan.steps):
        steps.setdefault(step.spec.stored_name, []).append(_in_rows_of_llama(step, base))

    def judgements(name: str) -> list[Judgement]:
        tensor, candidate = base.tensors[name], merged.tensors.get(name)
        if candidate is None:
            missing = AuditedWeight(name, Fate.KEPT, Outcome.DIFFERENT, "is missing")
            return [Judgement(0, lambda: missing)]
        is_rescaled = tensor.name in rescaled
        pair = _Pair(name, tensor, candidate, base, merged, calibrated.get(name), is_rescaled=is_rescaled)
        if name not in steps:
            return [Judgement(candidate.stop - candidate.start, pair.judge_kept)]
        wanted = str(types.get(candidate.name, tensor.type.name))
        judge = functools.partial(pair.judge_changed, steps[name], wanted)
        return [Judgement(candidate.stop - candidate.start, judge)]

    weights = [weight for weight in judge_all(list(map(judgements, base.tensors)), progress) if weight is not None]
    weights += [
        AuditedWeight(name, Fate.NONE, Outcome.DIFFERENT, "is in neither the base nor the adapters")
        for name in merged.tensors
        if name not in base.tensors
    ]
    return audit_of(weights).with_files(Findings(faults=tuple(_other_fields(base, merged))))


def _other_fields(base: GgufBase, merged: GgufBase) -> Iterator[str]:
    own, others = ({*one.file.fields} - {provenance.KEY} for one in (base, merged))
    yield from (f"the field {key} is missing" for key in sorted(own - others))
    yield from (f"the field {key} is new" for key in sorted(others - own))
    for key in sorted(own & others):
        one, other = base.file.fields[key], merged.file.fields[key]
        if not _equal_bytes(base, merged, one, other):
            yield f"the field {key} is not the base's"
    if [tensor.name for tensor in base.file.tensors] != [tensor.name for tensor in merged.file.tensors]:
        yield "the sequence of the tensors is not the base's"


def _equal_bytes(base: GgufBase, merged: GgufBase, one: Any, other: Any) -> bool:
    """Whether a field or a tensor of both has the same bytes."""
    size = one.stop - one.start
    its = merged.file.path, other.start
    return size == other.stop - other.start and have_equal_bytes(base.file.path, one.start, *its, size)


def _in_rows_of_llama(step: Step, base: GgufBase) -> Step:
    """The step with its rows where llama.cpp has them: those of a head's two halves alternate."""
    order = base.names.row_order(step.weight)
    if order is None:
        return step
    heads = base.names.heads.queries if order is RowOrder.PAIRS_OF_QUERIES else base.names.heads.keys
    if not heads or step.spec.shape[0] % (2 * heads):
        raise InputRefused(f"{base.file.path} states {heads} heads, which are not those of {step.weight}")
    half = step.spec.shape[0] // heads // 2
    rows = np.array(
        [2 * half * head + half * side + k for head in range(heads) for k in range(half) for side in (0, 1)]
    )

    def taken(values: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if values is None else values[rows]

    terms = tuple(replace(term, pair=term.pair.part(rows, None)) for term in step.terms)
    return replace(step, terms=terms, shift=taken(step.shift), replace=taken(step.replace))


@dataclass(frozen=True, eq=False)
class _Pair:
    """A tensor in the base, and in the candidate."""

    name: str
    base: GgufTensor
    candidate: GgufTensor
    of_base: GgufBase
    of_candidate: GgufBase
    calibrated: CalibratedLayer | None = None
    is_rescaled: bool = False

    def judge_kept(self) -> AuditedWeight:
        one, other = self.base, self.candidate
        why = self._wrong_form(one.type.name)
        if not why and not _equal_bytes(self.of_base, self.of_candidate, one, other):
            why = "has other bytes than the base's"
        return AuditedWeight(self.name, Fate.KEPT, Outcome.DIFFERENT if why else Outcome.SAME, why)

    def judge_changed(self, steps: list[Step], wanted: str) -> AuditedWeight:
        """Judge what steps did to it: one to all of it, or several to experts."""
        why = self._wrong_form(wanted)
        is_same_type = self.candidate.type == self.base.type and self.base.type not in FLAT
        if not why and is_same_type and not self.is_rescaled:
            why = self._other_scales()
        if why:
            return AuditedWeight(self.name, Fate.of(steps[0]), Outcome.DIFFERENT, why)
        before, after = _stored(self.of_base, self.name), _stored(self.of_candidate, self.name)
        if len(steps) == 1 and steps[0].spec.region is None:
            return self._judge_step(self.name, steps[0], before, after, 0)
        return _together(self.name, list(self._judge_parts(steps, before, after)))

    def _judge_parts(self, steps: list[Step], before: StoredTensor, after: StoredTensor) -> Iterator[AuditedWeight]:
        changed = {}
        for step in steps:
            region = step.spec.region
            assert region is not None
            changed[region.rows.start] = region.rows.stop
            yield self._judge_step(step.weight, step, before.part(region), after.part(region), region.rows.start)
        region = steps[0].spec.region
        assert region is not None
        first = 0
        for start in [*sorted(changed), region.shape[0]]:
            if first < start:
                rest = replace(region, rows=slice(first, start))
                parts = before.part(rest), after.part(rest)
                yield self._judge_values(f"{self.name} (other rows)", None, *parts, first)
            first = changed.get(start, start)

    def _judge_step(
        self, name: str, step: Step, before: StoredTensor, after: StoredTensor, first: int
    ) -> AuditedWeight:
        blocks, calibrated = self._blocks(first), self.calibrated
        if step.is_replacement:
            if blocks is None:
                return judge_rounded(name, step, before, after)
            return self._judge_values(name, step, before, after, first)

        def judge(one: Step) -> AuditedWeight:
            if blocks is None:
                return judge_changed(name, one, before, after, calibrated)
            pieces = list(after.pieces())
            weight = ChangedBlocks(one, before, after, pieces, calibrated, stored_blocks=blocks)
            return _with_scales(judge_weight(name, weight), weight.wrong_scales)

        return judge_unknown_layout(step, judge) if step.spec.layout is Layout.UNKNOWN and step.terms else judge(step)

    def _judge_values(
        self, name: str, step: Step | None, before: StoredTensor, after: StoredTensor, first: int
    ) -> AuditedWeight:
        """Compare rows with those of the base, or with those of an adapter in their place."""
        blocks, off, elements, differs, wrong = self._blocks(first), 0, 0, step is None, 0
        for rows in after.pieces():
            old, found = before.rows(rows), after.rows(rows).astype(np.float64)
            wanted = old if step is None else replacement_rows(step, rows, old, np.dtype(np.float32))
            if blocks is None:
                wanted = wanted.astype(after.dtype)
            distance, allowed = found - wanted.astype(np.float64), np.zeros(found.shape)
            if blocks is not None:
                below, above = (each.reshape(found.shape) for each in blocks.gaps(rows, found.shape[-1]))
                allowed = np.where(distance > 0, below, above)
                wrong += blocks.wrong_scales(rows, wanted.astype(np.float64), np.zeros(found.shape))
            off += found.size - int(np.count_nonzero(np.abs(distance) <= allowed))
            elements += found.size
            differs = differs or not np.array_equal(wanted, old)
        controls = {} if step is None else {"base": differs}
        if not off:
            same = AuditedWeight(name, Fate.of(step), Outcome.SAME, elements=elements, controls=controls)
            return _with_scales(same, lambda: wrong)
        why = f"{off:,} of {elements:,} entries are not the nearest to the {'base' if step is None else 'adapter'}'s"
        return AuditedWeight(name, Fate.of(step), Outcome.DIFFERENT, why, elements, off)

    def _blocks(self, first: int) -> StoredBlocks | None:
        """The candidate's blocks, of rows from `first` on; None for floats."""
        if self.candidate.type in FLAT:
            return None
        is_rescaled = self.is_rescaled and self.candidate.type == self.base.type
        files = self.of_base.file, self.base, self.of_candidate.file, self.candidate
        return StoredBlocks(*files, first, is_rescaled=is_rescaled)

    def _wrong_form(self, wanted: str) -> str:
        if self.candidate.shape != self.base.shape:
            return f"is {list(self.candidate.shape)}, and should be {list(self.base.shape)}"
        if self.candidate.type.name != wanted:
            return f"is stored as {self.candidate.type.name}, and should be as {wanted}"
        return ""

    def _other_scales(self) -> str:
        """Why the bytes of the blocks beside their codes are not the base's; empty where they are."""
        codec, kind = CODECS[self.base.type], self.base.type
        keeps = beside_codes(codec)
        count, off = PIECE // kind.nbytes * kind.nbytes, 0
        for start in range(0, self.base.stop - self.base.start, count):
            size = min(count, self.base.stop - self.base.start - start)
            own, others = (
                bytes_at(one.file, tensor.start + start, size).reshape(-1, kind.nbytes)[:, keeps]
                for one, tensor in ((self.of_base, self.base), (self.of_candidate, self.candidate))
            )
            off += int(np.count_nonzero((own != others).any(axis=1)))
        return f"{off:,} of its blocks have other scales than the base's" if off else ""


def _with_scales(found: AuditedWeight, wrong_scales: Callable[[], int]) -> AuditedWeight:
    """A weight whose values are right, with what is wrong about its new scales."""
    if found.outcome is Outcome.DIFFERENT or not (wrong := wrong_scales()):
        return found
    why = f"{wrong:,} of its blocks have scales that are neither the base's nor those of the least squared error"
    return replace(found, outcome=Outcome.DIFFERENT, why=why)


def _together(name: str, parts: list[AuditedWeight]) -> AuditedWeight:
    """The parts of one tensor as one: the worst of them, with the entries of all."""
    worst = max(parts, key=lambda part: (SEVERITY.index(part.outcome), part.error))
    why = f"{worst.name}: {worst.why}" if worst.why else ""
    controls = {f"{part.name}: {what}": found for part in parts for what, found in part.controls.items()}
    elements, off = (sum(getattr(part, field) for part in parts) for field in ("elements", "off"))
    return replace(
        worst, name=name, fate=Fate.CHANGED, why=why, elements=elements, off=off, controls=controls, worst=None
    )


def _stored(file: GgufBase, name: str) -> StoredTensor:
    (shard,) = file.checkpoint.shards.values()
    entry = file.checkpoint.entries(file.file.path.name)[name]
    return StoredTensor(shard, entry, quantised=file.checkpoint.quantised.get(name))
