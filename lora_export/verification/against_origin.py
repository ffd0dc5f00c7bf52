"""A graph that takes adapters, without one, judged by the bits of the graph that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import OutputsByCase
from lora_export.verification.compare_outputs import bits_that_differ, error_of, named_as

AGAINST = "the base graph"  # the field `against` of a record, for a verdict without a PyTorch model

UNCHANGED = "its outputs are those of the graph that it was made from, bit for bit"

NODE_BY_NODE = (
    "its outputs are those of the graph that it was made from, bit for bit, where onnxruntime optimises neither; "
    "optimised, other nodes of the two are fused"
)

NOT_BY_FP64 = "whether that graph computes the model was not decided: its outputs are too coarse for a verdict in fp64"

NEAR = 0.1  # largest distance of two graphs that differ only in what onnxruntime fuses, relative to PyTorch's error


def judge_by_origin(
    cases: Sequence[parity.Case],
    undecided: parity.Verdict,
    candidate: OnnxRunner,
    origin: Path,
    run: Callable[[OnnxRunner], OutputsByCase],
) -> tuple[parity.Verdict, tuple[parity.Case, ...]] | None:
    """Judge a graph without an adapter by the graph that it was made from; None where the two differ.

    `undecided` is the verdict of `cases` in fp64. A base that rounds what it multiplies, to int8 or to half
    precision, can be too far from its model in fp64. Then only its own outputs can decide: the candidate must return
    their bits. Where onnxruntime fuses other nodes of the two graphs, they must return the same bits unoptimised, and
    optimised they may differ by a tenth of PyTorch's error. `run` runs a graph on the inputs of the proof.
    Raises InputRefused for an origin with other inputs or outputs.
    """
    own = run(candidate)
    if not candidate.takes_adapters or bits_that_differ(own, run(candidate)):
        return None
    before = _run_origin(OnnxRunner(origin, candidate.provider, timeout=candidate.timeout), run, own)
    note = UNCHANGED
    if difference := bits_that_differ(own, before):
        if not all(_is_near(case, own, before) for case in cases):
            return None
        note = f"{NODE_BY_NODE} ({difference[0]})"
        own = run(candidate.unoptimised())
        before = _run_origin(
            OnnxRunner(origin, candidate.provider, optimise=False, timeout=candidate.timeout), run, own
        )
        if bits_that_differ(own, before):
            return None
    judged = tuple(_beside_origin(case, own, before) for case in cases)
    notes = [note, NOT_BY_FP64, *undecided.notes]
    return parity.judge(judged, dtype=undecided.dtype, sensitivity=undecided.sensitivity, notes=notes), judged


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
