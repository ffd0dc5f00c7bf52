"""Every tensor of a merged checkpoint, judged; and those that are missing or foreign."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lora_export.plan import FLOATS, Layout, Plan, Step
from lora_export.storage import block_copy
from lora_export.verification.against_checkpoint.judge_changed import judge_changed, judge_unknown_layout
from lora_export.verification.against_checkpoint.judge_rounded import judge_rest, judge_rounded
from lora_export.verification.against_checkpoint.result import Audit, AuditedWeight, Fate
from lora_export.verification.against_checkpoint.stored_layout import StoredLayouts
from lora_export.verification.against_checkpoint.stored_tensor import StoredTensor
from lora_export.verification.parity import Outcome
from lora_export.weights.checkpoint import Checkpoint


def audit(
    plan: Plan,
    base: Checkpoint,
    merged: Checkpoint,
    *,
    layout: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Audit:
    """Judge every tensor of `merged`, which should be what a merge makes of `base` by this plan.

    The layouts in the plan are not used: they are decided again. `layout` has those that the user stated.
    Reads both checkpoints in pieces, in several threads. `progress` receives the bytes judged since the last call.
    Raises InputRefused where a file becomes shorter meanwhile.
    """
    before, after = _tensors(base), _tensors(merged)
    expected: dict[str, tuple[str, Step | None]] = {plan.output_name(name): (name, None) for name in before}
    layouts = StoredLayouts.of(plan, base, layout or {})
    steps = [layouts.stored_as(step) for step in plan.steps]
    expected |= {plan.output_name(step): (step.weight, step) for step in steps if step.spec.region is None}
    parts = _steps_on_parts(steps)
    dtype = _common_dtype(after)

    def judge(name: str) -> list[AuditedWeight]:
        base_name, step = expected[name]
        candidate = after.get(name)
        if candidate is None:
            return [AuditedWeight(name, Fate.of(step), Outcome.DIFFERENT, "is missing")]
        if base_name in parts:
            weights = _judge_parts(name, parts[base_name], before[base_name], candidate, dtype)
        else:
            weights = [_judge(name, step, before.get(base_name), candidate, dtype)]
        progress(candidate.entry.nbytes)
        return weights

    with ThreadPoolExecutor(block_copy.default_threads()) as pool:
        weights = [weight for found in pool.map(judge, expected) for weight in found]
    weights += [
        AuditedWeight(name, Fate.NONE, Outcome.DIFFERENT, "is in neither the base nor the adapters")
        for name in after
        if name not in expected
    ]
    outcomes = {weight.outcome for weight in weights}
    outcome = next(one for one in (Outcome.DIFFERENT, Outcome.UNDECIDED, Outcome.SAME) if one in outcomes)
    return Audit(outcome, tuple(weights))


def _steps_on_parts(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """The steps on parts of stored tensors, by the name of the tensor."""
    found: dict[str, list[Step]] = {}
    for step in steps:
        if step.spec.region is not None:
            found.setdefault(step.spec.stored_name, []).append(step)
    return found


def _judge_parts(
    name: str, steps: Sequence[Step], base: StoredTensor, candidate: StoredTensor, common_dtype: np.dtype[Any] | None
) -> list[AuditedWeight]:
    """Each part that a step changes, and the entries outside of them."""
    problem = _wrong_shape(None, base, candidate) or _wrong_dtype(base, candidate, common_dtype)
    if problem:
        return [AuditedWeight(name, Fate.CHANGED, Outcome.DIFFERENT, problem)]
    regions = [step.spec.region for step in steps if step.spec.region is not None]
    parts = [
        _judge(step.weight, step, base.part(region), candidate.part(region), common_dtype)
        for step, region in zip(steps, regions, strict=True)
    ]
    rest = judge_rest(name, regions, base, candidate)
    return [*parts, rest] if rest.elements else parts


def _tensors(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(shard, entry, quantised=checkpoint.quantised.get(name))
        for file, shard in checkpoint.shards.items()
        for name, entry in checkpoint.entries(file).items()
    }


def _common_dtype(tensors: Mapping[str, StoredTensor]) -> np.dtype[Any] | None:
    """The dtype of every float tensor; None where they have several."""
    dtypes = {tensor.dtype for tensor in tensors.values() if str(tensor.dtype) in FLOATS}
    return dtypes.pop() if len(dtypes) == 1 else None


def _judge(
    name: str,
    step: Step | None,
    base: StoredTensor | None,
    candidate: StoredTensor,
    common_dtype: np.dtype[Any] | None,
) -> AuditedWeight:
    problem = _wrong_shape(step, base, candidate) or _wrong_dtype(base, candidate, common_dtype)
    if problem:
        return AuditedWeight(name, Fate.of(step), Outcome.DIFFERENT, problem)
    if step is not None and not step.is_replacement:
        assert base is not None
        if step.spec.layout is Layout.UNKNOWN and step.terms:
            return judge_unknown_layout(name, step, base, candidate)
        return judge_changed(name, step, base, candidate)
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
