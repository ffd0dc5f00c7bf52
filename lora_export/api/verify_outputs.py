"""What a candidate computes, compared with PyTorch and its adapters attached.

Of a merged folder that stayed quantised, or GGUF file, its weights decide, and the runs show what quantisation costs:

    exact      The base with its weights as floats, and the adapters attached, in fp32. Nothing is merged.
    off        The same without adapters.
    own        The candidate with its weights as floats, in fp32.
    loaded     The candidate as transformers loads and runs it, with the library of its scheme; or as `runner` does.

‖exact - off‖ is the adapter's effect. ‖own - exact‖ is what the rounding of the merge costs: each number is proven to
be what its record states, so that nothing else is in it. ‖loaded - own‖ is the library's own arithmetic.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_export.api.load import load_adapters, resolve_model, shared_model
from lora_export.api.memory_needs import PROGRAM, require_memory_to_verify
from lora_export.api.verify_record import VerifyRequest, recorded_explanation
from lora_export.api.verify_weights import judge_weights
from lora_export.artifacts.artifact import Artifact
from lora_export.callbacks import in_stages, note_each
from lora_export.errors import Different, EnvironmentLacking, InputRefused, RuntimeRefused, Undecided
from lora_export.graph.cache_names import MASK
from lora_export.isolation.limits import LEAST_TIMEOUT, REQUEST_SECONDS, TIMES_PYTORCH
from lora_export.lora import Adapter
from lora_export.plan import FLOATS, Plan
from lora_export.plan.own_heads import head_names, without_own_head
from lora_export.runtime.memory import release_memory, require_memory
from lora_export.storage import input_files
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.atomic_output import refuse_lack_of_space
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.companion_files import compare_files
from lora_export.verification.diagnose.root_cause import without_guesses
from lora_export.verification.judged_files import LoadedFiles, loaded_files
from lora_export.verification.parity import Outcome
from lora_export.weights.gguf.floats import bytes_as_floats, write_as_floats
from lora_export.weights.merge import merge_checkpoint

if TYPE_CHECKING:
    from lora_export.models.model import Model
    from lora_export.runtime.registered.runner import RegisteredRunner
    from lora_export.runtime.runner import Arrays
    from lora_export.verification.proof import Proof


def judge_outputs(candidate: Artifact, request: VerifyRequest) -> Proof:
    """Prove the candidate against the PyTorch model. Its `error` is what ended the proof before it had figures."""
    from lora_export.api.adapted_model import adapted_model
    from lora_export.api.adapter_values import generated_adapters, with_filled_slots
    from lora_export.api.publish import proof_without_figures, require_provider, stage_of_proof
    from lora_export.models.image_parts import without_image_pairs
    from lora_export.runtime.endpoint.runner import EndpointRunner
    from lora_export.runtime.kv_cache import graph_of
    from lora_export.runtime.onnx_runner import OnnxRunner
    from lora_export.runtime.open_artifact import HowToOpen, open_candidate
    from lora_export.runtime.several_graphs import SeveralGraphs
    from lora_export.verification.against_endpoint import EndpointReferences
    from lora_export.verification.against_pytorch import PyTorchReferences
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
        names, seconds = [adapter.name for adapter in loaded], _seconds(request, base, candidate)
        runner = open_candidate(candidate, HowToOpen(base, request, names, seconds))
        if isinstance(runner, OnnxRunner | SeveralGraphs) and runner.has_slots:
            stage("filling the slots")
            if not loaded:
                adapted = replace(adapted, adapters=generated_adapters(runner.path), strengths=(1.0, 1.0))
            runner = with_filled_slots(runner, adapted.adapters, adapted.strengths)
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
            base,
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
        if isinstance(model, str | Path):
            proof = proof.with_files(compare_files(Path(model), candidate.path, loaded))
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


def _seconds(request: VerifyRequest, base: Model, candidate: Artifact) -> float:
    """How long a run of the candidate may take: as stated, or in proportion to PyTorch's run of the largest inputs.

    An endless graph ends soon then. A large model, whose run takes long, and own inputs are not timed, and bfloat16 is
    not, for which onnxruntime has no kernels.
    """
    from lora_export.models.model import in_dtype_of
    from lora_export.models.tracing import failure_on
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


# --- a quantised candidate of a quantised base ---

MOST_COST = 1.0  # of the rounding, relative to the adapter's effect
Runs = Mapping[str, "Arrays"]  # by case


class RunOutputs(NamedTuple):
    """The outputs of each run, by case; `refusal` is why the library did not load the candidate."""

    exact: Runs
    off: Runs
    own: Runs
    loaded: Runs | None
    refusal: str
    padding: Mapping[str, NDArray[np.bool_]]  # case -> positions that are no tokens, [batch, sequence]: not compared

    @property
    def figures(self) -> dict[str, float]:
        """What costs how much, relative to the adapter's effect."""
        effect = self._distance(self.exact, self.off)
        found = {"of_rounding": self._distance(self.own, self.exact)}
        if self.loaded is not None:
            found["of_library"] = self._distance(self.loaded, self.own)
        return {what: one / effect if effect else math.inf if one else 0.0 for what, one in found.items()}

    @property
    def is_nearer_to_base(self) -> bool:
        """Whether the library computes rather what the base does than what the candidate's weights do."""
        if self.loaded is None:
            return False
        return self._distance(self.loaded, self.off) < self._distance(self.loaded, self.own)

    def _distance(self, one: Runs, other: Runs) -> float:
        """‖one - other‖ over all outputs that both have."""
        return math.sqrt(sum(self._square(case, one[case], other[case]) for case in one))

    def _square(self, case: str, one: Arrays, other: Arrays) -> float:
        total, skipped = 0.0, self.padding.get(case)
        for name, value in one.items():
            if name in other and str(value.dtype) in FLOATS:
                difference = value.astype(np.float64) - other[name]
                if skipped is not None and difference.shape[:2] == skipped.shape:
                    difference = difference[~skipped]
                total += float(np.square(difference).sum())
        return total


