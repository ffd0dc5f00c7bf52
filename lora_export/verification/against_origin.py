"""A graph that takes adapters, without one, judged by the bits of the graph that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Runner
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import OutputsByCase
from lora_export.verification.compare_outputs import bits_that_differ, error_of, named_as

if TYPE_CHECKING:
    from lora_export.verification.proof import Proof

AGAINST = "the base graph"  # the field `against` of a record, for a verdict without a PyTorch model

UNCHANGED = "its outputs are those of the graph that it was made from, bit for bit"

NODE_BY_NODE = (
    "its outputs are those of the graph that it was made from, bit for bit, where onnxruntime optimises neither; "
    "optimised, other nodes of the two are fused"
)

NOT_BY_FP64 = "whether that graph computes the model was not decided: its outputs are too coarse for a verdict in fp64"

NEAR = 0.1  # largest distance of two graphs that differ only in what onnxruntime fuses, relative to PyTorch's error


def prove_by_origin(proof: Proof, candidate: OnnxRunner, origin: Path, as_run: Callable[[OnnxRunner], Runner]) -> Proof:
    """Decide an undecided proof of a graph without an adapter by the graph that it was made from.

    A base that rounds what it multiplies, to int8 or to half precision, can be too far from its model in fp64. Then
    only its own outputs can decide: the candidate must return their bits. Where onnxruntime fuses other nodes of the
    two graphs, they must return the same bits unoptimised, and optimised they may differ by a tenth of PyTorch's error.
    Returns `proof` where the two graphs differ. `as_run` is that of the proof's references. Raises InputRefused for
    an origin with other inputs or outputs.
    """

    def run(runner: OnnxRunner) -> OutputsByCase:
        return {name: as_run(runner).run(arrays) for name, arrays in proof.inputs.items()}

    def run_origin(like: OutputsByCase, *, optimise: bool) -> OutputsByCase:
        made = OnnxRunner(origin, candidate.provider, optimise=optimise, timeout=candidate.timeout)
        return _run_origin(made, run, like)

    own = run(candidate)
    if not candidate.takes_adapters or bits_that_differ(own, run(candidate)):
        return proof
    before, note = run_origin(own, optimise=True), UNCHANGED
    if difference := bits_that_differ(own, before):
        if not all(_is_near(case, own, before) for case in proof.cases):
            return proof
        note = f"{NODE_BY_NODE} ({difference[0]})"
        own = run(candidate.unoptimised())
        before = run_origin(own, optimise=False)
        if bits_that_differ(own, before):
            return proof
    cases, undecided = tuple(_beside_origin(case, own, before) for case in proof.cases), proof.verdict
    notes = [note, NOT_BY_FP64, *undecided.notes]
    verdict = parity.judge(cases, dtype=undecided.dtype, sensitivity=undecided.sensitivity, notes=notes)
    return replace(proof, verdict=verdict, about={**proof.about, "against": AGAINST}, cases=cases)


def _run_origin(origin: OnnxRunner, run: Callable[[OnnxRunner], OutputsByCase], like: OutputsByCase) -> OutputsByCase:
    refused = f"{origin.path} is not what the candidate was made from:"
    try:
        outputs = run(origin)
    except RuntimeRefused as error:
        raise InputRefused(f"{refused} {error}") from error
    if any(outputs[case].keys() != own.keys() for case, own in like.items()):
        raise InputRefused(f"{refused} it has other outputs")
    return outputs


def _beside_origin(case: parity.Case, own: OutputsByCase, before: OutputsByCase) -> parity.Case:
    candidate, origin = (named_as(case.reference, outputs[case.name]) for outputs in (own, before))
    return replace(case, candidate=candidate, reference=origin, deployed=origin, peer=AGAINST)


def _is_near(case: parity.Case, own: OutputsByCase, before: OutputsByCase) -> bool:
    """Whether the outputs of two graphs differ by less than a tenth of PyTorch's error."""
    one, other = (named_as(case.reference, outputs[case.name]) for outputs in (own, before))
    return all(
        parity.rms(one[name].astype(np.float64) - other[name]) <= NEAR * error_of(truth, case.deployed[name])
        for name, truth in case.reference.items()
        if one[name].dtype.kind == "f"
    )
