"""Prove a graph before it is published; where its adapters are swapped, without any, with each, and mixed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lora_export import provenance
from lora_export.api.onnx_request import OnnxProofs, OnnxRequest, adapter_file
from lora_export.api.publish import recorded_verdict, require_same, stage_of_proof
from lora_export.graph.onnx_file.writing import append_metadata, in_memory
from lora_export.runtime.encoder_decoder import EncoderDecoderRunner
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.ort_session import InMemoryGraph
from lora_export.verification.candidate_outputs import OutputsByCase
from lora_export.verification.compare_outputs import bits_that_differ
from lora_export.verification.parity import Outcome
from lora_export.verification.proof import Proof, prove, prove_by_origin
from lora_export.verification.references import References
from lora_export.verification.row_proofs import BASE, MIXED, SEVERAL, prove_mixed, prove_several

Graphs = OnnxRunner | EncoderDecoderRunner


def base_outputs(programs: Sequence[ir.Model], references: References, options: OnnxRequest) -> OutputsByCase:
    """The outputs of the graphs before anything is put into them; nothing where no proof compares them."""
    if not options.verify or not options.is_swapped:
        return {}
    options.stage("running the base")
    graphs = [
        OnnxRunner(InMemoryGraph(BASE, *in_memory(program)), options.provider, timeout=options.timeout)
        for program in programs
    ]
    return _outputs(EncoderDecoderRunner.of(Path(BASE), graphs) if options.has_encoder else graphs[0], references)


def _opened(path: Path, options: OnnxRequest) -> Graphs:
    if options.has_encoder:
        return EncoderDecoderRunner.open(path.parent, options.provider, timeout=options.timeout)
    return OnnxRunner(path, options.provider, timeout=options.timeout)


def prove_all(
    path: Path, references: References, options: OnnxRequest, before: OutputsByCase, *, existing: Path | None = None
) -> OnnxProofs:
    """Prove the file; that of an encoder-decoder with the two beside it.

    `before` has the outputs of the graph without adapters, `existing` is the graph that it was.

    Raises Different or Undecided unless every proof is `same`.
    """
    runner = _opened(path, options)
    if not options.is_swapped:
        own = references.with_adapters(options.adapters, options.weights)
        return OnnxProofs(require_same(_prove(runner, own, options, "")))
    without, *runners = _by_adapter(runner, options)
    whole = _prove_base(without, references.with_adapters(()), options, existing)
    unlike = bits_that_differ(before, _outputs(without, references))
    if unlike:
        options.on_message(
            "note: without an adapter the graph is the base, but not to the last bit: onnxruntime computes it in "
            f"another order ({unlike[0]})"
        )
    adapters = {}
    for own_runner, adapter, strength in zip(runners, options.adapters, options.strengths, strict=True):
        own = references.with_adapters([adapter], [strength])
        adapters[adapter.name] = require_same(_prove(own_runner, own, options, adapter.name), adapter.name)
    several = _prove_several(runner, references, options) if options.per_row > 1 else None
    proofs = [whole, *adapters.values()]
    mixed = _prove_mixed(runner, references, options, proofs, several) if options.lora == "rows" else None
    return OnnxProofs(whole, adapters, mixed, unlike, several)


def _prove(runner: Graphs, references: References, options: OnnxRequest, what: str) -> Proof:
    return prove(references.as_run(runner), references, step=stage_of_proof(options.stage, what))


def _prove_base(runner: Graphs, references: References, options: OnnxRequest, existing: Path | None) -> Proof:
    """Prove the graph without an adapter; where fp64 cannot decide it, against the graph that it was made from."""
    proof = _prove(runner, references, options, BASE)
    if proof.verdict.outcome is Outcome.UNDECIDED and existing is not None and isinstance(runner, OnnxRunner):
        options.stage("verifying the base, the graph that it was made from")
        proof = prove_by_origin(proof, runner, existing, references.as_run)
    return require_same(proof, BASE)


def _prove_mixed(
    runner: Graphs, references: References, options: OnnxRequest, proofs: Sequence[Proof], several: Proof | None
) -> Proof:
    """Prove batches that contain every adapter and the base."""
    options.stage(f"verifying {MIXED}")
    return require_same(prove_mixed(runner, references, proofs, several), MIXED)


def _prove_several(runner: Graphs, references: References, options: OnnxRequest) -> Proof:
    """Prove batches whose rows have several adapters."""
    own = references.with_adapters(options.adapters, options.strengths)
    return require_same(prove_several(runner, own, step=stage_of_proof(options.stage, SEVERAL)), SEVERAL)


def _by_adapter(runner: Graphs, options: OnnxRequest) -> list[Graphs]:
    """The graph without an adapter, and with each."""
    if options.lora == "rows":
        return [runner.with_rows([number]) for number in range(len(options.adapters) + 1)]
    if isinstance(runner, EncoderDecoderRunner):
        return [runner, *(runner.with_adapter(adapter.name) for adapter in options.adapters)]
    files = [runner.path.with_name(adapter_file(adapter, options)) for adapter in options.adapters]
    return [runner, *(runner.with_adapter(file) for file in files)]


def _outputs(runner: Graphs, references: References) -> OutputsByCase:
    graph = references.as_run(runner)
    return {case: graph.run(arrays) for case, arrays in references.inputs(graph).cases.items()}


def record_in(path: Path, record: dict[str, Any], proofs: OnnxProofs | None) -> None:
    """Store in the file where it comes from and what was proven of it."""
    append_metadata(path, {provenance.KEY: json.dumps(record | {"verdict": _summary(proofs)})})


def _summary(proofs: OnnxProofs | None) -> dict[str, Any]:
    verdict = recorded_verdict(proofs.whole if proofs else None)
    if proofs and proofs.unlike_base is not None:
        verdict["bits_of_base"] = not proofs.unlike_base
        verdict["adapters"] = {name: recorded_verdict(proof) for name, proof in proofs.adapters.items()}
    if proofs and proofs.mixed:
        verdict["mixed"] = recorded_verdict(proofs.mixed)
    if proofs and proofs.several:
        verdict["several"] = recorded_verdict(proofs.several)
    return verdict
