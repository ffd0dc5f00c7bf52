"""The flow that every proof follows: the same seeded inputs through reference, PyTorch and candidate."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_export import layers, plan
from lora_export.errors import InputRefused, LoraExportError, RuntimeRefused
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.models.pt2.program import Program
from lora_export.provenance import adapter_records
from lora_export.runtime import torch_runners
from lora_export.runtime.kv_cache import CacheRunner, with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Placement, Runner
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import (
    aligned,
    as_shipped,
    ask,
    asked_again,
    never_varied,
    sensitivity_of,
)
from lora_export.verification.compare_outputs import (
    before_first_token,
    by_the_farther,
    differs_in_precision_alone,
    from_first_token,
)
from lora_export.verification.derived_proofs import prove_by_origin, prove_mixed
from lora_export.verification.diagnose.localize import diagnose
from lora_export.verification.diagnose.root_cause import Diagnosis
from lora_export.verification.diagnose.watch_candidate import Suspect
from lora_export.verification.inputs.model_inputs import case_inputs, notes_on_sizes
from lora_export.verification.inputs.row_coverage import RowCoverage
from lora_export.verification.proof import Proof
from lora_export.verification.references import cached_outputs, quantised_weights
from lora_export.verification.references.pytorch import (
    Sides,
    as_deployed,
    copied,
    double,
    held_by,
    merged,
    name_of,
    narrowed,
    precision,
    rounded_weights,
    settled,
    shared,
    with_adapters,
)

Note = Callable[[str], None]
MIXED = "mixed batches"
MERGED = "PyTorch's own error is that of the adapters merged, where it is the larger one: they outweigh the weights"
HALF = "the candidate is in half precision: --dtype float16 puts it beside the model in that"
ORIGIN = "the graph that it was made from would decide whether it is that still (--base BASE.onnx beside --model)"
# What ends a diagnosis without one: ours, and what PyTorch and NumPy raise where somebody's model is not as others.
CANNOT_FOLLOW = (LoraExportError, RuntimeError, ValueError, MemoryError)


def prove(
    candidate: Runner,
    model: Model,
    adapters: Sequence[Adapter],
    *,
    strengths: Sequence[float] | None = None,
    seed: int = 0,
    user_inputs: Path | None = None,
    device: str = "cpu",
    atol: float | None = None,
    rtol: float | None = None,
    cache: Path | None = None,
    trace: bool = False,
    origin: Path | None = None,
    step: Note = lambda _: None,
    say: Note = lambda _: None,
) -> Proof:
    """Judge a candidate against the model with its adapters attached (numerics: the verdict).

    Runs reference, deployed model, base, reference with scale × 1.1 and candidate on three sets of seeded inputs
    of different shapes, and on `user_inputs` (.npz) too. `device` is where PyTorch runs as deployed.
    `cache` is a folder that keeps what the reference said; `say` hears where that could not be used.
    `origin` is the quantised graph that an ONNX candidate was made of: into whose weights the adapters were merged, or
    which decides by its bits what fp64 cannot decide of a candidate without an adapter.
    A candidate that is different is followed module by module to where that begins; with `trace`, any is.
    Raises EnvironmentLacking when the asked provider did not do the work, and RuntimeRefused when
    the candidate cannot be run at all.
    """
    placement: Placement | None = getattr(candidate, "placement", None)
    if placement is not None:
        placement.require_provider()
    changes = plan.make(adapters, layers.specs(model.module), strengths=strengths) if adapters else None
    inputs = case_inputs(model, candidate, seed=seed, user_inputs=user_inputs, adapters=adapters)
    held = held_by(candidate, model, changes, origin, inputs)
    judged = quantised_weights.with_dequantised_weights(model, held)
    module = with_adapters(shared(judged.module), adapters, strengths)
    rounded, chosen = rounded_weights(candidate, module, held) if adapters else ({}, {})
    has_pairs, dtype = any(adapter.pairs for adapter in adapters), precision(candidate, model.module)
    asked = ask(candidate, model, inputs, seed, step)
    if len(asked.refusals) == len(inputs):
        hint = f". {HALF[0].upper()}{HALF[1:]}" if "expected: (tensor(float16))" in asked.refusals[0] else ""
        raise RuntimeRefused(asked.refusals[0] + hint)
    stayed: set[str] = set()
    with contextlib.ExitStack() as stack:
        # Its own precision and fp64 by turns: the model, in the wider one, is all that is held beside the candidate.
        sides = Sides(module, rounded, chosen, stack, stayed, has_pairs=has_pairs)
        deployed = ModuleRunner(narrowed(as_deployed(sides, held, device), candidate, model), device)
        step("PyTorch")
        looked_up = RowCoverage(deployed.module, model, adapters)
        own = {name: deployed.run(arrays) for name, arrays in inputs.items()}
        doubts, notes = looked_up.doubts, looked_up.notes  # before other inputs are tried
        sensitivity = list(sensitivity_of(asked, deployed))
        dtypes = {name: kind for name, kind in rounded.items() if isinstance(kind, str)}
        key = None
        if cache is not None and len(dtypes) == len(rounded):
            key = cached_outputs.cache_key(judged, adapters, strengths, inputs, dtypes, deployed.module)
        cached = cached_outputs.CachedOutputs(cache, key, stayed, say)
        said: dict[str, dict[str, Arrays]] = {}
        for role in sides.roles if adapters else ("reference",):
            step(f"the {role}")
            side = sides.of(role)
            said[role] = {name: cached.get(name, role, side, arrays) for name, arrays in inputs.items()}
        cached.save()
    cases = []
    for name, arrays in inputs.items():
        answer, truth = asked.answers.get(name, {}), said["reference"][name]
        wrong: dict[str, Any] = {role: said[role][name] for role in said if role != "reference"}
        case = parity.Case(
            name=name,
            inputs_summary=", ".join(f"{key} {value.dtype} {list(value.shape)}" for key, value in arrays.items()),
            reference=truth,
            deployed=own[name],
            candidate=aligned(answer, truth, candidate, deployed),
            **wrong,
        )
        cases.append(from_first_token(case, arrays))
    padded = any(before_first_token(arrays).any() for arrays in inputs.values())

    def judge(cases: Sequence[parity.Case], *more: str) -> parity.Verdict:
        again = [] if asked.again is None else list(asked_again(asked.again, cases[0], inputs[cases[0].name]))
        return parity.judge(
            [*cases, *again],
            dtype=name_of(dtype),
            sensitivity=sensitivity,
            atol=atol,
            rtol=rtol,
            notes=[
                *asked.refusals,
                *_about_reference(stayed),
                *model.notes,
                *notes_on_sizes(candidate, model),
                *_about_cache(candidate),
                *never_varied(model, sensitivity, asked.refusals),
                *(f"asked again, the candidate gives other bits: {case.name}" for case in again),
                *notes,
                *([HALF] if dtype is torch.float32 and any(map(_is_half, cases)) else []),
                *(["what stands before a row's first token was not judged: it attends to nothing"] if padded else []),
                *quantised_weights.notes_on(held),
                *more,
            ],
            doubts=doubts,
            faults=quantised_weights.merge_faults(held),
        )

    verdict = judge(cases)
    is_plain = not rounded and not held and dtype is torch.float32
    if changes is not None and has_pairs and is_plain and differs_in_precision_alone(verdict):
        step("PyTorch, the adapters merged")
        peer = ModuleRunner(merged(module, changes).to(device), device)
        others = [
            from_first_token(replace(case, deployed=peer.run(inputs[case.name])), inputs[case.name]) for case in cases
        ]
        measured = by_the_farther(cases, others)
        second = judge(measured, MERGED)
        if second.outcome is not parity.Outcome.DIFFERENT:
            verdict, cases = second, measured
    if all(there.figures for there in verdict.comparisons):
        step("as shipped")
        verdict = replace(verdict, notes=(*verdict.notes, *as_shipped(candidate, deployed, cases, inputs)))
    about = {
        **torch_runners.describe_environment(),
        "model": {"source": model.source, "sha256": model.fingerprint()},
        "adapters": adapter_records(adapters, strengths or (1.0,) * len(adapters)),
        "seed": seed,
        "tolerance": None if atol is None and rtol is None else {"atol": atol or 0.0, "rtol": rtol or 0.0},
        "inputs": {name: {key: value.shape for key, value in arrays.items()} for name, arrays in inputs.items()},
    }
    diagnosis = None
    answered = any(case.candidate for case in cases)  # with some output, whether it is the model's or not
    if answered and (trace or verdict.outcome is parity.Outcome.DIFFERENT):
        step("looking for where it differs")
        case = _most_telling(cases, verdict, inputs)
        attached = Fp64Runner(copied(module, double), stayed)
        reference = Fp64Runner(settled(attached.module, rounded, chosen), stayed) if rounded else attached
        everybody = candidate, reference, attached, deployed
        suspect = Suspect(*everybody, judged.module, changes, inputs[case.name], case, keep_replaced=has_pairs)
        diagnosis, note = _diagnosed(suspect, every=trace)
        verdict = replace(verdict, notes=(*verdict.notes, *note))
    proof = Proof(verdict, placement, about, inputs, tuple(cases), diagnosis=diagnosis)
    if adapters or not held or verdict.outcome is not parity.Outcome.UNDECIDED:
        return proof
    return _by_origin(proof, candidate, origin, step)


def _by_origin(proof: Proof, candidate: Runner, origin: Path | None, step: Note) -> Proof:
    """The proof of a quantised graph without an adapter that fp64 could not decide."""
    graph = candidate.inner if isinstance(candidate, CacheRunner) else candidate
    if not isinstance(graph, OnnxRunner) or not graph.takes_adapters:
        return proof
    if origin is None:
        return replace(proof, verdict=replace(proof.verdict, notes=(*proof.verdict.notes, ORIGIN)))

    def ask(runner: OnnxRunner) -> dict[str, Arrays]:
        return {name: with_cache(runner).run(arrays) for name, arrays in proof.inputs.items()}

    step("the graph that it was made from")
    return prove_by_origin(proof, graph, origin, ask)


def prove_rows(
    candidate: OnnxRunner,
    model: Model,
    adapters: Sequence[Adapter],
    *,
    strengths: Sequence[float] | None = None,
    step: Note = lambda _: None,
    **how: Any,
) -> Proof:
    """Judge a graph whose rows choose their adapter: the base, each adapter alone, and all of them in one batch.

    `adapters` are those of the graph, in the order of their ids; `how` is as in `prove`. Raises InputRefused
    where the graph says that it holds others, or another number of them.
    """
    names = candidate.adapters_by_row
    if names is not None and len(names) != len(adapters):
        raise InputRefused(
            f"{candidate.path} holds {len(names)} adapters ({', '.join(names)}) and {len(adapters)} were given: give "
            "them in that order, or prove one by --adapter-id"
        )
    roles = ["the base", *(adapter.name for adapter in adapters)]
    alone = []
    for number, role in enumerate(roles):
        runner = with_cache(candidate.with_rows([number]))
        mine: Sequence[Adapter] = adapters[number - 1 : number] if number else ()
        own = strengths[number - 1 : number] if strengths and number else None
        alone.append(prove(runner, model, mine, strengths=own, step=functools.partial(_told_of, role, step), **how))
    ids = [*range(1, len(roles)), 0]
    step("mixed batches")
    mixed = prove_mixed(with_cache(candidate.with_rows(ids)), alone, ids)
    verdicts = dict(zip(roles, (proof.verdict for proof in alone), strict=True))
    verdict = parity.combine(verdicts | {MIXED: mixed.verdict})
    about = {**alone[-1].about, "adapters": [told for proof in alone for told in proof.about["adapters"]]}
    diagnosis = next((proof.diagnosis for proof in alone if proof.diagnosis), None)
    return Proof(verdict, alone[0].placement, about, alone[0].inputs, alone[0].cases, diagnosis=diagnosis)


def _told_of(role: str, step: Note, what: str) -> None:
    step(f"{role}, {what}")


def _most_telling(cases: Sequence[parity.Case], verdict: parity.Verdict, inputs: Mapping[str, Arrays]) -> parity.Case:
    """The smallest of the cases that the candidate answered and that are different; of all, where none of them is."""
    answered = [case for case in cases if case.candidate]
    wrong = {reason.case for reason in verdict.reasons if reason.outcome is parity.Outcome.DIFFERENT}
    telling = [case for case in answered if case.name in wrong]
    return min(telling or answered, key=lambda case: sum(value.size for value in inputs[case.name].values()))


def _diagnosed(suspect: Suspect, *, every: bool) -> tuple[Diagnosis | None, list[str]]:
    """What was found, and what a reader must know of it. A verdict stands, whatever becomes of this."""
    watched = [suspect.base, *([suspect.candidate.module] if isinstance(suspect.candidate, ModuleRunner) else [])]
    unseen = [name for module in watched if isinstance(module, Program) for name in module.unobserved_weights]
    if unseen:
        return None, [
            f"where it differs was not looked for: {unseen[0]} and {len(unseen) - 1} more weights of a .pt2 are "
            "multiplied by operators that are no layer's"
        ]
    try:
        return diagnose(suspect, every=every), []
    except CANNOT_FOLLOW as error:
        return None, [f"where it differs was looked for in vain: {(str(error) or repr(error)).splitlines()[0]}"]


def _is_half(case: parity.Case) -> bool:
    there = case.candidate.items()
    return any(value.dtype == np.float16 and name in case.deployed for name, value in there)


def _about_cache(candidate: Runner) -> list[str]:
    return candidate.notes if isinstance(candidate, CacheRunner) else []


def _about_reference(stayed: Collection[str]) -> list[str]:
    if not stayed:
        return ["the reference ran in fp64 throughout"]
    return [f"the reference ran in fp64, but for: {', '.join(sorted(stayed))}"]