def judge_quantised(candidate: Artifact, request: VerifyRequest) -> Audit:
    """The verdict on the weights; and where they are right, what quantisation costs, as notes and in `about`.

    It is undecided where the rounding costs more than the adapters change. Raises as `judge_weights`.
    """
    audit = judge_weights(candidate, request)
    if audit.outcome is not Outcome.SAME:
        return audit
    loaded = load_adapters(request.adapters)
    with tempfile.TemporaryDirectory() as folder:
        outputs = _run(candidate, request, loaded, Path(folder))
    figures = outputs.figures
    sentences = [
        f"quantised, the outputs are {figures['of_rounding']:.3g} of the adapter's effect away from those of the exact "
        "merge"
    ]
    if "of_library" in figures:
        sentences.append(
            f"as {request.runner or 'transformers'} runs it, they are {figures['of_library']:.3g} of it away from "
            "those of its own weights as floats"
        )
    elif candidate.kind is ArtifactKind.GGUF:  # it is made for llama.cpp: another reader of it is no part of the proof
        audit = replace(audit, notes=(*audit.notes, outputs.refusal))
    else:
        audit = replace(audit, not_judged=(*audit.not_judged, f"what transformers computes: {outputs.refusal}"))
    is_lost = outputs.is_nearer_to_base or any(not one <= MOST_COST for one in figures.values())
    if is_lost:
        sentences.append("that is more than the adapters change: no output shows that they are merged")
    return replace(
        audit,
        outcome=Outcome.UNDECIDED if is_lost else audit.outcome,
        figures=tuple(sentences),
        about={**audit.about, "model": str(request.checkpoint.path), "quantisation_error": figures},
    )


