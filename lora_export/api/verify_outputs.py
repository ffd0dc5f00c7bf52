"""What a candidate computes, compared with PyTorch and its adapters attached."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_export.api.load import load_adapters
from lora_export.api.load_model import shared_model
from lora_export.api.memory_needs import require_memory_to_verify
from lora_export.api.verify_record import VerifyRequest, recorded_explanation
from lora_export.artifacts.artifact import Artifact
from lora_export.callbacks import in_stages, note_each
from lora_export.errors import Different, EnvironmentLacking, InputRefused, Undecided
from lora_export.isolation.limits import LEAST_TIMEOUT, REQUEST_SECONDS, TIMES_PYTORCH
from lora_export.options.spelling import named
from lora_export.plan.build import checked_strengths
from lora_export.plan.own_heads import head_names, without_own_head
from lora_export.runtime.memory import release_memory
from lora_export.storage import input_files
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.verification.companion_files import compare_files
from lora_export.verification.diagnose.root_cause import without_guesses
from lora_export.verification.judged_files import LoadedFiles, loaded_files

if TYPE_CHECKING:
    from lora_export.lora import Adapter
    from lora_export.models.model import Model
    from lora_export.verification.proof import Proof


def judge_outputs(candidate: Artifact, request: VerifyRequest) -> Proof:
    """Prove the candidate against the PyTorch model. Its `error` is what ended the proof before it had figures."""
    from lora_export.api.adapted_model import adapted_model
    from lora_export.api.adapter_values import generated_adapters, with_filled_slots
    from lora_export.api.program_adapters import with_values_of_adapters
    from lora_export.api.publish import proof_without_figures, require_provider, stage_of_proof
    from lora_export.models.image_parts import without_image_pairs
    from lora_export.runtime.endpoint.runner import EndpointRunner
    from lora_export.runtime.kv_cache import graph_of
    from lora_export.runtime.onnx_runner import OnnxRunner
    from lora_export.runtime.open_artifact import HowToOpen, open_candidate
    from lora_export.runtime.registered.runner import RegisteredRunner
    from lora_export.runtime.several_graphs import SeveralGraphs
    from lora_export.verification.against_endpoint import EndpointReferences
    from lora_export.verification.against_pytorch import PyTorchReferences
    from lora_export.verification.inputs.model_inputs import in_stated_batch
    from lora_export.verification.module_copies import fp64_bytes
    from lora_export.verification.proof import prove
    from lora_export.verification.row_proofs import prove_candidate

    model, origin, on_message = request.model, request.base, request.on_message
    assert model is not None
    if origin is not None:
        input_files.must_exist(origin, "base graph")
    stage = in_stages(request.on_progress)
    request = replace(request, session=None) if candidate.address else request  # its references compute scores alone
    runner = None
    hashes: dict[str, str] = {}
    facts: dict[str, Any] = {} if request.runner is None else {"runner": request.runner}
    try:
        require_provider(request.provider)
        loaded = load_adapters(request.adapters, activated=True)
        names = [adapter.name for adapter in loaded]
        request, loaded, chosen = _of_adapter_id(request, loaded)
        printed = {note: None for adapter in loaded for note in adapter.notes}
        note_each(on_message, printed)
        require_memory_to_verify(model, candidate, request.dtype)
        stage("loading the model")
        has_heads = any(map(head_names, loaded)) and candidate.has_own_heads
        taken = [without_own_head(adapter) for adapter in loaded] if has_heads else loaded
        dtype, inputs = request.dtype, request.inputs
        base = shared_model(request.session, model, taken, dtype=dtype, inputs=inputs, streamed=True)
        adapted = adapted_model(base, loaded, request.weights, request, on_message)
        more = (note for adapter in adapted.adapters for note in adapter.notes if note not in printed)
        note_each(on_message, more)
        base = adapted.model
        stage("loading the candidate")
        runner = open_candidate(candidate, HowToOpen(base, request, names, _seconds(request, base, candidate)))
        note_each(on_message, chosen)  # the graph may have refused the number of adapters
        if isinstance(runner, OnnxRunner | SeveralGraphs) and runner.has_slots:
            stage("filling the slots")
            if not loaded:
                adapted = replace(adapted, adapters=generated_adapters(runner.path), strengths=(1.0, 1.0))
            runner = with_filled_slots(runner, adapted.adapters, adapted.strengths)
        if isinstance(runner, RegisteredRunner) and request.onnx_adapter is None:
            runner = with_values_of_adapters(runner, adapted.adapters, adapted.strengths)
        make_references: Callable[..., PyTorchReferences] = PyTorchReferences
        if isinstance(runner, EndpointRunner):
            base = runner.judged(base)
            make_references = functools.partial(EndpointReferences, others=load_adapters(request.other))
        takes: Collection[str] = runner.axes or getattr(runner, "input_names", ())
        base = base.taking(takes).without_token_types(takes)
        if graph_of(runner) is not None:
            base, adapters = without_image_pairs(base, adapted.adapters, on_message)
            adapted = replace(adapted, adapters=adapters)
        release_memory(of=fp64_bytes(base.module))
        references = make_references(
            in_stated_batch(base, request.fixed),
            adapted.adapters,
            adapted.strengths,
            seed=request.input_seed or 0,
            user_inputs=request.inputs,
            device=request.provider,
            cache=request.cache,
            origin=origin,
            fixed=request.fixed,
            has_own_heads=has_heads,
            say=on_message,
            session=request.session,
        )
        prove_one = functools.partial(prove, atol=request.atol, rtol=request.rtol, trace=request.trace)
        proof = prove_candidate(runner, references, prove=prove_one, step=stage_of_proof(stage))
        files = loaded_files(candidate) if request.runner is None else LoadedFiles(candidate.files)
        if request.origin is not None:
            proof = proof.with_files(compare_files(request.origin, candidate, loaded))
        proof = proof.with_files(files.others)
        stage("hashing the candidate")
        hashes = files.hashes
        if origin is not None:
            facts["base"] = {"path": str(origin), "sha256": request.checkpoint.hashes}
    except (Different, Undecided, EnvironmentLacking) as ended:
        proof = proof_without_figures(ended, getattr(runner, "placement", None))
    else:
        fingerprint = str(proof.about["model"].get("sha256", "")) if "model" in proof.about else ""
        recorded = recorded_explanation(proof.verdict, candidate, request, loaded, fingerprint=fingerprint)
        diagnosis = proof.diagnosis
        if recorded and diagnosis is not None:
            diagnosis = replace(diagnosis, why=without_guesses(diagnosis.why))
        proof = replace(proof, verdict=replace(proof.verdict, recorded=recorded), diagnosis=diagnosis)
    if candidate.address and runner is not None:
        facts["endpoint"] = getattr(runner, "facts", {})
    about = {"candidate": {"path": str(candidate), "sha256": hashes}, **facts, **request.settings, **proof.about}
    return replace(proof, about=about)


def _of_adapter_id(request: VerifyRequest, adapters: list[Adapter]) -> tuple[VerifyRequest, list[Adapter], list[str]]:
    """The request, its adapters, and notes; of several, which are the graph's in the order of the ids, the chosen one.

    Raises InputRefused for an id that is none of them, and as `plan.checked_strengths`.
    """
    number = request.adapter_id
    if number is None or len(adapters) < (2 if number else 1):
        return request, adapters, []
    strengths = checked_strengths(adapters, request.weights)
    if number > len(adapters):
        given = ", ".join(f"{place} ({adapter.name})" for place, adapter in enumerate(adapters, start=1))
        raise InputRefused(f"{named('adapter_id', number)} is none of the adapters that are given: {given}")
    own = slice(number - 1, number) if number else slice(0)
    reference = f"{adapters[number - 1].name} alone" if number else "the base without adapters"
    chosen = f"{named('adapter_id', number)}: the reference is {reference}"
    return replace(request, weights=strengths[own]), adapters[own], [chosen]


def _seconds(request: VerifyRequest, base: Model, candidate: Artifact) -> float:
    """How long a run of the candidate may take: as stated, or in proportion to PyTorch's run of the largest inputs.

    An endless graph ends soon then. A large model, whose run takes long, and own inputs are not timed, and bfloat16 is
    not, for which onnxruntime has no kernels.
    """
    from lora_export.models.model import in_dtype_of
    from lora_export.models.refusals import failure_on
    from lora_export.verification.module_copies import is_large

    if candidate.kind is ArtifactKind.ENDPOINT:
        return REQUEST_SECONDS if request.timeout is None else request.timeout
    if request.timeout is not None or request.inputs is not None or request.dtype == "bfloat16":
        return request.seconds
    if is_large(base.module):
        return request.seconds
    largest = max(base.checked_sizes({}), key=lambda sizes: math.prod(sizes.values()))
    inputs, begun = in_dtype_of(base.module, base.inputs(largest, seed=0)), time.monotonic()
    failed = failure_on(base.module, inputs)
    return request.seconds if failed else max(float(LEAST_TIMEOUT), TIMES_PYTORCH * (time.monotonic() - begun))
