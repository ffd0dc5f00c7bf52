"""Trace one case through candidate and PyTorch, module by module, to the first that differs.

A graph's inner values become outputs of a copy in memory; PyTorch's are recorded by hooks. Both run whole, and each
module is compared. The output of a module is then compared with the output that its weights and adapters should give
for its *own* input, so that faults before it do not matter (`root_cause`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lora_export.errors import EscapedLines, InputRefused, LoraExportError, escaped_lines, first_line, first_of
from lora_export.graph.cache_names import IDS, LOGITS
from lora_export.isolation.limits import GIB
from lora_export.models.pt2.program import Program
from lora_export.runtime.kv_cache import CacheRunner
from lora_export.runtime.memory import available_memory
from lora_export.runtime.runner import Arrays
from lora_export.runtime.several_graphs import SeveralGraphs
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner
from lora_export.verification import parity
from lora_export.verification.diagnose.diagnosis import Diagnosis
from lora_export.verification.diagnose.first_difference import (
    MODULE_FACTOR,
    ComparedCall,
    FirstDifference,
    compare_calls,
    find_first_difference,
)
from lora_export.verification.diagnose.module_calls import ModuleCall, observing_calls
from lora_export.verification.diagnose.traced_candidate import (
    DiagnosisCase,
    TracedCandidate,
    TracedGraph,
    outputs_renamed,
    trace,
)
from lora_export.verification.module_copies import converted_copy, fp64_bytes, to_double
from lora_export.verification.references import Diagnosed
from lora_export.verification.references.proof_weights import ProofWeights

MAX_HELD_NUMBERS = 1 << 25  # inputs and outputs of modules that each run holds at a time


def diagnose(case: DiagnosisCase, *, every: bool = False) -> Diagnosis:
    """Find the first module of a candidate whose output differs in this case, and why.

    Runs the candidate, PyTorch, the base and the reference once more; several times where the values of all modules
    do not fit into memory. Then it stops at the first difference, unless `every` module is to be compared. A decoder
    with a cache is traced at the case's prompt, with an empty cache. Raises InputRefused and RuntimeRefused where
    nothing can be compared.
    """
    if isinstance(case.candidate, SeveralGraphs):
        graph = first_wrong_graph(case.outputs, case.candidate)
        first = f"The first graph whose outputs differ: {graph}" if graph else "No graph's outputs differ"
        raise InputRefused(f"those of a model's three graphs are not traced. {first}")
    if not isinstance(case.candidate, CacheRunner):
        return _diagnose(case, every=every)
    at_prompt = _at_prompt(case, case.candidate)
    found = _diagnose(at_prompt, every=every)
    note = f"compared at the prompt, {at_prompt.inputs[IDS].shape[1]} tokens, with an empty cache"
    if found.first is None and _differs(case.outputs) and not _differs(at_prompt.outputs):
        note += ": the fault is where the cache is written, or read again"
    return replace(found, why=escaped_lines(found.why, note))


def _at_prompt(case: DiagnosisCase, candidate: CacheRunner) -> DiagnosisCase:
    """The first run of a case that was run token by token, as a case of its own."""
    inputs = candidate.prompt(case.inputs)
    if not inputs[IDS].size:
        raise InputRefused("every row of the case begins with padding")
    reference = case.reference.run(inputs)
    outputs = replace(
        case.outputs,
        reference=reference,
        deployed=case.deployed.run(inputs),
        candidate=outputs_renamed(candidate.run_prompt(inputs), reference),
        base=None,
        scaled=None,
        attached=None,
    )
    return replace(case, inputs=inputs, outputs=outputs)


def first_wrong_graph(case: parity.Case, candidate: SeveralGraphs) -> str:
    """The file of the first graph of a model whose outputs differ in a case; empty where none does."""
    for file, (output, positions) in candidate.outputs_by_graph(case.reference[LOGITS].shape[1]).items():
        own: dict[str, Any] = {
            role: {output: values[output][:, positions]} for role, values in case.by_role.items() if output in values
        }
        if "candidate" in own and _differs(replace(case, unjudged=None, **own)):
            return file
    return ""


def _differs(case: parity.Case) -> bool:
    return parity.judge([case]).outcome is parity.Outcome.DIFFERENT


def _diagnose(case: DiagnosisCase, *, every: bool) -> Diagnosis:
    traced = trace(case)
    sizes = _sizes(case)
    calls = _comparable_calls(traced, sizes)
    if not calls:
        raise InputRefused("no module that PyTorch calls was found in the candidate")
    compared: dict[ModuleCall, ComparedCall] = {}
    first: FirstDifference | None = None
    for group in _groups(calls, sizes):
        values = traced.run(case.inputs, group)
        compared |= compare_calls(case, traced, values)
        if first is None:
            first = find_first_difference(case, traced, compared, values)
        if first is not None and not every:
            break
    if not compared:
        raise InputRefused("no module of the candidate gave values that PyTorch's could be compared with")
    errors = tuple(figures.layer for figures in compared.values())
    count = f"{len({call.weight for call in compared})} of {len(case.base_weights)} modules were compared"
    if first is None:
        return Diagnosis(None, f"{_why_none_differs(case, traced, calls)}; {count}", errors)
    return Diagnosis(str(first.call), EscapedLines(f"{escaped_lines(first.why)}; {count}"), errors)


def _sizes(case: DiagnosisCase) -> dict[ModuleCall, int]:
    """The numbers in the input and output of each call, in the order in which PyTorch makes them."""
    sizes: dict[ModuleCall, int] = {}

    def on_call(call: ModuleCall, x: Tensor | None, y: Tensor) -> None:
        sizes[call] = y.numel() + (0 if x is None else x.numel())

    with observing_calls(case.deployed.module, case.base_weights, on_call):
        case.deployed.run(case.inputs)
    return sizes


def _comparable_calls(traced: TracedCandidate, sizes: Mapping[ModuleCall, int]) -> list[ModuleCall]:
    """The calls of PyTorch that correspond to one of the candidate.

    A module that the candidate calls more or less often than PyTorch is left out: its calls have no counterparts.
    """
    if not traced.calls:
        return list(sizes)
    wanted = set(traced.calls)
    in_candidate = Counter(call.weight for call in traced.calls)
    in_pytorch = Counter(call.weight for call in sizes)
    return [call for call in sizes if call in wanted and in_candidate[call.weight] == in_pytorch[call.weight]]


def _groups(calls: Sequence[ModuleCall], sizes: Mapping[ModuleCall, int]) -> Iterator[list[ModuleCall]]:
    """The calls in groups whose values fit into memory."""
    group: list[ModuleCall] = []
    total = 0
    for call in calls:
        if group and total + sizes[call] > MAX_HELD_NUMBERS:
            yield group
            group, total = [], 0
        group.append(call)
        total += sizes[call]
    yield group


def _why_none_differs(case: DiagnosisCase, traced: TracedCandidate, calls: Sequence[ModuleCall]) -> str:
    """Why no module of a candidate differs, whatever the verdict."""
    verdict = parity.judge([case.outputs])
    if verdict.outcome is not parity.Outcome.DIFFERENT:
        return "every module that was compared is within its gate"
    if isinstance(traced, TracedGraph):
        again = outputs_renamed(traced.outputs(case.inputs), case.outputs.candidate)
        if not _differs(replace(case.outputs, candidate=again)):
            return (
                "with its inner values as outputs, the graph agrees: onnxruntime fuses and reorders less then, so the "
                "difference comes from its optimisations"
            )
    faulty = (each for each in verdict.comparisons if each.figures or each.reasons)
    limits = [each.figures.limit_used if each.figures else math.inf for each in faulty]
    if max(limits, default=math.inf) <= MODULE_FACTOR:
        return "the difference is small and no module stands out: it may grow from one module to the next"
    return f"every module that was compared agrees: the fault is after {calls[-1]}, or outside these modules"


# What ends a diagnosis without one: our errors, and those of PyTorch and NumPy for an unusual model.
CANNOT_FOLLOW = (LoraExportError, RuntimeError, ValueError, MemoryError)


def diagnose_module(
    weights: ProofWeights,
    deployed: Callable[[], ModuleRunner],
    case: parity.Case,
    inputs: Arrays,
    *,
    every: bool,
) -> Diagnosed:
    """Compare the modules of a candidate with PyTorch's in one case. Returns notes, too; raises nothing.

    `deployed` returns the runner of PyTorch as deployed.
    """
    candidate, attached, base = weights.candidate, weights.attached, weights.base.module
    watched = [base, *([candidate.module] if isinstance(candidate, ModuleRunner) else [])]
    unseen = [name for module in watched if isinstance(module, Program) for name in module.unobserved_weights]
    if unseen:
        return None, [
            f"modules were not compared: weights of the .pt2 are multiplied by operators that belong to no layer: "
            f"{first_of(unseen, 1)}"
        ]
    copies = 0 if weights.is_large else 2 if attached.rounding else 1
    needed = copies * fp64_bytes(attached.module)
    if (available := available_memory()) is not None and needed > available:
        gib = f"{needed / GIB:.1f} GiB of memory, and {available / GIB:.1f} GiB are available"
        return None, [f"modules were not compared: this needs {gib}"]
    try:
        peer, wide = deployed(), attached  # the weights of a large model are widened where they are used
        if not weights.is_large:
            wide = replace(wide, module=converted_copy(wide.module, to_double))
        unrounded = Fp64Runner(wide.module)
        reference = Fp64Runner(wide.ready or wide.rounded_module()) if wide.rounding else unrounded
        keep_replaced = attached.has_pairs
        made = DiagnosisCase(
            candidate, reference, unrounded, peer, base, weights.changes, inputs, case, keep_replaced=keep_replaced
        )
        return diagnose(made, every=every), []
    except CANNOT_FOLLOW as error:
        return None, [f"modules could not be compared: {first_line(error)}"]