def _run(candidate: Artifact, request: VerifyRequest, adapters: Sequence[Adapter], folder: Path) -> RunOutputs:
    """Run one model after the other on the same seeded inputs."""
    import torch

    from lora_export.api.adapted_model import adapted_model
    from lora_export.runtime.registered.runner import RegisteredRunner
    from lora_export.runtime.torch_runners import ModuleRunner
    from lora_export.verification.inputs.model_inputs import inputs_of_proof
    from lora_export.verification.references.attached_module import attach_adapters

    base, seed, own_inputs = request.checkpoint, request.input_seed or 0, request.inputs
    source = resolve_model(_as_floats(base, base, folder / "base"), adapters, inputs=own_inputs, streamed=True)
    adapted = adapted_model(source, adapters, request.weights, request, request.on_message)
    runner = ModuleRunner(adapted.model.module)
    theirs = None
    if request.runner is not None:
        theirs = RegisteredRunner(request.runner, candidate, timeout=request.seconds)
    cases = inputs_of_proof(
        adapted.model, theirs or runner, seed=seed, user_inputs=own_inputs, adapters=adapted.adapters
    ).cases
    off = {name: runner.run(arrays) for name, arrays in cases.items()}
    attach_adapters(adapted.model.module, adapted.adapters, adapted.strengths)
    exact = {name: runner.run(arrays) for name, arrays in cases.items()}
    floats = resolve_model(_as_floats(candidate, base, folder / "candidate"), inputs=own_inputs, streamed=True)
    own_runner = ModuleRunner(floats.module)
    own = {name: own_runner.run(arrays) for name, arrays in cases.items()}
    padding = {name: arrays[MASK] == 0 for name, arrays in cases.items() if MASK in arrays}
    outputs = RunOutputs(exact, off, own, None, "", padding)
    if theirs is not None:
        with contextlib.closing(theirs):
            return outputs._replace(loaded=_of_runner(theirs, cases, own))
    try:
        library = ModuleRunner(_by_transformers(candidate, type(own_runner.module).__name__))
        with torch.no_grad():  # some libraries unpack their weights in the first run
            library.module(**{name: torch.from_numpy(value) for name, value in next(iter(cases.values())).items()})
        loaded = {name: library.run(arrays) for name, arrays in cases.items()}
    except (ImportError, RuntimeError, ValueError, InputRefused, EnvironmentLacking) as error:
        return outputs._replace(refusal=str(error).strip().splitlines()[0])
    return outputs._replace(loaded=loaded)


def _of_runner(runner: RegisteredRunner, cases: Runs, own: Runs) -> Runs:
    """What a runner computes, by the names of PyTorch's outputs. Raises RuntimeRefused for what is no output of it."""
    from lora_export.verification.compare_outputs import aligned

    found = {}
    for name, arrays in cases.items():
        outputs = runner.run(arrays)
        found[name] = aligned(outputs, own[name], names_known=runner.names_known)
        shapes = {key: value.shape for key, value in own[name].items() if key in found[name]}
        if not shapes or any(found[name][key].shape != shape for key, shape in shapes.items()):
            returned = ", ".join(f"{key} {list(value.shape)}" for key, value in found[name].items())
            wanted = ", ".join(f"{key} {list(value.shape)}" for key, value in own[name].items())
            raise RuntimeRefused(f"the runner {runner.name} returns {returned or 'nothing'}, and the model {wanted}")
    return found


def _as_floats(quantised: Artifact, base: Artifact, output: Path) -> Path:
    """A quantised folder or file as the folder of a float model, bit for bit the weights that its library makes.

    A GGUF file has the config of its base.
    """
    output.mkdir()
    if quantised.kind is ArtifactKind.GGUF:
        from lora_export.models.gguf_files import save_config

        refuse_lack_of_space(output, bytes_as_floats(quantised.gguf))
        save_config(base.gguf, output, with_tokenizer=False)
        write_as_floats(quantised.gguf, output)
        return output
    checkpoint = quantised.dequantised
    merge_checkpoint(Plan((), (), (), tuple(spec.name for spec in checkpoint.specs)), checkpoint, output)
    return output


def _by_transformers(candidate: Artifact, class_name: str) -> Any:
    """The model as transformers loads it. Raises what transformers raises, which names a package that is absent."""
    import transformers

    from lora_export.models.huggingface import quiet
    from lora_export.models.processors import refusing_failures

    load, path = getattr(transformers, class_name).from_pretrained, candidate.path
    if candidate.kind is not ArtifactKind.GGUF:
        return load(path, device_map="cpu", local_files_only=True).eval()
    require_memory(PROGRAM + 2 * bytes_as_floats(candidate.gguf), "reading it by transformers")
    with (
        quiet(transformers),
        contextlib.redirect_stderr(io.StringIO()),  # it has a progress bar of its own
        refusing_failures("transformers does not read this GGUF file"),
    ):
        return load(path.parent, gguf_file=path.name, local_files_only=True).eval()
