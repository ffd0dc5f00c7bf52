"""What a candidate computes, compared with PyTorch and its adapters attached."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.api.load import load_adapters, resolve_model
from lora_export.api.memory_needs import require_memory_to_verify
from lora_export.api.verify_record import VerifyRequest, recorded_explanation
from lora_export.artifacts.artifact import ArtifactKind, artifact_kind, open_artifact
from lora_export.artifacts.files import GRAPH_FILES, hashes_of, is_encoder_decoder_folder
from lora_export.callbacks import in_stages
from lora_export.errors import (
    Different,
    EnvironmentLacking,
    InputRefused,
    Undecided,
)
from lora_export.formats.row_adapters import read_row_adapters
from lora_export.plan.own_heads import head_names, without_own_head
from lora_export.runtime.memory import release_memory
from lora_export.storage import input_files
from lora_export.verification.companion_files import compare_files
from lora_export.verification.loaded_files import LoadedFiles, files_of_graphs, loaded_files
from lora_export.weights.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from lora_export.lora import Adapter
    from lora_export.runtime.runner import Runner
    from lora_export.verification.against_pytorch import PyTorchReferences
    from lora_export.verification.proof import Proof


def judge_outputs(request: VerifyRequest) -> Proof:
    """Prove the candidate against the PyTorch model. Its `error` is what ended the proof before it had figures."""
    from lora_export.api.adapted_model import adapted_model
    from lora_export.api.publish import proof_without_figures, require_provider
    from lora_export.runtime.open_artifact import open_candidate
    from lora_export.verification.against_pytorch import PyTorchReferences
    from lora_export.verification.module_copies import fp64_bytes

    candidate, model, origin, on_message = request.candidate, request.model, request.base, request.on_message
    assert model is not None
    if not candidate.exists():
        raise InputRefused(f"there is no candidate at {candidate}")
    if origin is not None:
        input_files.must_exist(origin, "base graph")
    stage = in_stages(request.on_progress)
    runner = None
    hashes: dict[str, str] = {}
    facts: dict[str, Any] = {}
    try:
        require_provider(request.provider)
        loaded = load_adapters(request.adapters)
        printed = {note: None for adapter in loaded for note in adapter.notes}
        for note in printed:
            on_message(f"note: {note}")
        require_memory_to_verify(model, candidate, request.dtype)
        stage("loading the model")
        has_heads = _has_own_heads(candidate, loaded)
        taken = [without_own_head(adapter) for adapter in loaded] if has_heads else loaded
        base = resolve_model(model, taken, dtype=request.dtype, inputs=request.inputs, streamed=True)
        adapted = adapted_model(base, loaded, request.weights, request, on_message)
        for note in (note for adapter in adapted.adapters for note in adapter.notes if note not in printed):
            on_message(f"note: {note}")
        base = adapted.model
        stage("loading the candidate")
        with input_files.unchanged(candidate, lambda: [*open_artifact(candidate).files.values()]):
            runner = open_candidate(
                candidate,
                base,
                provider=request.provider,
                onnx_adapter=request.onnx_adapter,
                adapter_id=request.adapter_id,
                timeout=request.timeout,
            )
            takes: Collection[str] = runner.axes or getattr(runner, "input_names", ())
            base = base.taking(takes).without_token_types(takes)
            release_memory(of=fp64_bytes(base.module))
            references = PyTorchReferences(
                base,
                seed=request.seed or 0,
                user_inputs=request.inputs,
                device=request.provider,
                cache=request.cache,
                origin=origin,
                fixed=request.fixed,
                has_own_heads=has_heads,
                say=on_message,
            )
            proof = _prove(runner, references, adapted.adapters, adapted.strengths, request, stage)
            files = _files_in(candidate) if candidate.is_dir() else None
            found = [compare_files(Path(model), candidate, loaded)] if isinstance(model, str | Path) else []
            for each in (*found, *([files.others] if files else [])):
                proof = proof.with_files(each)
            stage("hashing the candidate")
            hashes = hashes_of(open_artifact(candidate).files if files is None else files.judged)
        if origin is not None:
            facts["base"] = {"path": str(origin), "sha256": open_artifact(origin).hashes}
    except (Different, Undecided, EnvironmentLacking) as ended:
        proof = proof_without_figures(ended, getattr(runner, "placement", None))
    else:
        fingerprint = str(proof.about["model"].get("sha256", "")) if "model" in proof.about else ""
        weights_from = origin or (Path(model) if isinstance(model, str | Path) else None)
        recorded = recorded_explanation(proof.verdict, request, loaded, weights_from, fingerprint=fingerprint)
        proof = replace(proof, verdict=replace(proof.verdict, recorded=recorded))
    about = {"candidate": {"path": str(candidate), "sha256": hashes}, **facts, **request.settings, **proof.about}
    return replace(proof, about=about)


def _prove(
    runner: Runner,
    references: PyTorchReferences,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    request: VerifyRequest,
    stage: Callable[[str], None],
) -> Proof:
    """The proof of a candidate; of a graph whose rows choose their adapter, with every adapter and mixed batches."""
    from lora_export.api.publish import stage_of_proof
    from lora_export.runtime.encoder_decoder import EncoderDecoderRunner
    from lora_export.runtime.onnx_runner import OnnxRunner
    from lora_export.verification.proof import prove
    from lora_export.verification.row_proofs import prove_rows

    step = stage_of_proof(stage)
    prove_one: Callable[..., Proof] = functools.partial(
        prove, atol=request.atol, rtol=request.rtol, trace=request.trace
    )
    if isinstance(runner, OnnxRunner | EncoderDecoderRunner) and runner.takes_rows:
        references = replace(references, adapters=adapters, strengths=weights)
        return prove_rows(runner, references, prove=prove_one, step=step)
    return prove_one(runner, references.with_adapters(adapters, weights), step=step)


def _has_own_heads(candidate: Path, adapters: Sequence[Adapter]) -> bool:
    """Whether each row of the candidate has the head that its adapter saves whole."""
    from lora_export.graph.onnx_file.reading import load_graph

    if artifact_kind(candidate) is not ArtifactKind.GRAPH or not any(map(head_names, adapters)):
        return False
    record = read_row_adapters(load_graph(candidate).metadata_props, str(candidate))
    return record is not None and bool(record.labels)


def _files_in(folder: Path) -> LoadedFiles:
    if not is_encoder_decoder_folder(folder):
        return loaded_files(open_checkpoint(folder))
    graphs = {name: path for graph in GRAPH_FILES for name, path in open_artifact(folder / graph).files.items()}
    return files_of_graphs(folder, graphs)
