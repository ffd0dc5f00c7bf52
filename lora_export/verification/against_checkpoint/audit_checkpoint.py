"""Every tensor of a merged checkpoint, judged; and those that are missing or foreign."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from lora_export.lora import EVERY_ROW
from lora_export.plan import FLOATS, Layout, Plan, Step
from lora_export.plan.stored_region import StoredRegion
from lora_export.storage import block_copy
from lora_export.verification.against_checkpoint.changed_weight import CalibratedLayer
from lora_export.verification.against_checkpoint.in_step import AuditInStep, Judgement
from lora_export.verification.against_checkpoint.judge_changed import judge_changed, judge_unknown_layout
from lora_export.verification.against_checkpoint.kept_numbers import KeptWeight, judges_of_kept
from lora_export.verification.against_checkpoint.result import Audit, AuditedWeight, Fate
from lora_export.verification.against_checkpoint.stored_layout import StoredLayouts
from lora_export.verification.against_checkpoint.stored_tensor import Scratch, StoredTensor
from lora_export.verification.parity import SEVERITY, Outcome
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.lost_names import lost_names
from lora_export.weights.merge import added_names


def audit(
    plan: Plan,
    base: Checkpoint,
    merged: Checkpoint,
    *,
    layout: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
    calibrated: Mapping[str, CalibratedLayer] = MappingProxyType({}),
    in_step: AuditInStep[Any] | None = None,
) -> Audit:
    """Judge every tensor of `merged`, which should be what a merge makes of `base` by this plan.

    The layouts in the plan are not used: they are decided again. `layout` has those that the user stated. The weights
    in `calibrated` need not be rounded to nearest. `in_step` is this audit among others of the same base.
    Reads both checkpoints in pieces, in several threads. `progress` receives the bytes judged since the last call.
    Raises InputRefused where a file becomes shorter meanwhile.
    """
    before, after = _tensors(base, in_step), _tensors(merged)
    before |= {name: before[source] for name, source in plan.untied.items()}
    expected: dict[str, tuple[str, Step | None]] = {plan.output_name(name): (name, None) for name in before}
    layouts = StoredLayouts.of(plan, base, layout or {})
    steps = [layouts.stored_as(step) for step in plan.steps]
    expected |= {plan.output_name(step): (step.weight, step) for step in steps if step.spec.region is None}
    parts: dict[str, list[Step]] = {}  # the steps on parts of stored tensors, by the name of the tensor
    for step in steps:
        if step.spec.region is not None:
            parts.setdefault(step.spec.stored_name, []).append(step)
    dtypes = {tensor.dtype for tensor in after.values() if str(tensor.dtype) in FLOATS}
    dtype = dtypes.pop() if len(dtypes) == 1 else None  # of every float tensor

    def judgements(name: str) -> list[Judgement]:
        base_name, step = expected[name]
        candidate = after.get(name)
        if candidate is None:
            missing = AuditedWeight(name, Fate.of(step), Outcome.DIFFERENT, "is missing")
            return [Judgement(0, lambda: missing)]
        steps_on_it = parts.get(base_name) or ([] if step is None else [step])
        is_kept = base_name in base.quantised and name in merged.quantised
        if is_kept and not any(step.is_replacement for step in steps_on_it):
            own, its, grid = KeptWeight.of(base, base_name), KeptWeight.of(merged, name), base.grids.get(base_name)
            judges = judges_of_kept(name, steps_on_it, own, its, grid, calibrated.get(name))
            return [Judgement(candidate.entry.nbytes // len(judges), judge) for judge in judges]
        if base_name in parts:
            return _judge_parts(name, parts[base_name], before[base_name], candidate, dtype)
        judge = functools.partial(_judge, name, step, before.get(base_name), candidate, dtype, calibrated.get(name))
        return [Judgement(candidate.entry.nbytes, judge)]

    every = list(map(judgements, expected))
    tensors = [base_name for base_name, _ in expected.values()]
    found = judge_all(every, progress) if in_step is None else in_step.judge_all(tensors, every, progress)
    weights = [weight for weight in found if weight is not None]
    weights += [
        AuditedWeight(name, Fate.NONE, Outcome.DIFFERENT, "is in neither the base nor the adapters")
        for name in after
        if name not in expected
    ]
    judged = {weight.name for weight in weights if weight.outcome is Outcome.DIFFERENT}
    lost = lost_names(base, after, merged.config, added_names(plan))
    weights += [
        AuditedWeight(name, Fate.NONE, Outcome.DIFFERENT, why) for name, why in lost.items() if name not in judged
    ]
    return audit_of(weights)


def audit_of(weights: Sequence[AuditedWeight]) -> Audit:
    """The audit of all tensors."""
    outcomes = (weight.outcome for weight in weights)
    return Audit(max(outcomes, key=SEVERITY.index, default=Outcome.UNDECIDED), tuple(weights))


def judge_all(by_tensor: Sequence[Sequence[Judgement]], progress: Callable[[int], None]) -> list[AuditedWeight | None]:
    """The results in this order, computed by one thread for each core. The largest begin first: none is left alone.

    `progress` is called by this thread alone.
    """
    every = [one for judgements in by_tensor for one in judgements]
    # Each thread multiplies by itself: those of a BLAS would wait for each other.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(block_copy.default_threads()) as pool:
        started = {pool.submit(one.judge): one for one in sorted(every, key=lambda one: -one.nbytes)}
        found = {}
        try:
            for future in as_completed(started):
                found[started[future]] = future.result()
                progress(started[future].nbytes)
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure
    return [found[one] for one in every]


def _judge_parts(
    name: str, steps: Sequence[Step], base: StoredTensor, candidate: StoredTensor, common_dtype: np.dtype[Any] | None
) -> list[Judgement]:
    """Each part that a step changes, and the entries outside of them."""
    problem = _wrong_shape(None, base, candidate) or _wrong_dtype(base, candidate, common_dtype)
    if problem:
        different = AuditedWeight(name, Fate.CHANGED, Outcome.DIFFERENT, problem)
        return [Judgement(candidate.entry.nbytes, lambda: different)]
    regions = [step.spec.region for step in steps if step.spec.region is not None]
    share = candidate.entry.nbytes // len(regions)

    def of_part(step: Step, region: StoredRegion) -> AuditedWeight:
        return _judge(step.weight, step, base.part(region), candidate.part(region), common_dtype)

    def of_rest() -> AuditedWeight | None:
        rest = judge_rest(name, regions, base, candidate)
        return rest if rest.elements else None

    parts = [Judgement(share, functools.partial(of_part, *each)) for each in zip(steps, regions, strict=True)]
    return [*parts, Judgement(candidate.entry.nbytes - share * len(regions), of_rest)]


def _tensors(checkpoint: Checkpoint, in_step: AuditInStep[Any] | None = None) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(shard, entry, quantised=checkpoint.quantised.get(name), in_step=in_step)
        for file, shard in checkpoint.shards.items()
        for name, entry in checkpoint.entries(file).items()
    }


def _judge(
    name: str,
    step: Step | None,
    base: StoredTensor | None,
    candidate: StoredTensor,
    common_dtype: np.dtype[Any] | None,
    calibrated: CalibratedLayer | None = None,
) -> AuditedWeight:
    problem = _wrong_shape(step, base, candidate) or _wrong_dtype(base, candidate, common_dtype)
    if problem:
        return AuditedWeight(name, Fate.of(step), Outcome.DIFFERENT, problem)
    if step is not None and not step.is_replacement:
        assert base is not None
        if step.spec.layout is Layout.UNKNOWN and step.terms:
            return judge_unknown_layout(step, lambda one: judge_changed(name, one, base, candidate, calibrated))
        return judge_changed(name, step, base, candidate, calibrated)
    return judge_rounded(name, step, base, candidate)


def _wrong_shape(step: Step | None, base: StoredTensor | None, candidate: StoredTensor) -> str:
    shape = base.shape if base is not None else step.spec.shape if step is not None else ()
    return "" if candidate.shape == shape else f"is {list(candidate.shape)}, and should be {list(shape)}"


def _wrong_dtype(base: StoredTensor | None, candidate: StoredTensor, common_dtype: np.dtype[Any] | None) -> str:
    """A tensor has the dtype of the base, or the one dtype to which all floats of the candidate were converted."""
    if base is None or candidate.dtype == base.dtype:
        return ""
    if str(base.dtype) in FLOATS and common_dtype is not None and candidate.dtype == common_dtype:
        return ""
    return f"is {candidate.dtype}, the base's is {base.dtype}"


# --- tensors to which nothing is added: of the base, or of an adapter, rounded once ---


def judge_rounded(name: str, step: Step | None, base: StoredTensor | None, candidate: StoredTensor) -> AuditedWeight:
    """Compare a tensor bit by bit with that of the base, or with that of the adapter."""
    if step is None and base is not None:
        base, candidate = base.as_matrix, candidate.as_matrix
    scratch, off, elements = Scratch(), 0, 0
    differs = step is None  # whether the tensor of the adapter differs from that of the base
    for rows in candidate.pieces(least=1 if base is None else base.rows_at_once):
        with np.errstate(over="ignore"):
            read = None if base is None else base.rows(rows, scratch, "base")
            old = None if read is None else read.astype(candidate.dtype, copy=False)
            expected = old if step is None else replacement_rows(step, rows, read, candidate.dtype)
        assert expected is not None
        differs = differs or old is None or _count_other_bits(old, expected) > 0
        stored = candidate.rows(rows, scratch, "candidate")
        if _count_other_bits(stored, expected):
            values = read if step is None else replacement_rows(step, rows, read, np.dtype(np.float64))
            off += stored.size - int(np.count_nonzero(_are_rounded(stored, expected, values)))
        elements += stored.size
    if not off:
        controls = {} if step is None else {"base": differs}
        return AuditedWeight(name, Fate.of(step), Outcome.SAME, elements=elements, controls=controls)
    why = f"{off:,} of {elements:,} entries are not the {'base' if step is None else 'adapter'}'s"
    return AuditedWeight(name, Fate.of(step), Outcome.DIFFERENT, why, elements, off)


def judge_rest(name: str, parts: Sequence[StoredRegion], base: StoredTensor, candidate: StoredTensor) -> AuditedWeight:
    """Compare bit by bit what is outside of these parts of a tensor with the base."""
    shape = parts[0].shape
    whole = StoredRegion(name, shape, slice(0, shape[0]))
    before, after = base.part(whole), candidate.part(whole)
    scratch, off, elements = Scratch(reads_on=False), 0, 0
    is_changed = np.zeros(shape[0], bool)  # rows that are a part, or of one, from end to end
    for part in parts:
        is_changed[part.rows] |= part.columns == EVERY_ROW
    for rows in after.pieces(least=base.as_matrix.rows_at_once):
        if is_changed[rows].all():
            continue
        values = before.rows(rows, scratch, "base")
        with np.errstate(over="ignore"):
            expected = values.astype(after.dtype, copy=False)
        is_outside = np.ones(expected.shape, bool)
        for part in parts:
            first, last = (min(max(edge - rows.start, 0), len(expected)) for edge in (part.rows.start, part.rows.stop))
            is_outside[first:last, *(() if len(shape) == 1 else (part.columns,))] = False
        same = _are_rounded(after.rows(rows, scratch, "candidate"), expected, values)
        off += int(np.count_nonzero(~same & is_outside))
        elements += int(np.count_nonzero(is_outside))
    outcome = Outcome.DIFFERENT if off else Outcome.SAME
    why = f"{off:,} of the {elements:,} entries outside of the parts that change are not the base's" if off else ""
    return AuditedWeight(f"{name} (other entries)", Fate.KEPT, outcome, why, elements, off)


def replacement_rows(step: Step, rows: slice, old: NDArray[Any] | None, dtype: np.dtype[Any]) -> NDArray[Any]:
    """These rows of the tensor with the values of the adapter."""
    whole = old if step.replace is None else np.atleast_1d(step.replace)[rows]
    assert whole is not None
    table = whole.astype(dtype)
    if step.token_rows is not None:
        for index, values in zip(step.token_rows.indices.tolist(), step.token_rows.values, strict=True):
            if rows.start <= index < rows.stop:
                table[index - rows.start] = values.astype(dtype)
    return table


def _count_other_bits(one: NDArray[Any], other: NDArray[Any]) -> int:
    """How many entries differ in a bit. Entries that all agree are compared eight bytes at a time."""
    if one.nbytes % 8 == 0 and one.flags.c_contiguous and other.flags.c_contiguous:
        words, others = (each.reshape(-1).view(np.uint64) for each in (one, other))
        if np.array_equal(words, others):
            return 0
    return one.size - int(np.count_nonzero(_equal_bits(one, other)))


def _are_rounded(stored: NDArray[Any], expected: NDArray[Any], values: NDArray[Any] | None) -> NDArray[np.bool_]:
    """Entry by entry, whether it has the expected bits, or those of a value in fp64 that went by way of fp32.

    PyTorch goes so to 16 bits. NumPy rounds once to fp16, and ml_dtypes to bf16 from 0.7 on.
    """
    same = _equal_bits(stored, expected)
    if values is not None and values.dtype == np.float64 and stored.dtype.itemsize == 2:
        with np.errstate(over="ignore"):
            same |= _equal_bits(stored, values.astype(np.float32).astype(stored.dtype))
    return same


def _equal_bits(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Entry by entry, to the last bit; a NaN equals one of the same bits."""
    kind = f"u{one.dtype.itemsize}" if one.dtype.itemsize in (1, 2, 4, 8) else one.dtype
    return np.asarray(np.ascontiguousarray(one).view(kind) == np.ascontiguousarray(other).view(kind))
