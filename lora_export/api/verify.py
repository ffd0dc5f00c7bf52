"""`lora_export.verify`: does a file compute what the PyTorch model computes, or contain what a merge should?"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.api.load import (
    adapter_paths,
    calibration_file,
    load_adapters,
    locate_adapters,
    no_adapter_as_model,
    refuse_weights_alone,
)
from lora_export.api.load_model import locate_model, model_paths
from lora_export.api.verify_outputs import judge_outputs
from lora_export.api.verify_quantised import judge_quantised
from lora_export.api.verify_record import VerifyRequest
from lora_export.api.verify_weights import audit_pipeline, judge_weights
from lora_export.artifacts.artifact import Artifact, open_artifact
from lora_export.artifacts.kind import artifact_kind
from lora_export.errors import InputRefused, LoraExportError, WrongUsage, brief
from lora_export.formats import is_only_adapter
from lora_export.formats.peft_keys import INNER, WRAPPER
from lora_export.isolation.limits import stated_memory
from lora_export.isolation.turns import pytorch_turn
from lora_export.names.table import is_embedding, read_table
from lora_export.options.common import ModelSource, is_address
from lora_export.options.declaring import extended, takes
from lora_export.options.reading import DEFAULTS
from lora_export.options.spelling import named
from lora_export.options.verify import Expectations, Judging, VerifyOptions, seconds_of
from lora_export.provenance import adapter_records
from lora_export.report.files import check_report_path, try_report_place, write_report
from lora_export.report.json_document import document_of_proof
from lora_export.report.verdict_screen import screen
from lora_export.runtime.expectations import recorded_base, refuse_unexpected
from lora_export.storage import input_files
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.hashes import file_sha256
from lora_export.storage.hub_cache import locate
from lora_export.storage.signature import refuse_unsigned
from lora_export.storage.store_copy import on_disk
from lora_export.storage.store_path import is_hub_address, newly_opened, place
from lora_export.verification.against_checkpoint import Audit
from lora_export.verification.against_checkpoint.in_step import AuditInStep, audits_in_step

if TYPE_CHECKING:
    from lora_export.verification.proof import Proof


@dataclass(frozen=True, eq=False, repr=False)
class Verification:
    """A verdict, and the facts that it takes to trust and to repeat it. True only where the verdict is `same`."""

    proof: Proof | Audit  # of what a model computes; or, against a base checkpoint, of its weights

    def __repr__(self) -> str:
        return brief(self, self.proof.verdict.headline)

    def _repr_html_(self) -> str:
        return self.proof._repr_html_()

    @property
    def verdict(self) -> Any:
        """The verdict: `same`, `different` or `undecided` is its `outcome`."""
        return self.proof.verdict

    @property
    def about(self) -> Mapping[str, Any]:
        """Versions, hashes, seed, inputs."""
        return self.proof.about

    @property
    def seconds(self) -> float:
        """How long the whole run took."""
        return self.proof.seconds

    @property
    def error(self) -> LoraExportError | None:
        """What ended the proof before anything was measured."""
        return self.proof.error

    @property
    def exit_code(self) -> int:
        return self.proof.exit_code

    def __bool__(self) -> bool:
        return bool(self.verdict)

    def __str__(self) -> str:
        return screen(self.proof)

    def as_document(self) -> dict[str, Any]:
        """Every figure, as the JSON document that the command line prints."""
        return document_of_proof(self.proof)

    def write_report(self, path: str | Path) -> None:
        """Write a report: .json (every figure), .xml (JUnit) or .html (to read). An existing file is replaced."""
        write_report(place(path), self.proof)


@takes(VerifyOptions)
def verify(options: VerifyOptions) -> Verification:
    """Prove that a file computes what a PyTorch model with its adapters attached computes.

    `candidate` is an .onnx, a TorchScript .pt, a .pt2, a merged Hugging Face folder, a merged .safetensors or .gguf
    file; or the address of a server, as text: https://host/v1.
    `model` is a Hugging Face folder, `package.module:factory`, `file.py:factory`, a .pt2, or `(module, inputs)`; for a
    merged GGUF file, the one that it was merged into.
    Without a model, `base` is a checkpoint: nothing is run, and every tensor of a merged folder or file is compared
    with W + s·BA in fp64; PyTorch is not needed. A merged diffusion pipeline is compared with the base's folder. A
    weight whose layout is unknown is `undecided`.

    Returns the verdict, whichever it is. With `watch`, it is the first that is not `same`. Raises InputRefused for
    inputs that cannot be used, and WrongUsage for options that do not go together.
    """
    pause = None if options.watch is None else seconds_of(options.watch)
    for seed in itertools.count(options.input_seed or 0):
        with contextlib.nullcontext() if options.model is None else pytorch_turn():
            result = _verified(options if pause is None else replace(options, input_seed=seed))
        if pause is None or not result:
            return result
        options.on_message(f"{result.proof.verdict.headline} (inputs of seed {seed}); again in {options.watch}")
        time.sleep(pause)
    raise AssertionError("there is always another seed")


def verify_together(every: Sequence[VerifyOptions]) -> list[Verification | Exception]:
    """Proofs of merged weights as by `verify`; what all need of one base is read once. Each result, or what it raised.

    Peak memory is that of one proof, the adapters of all, and 56 MiB for each.
    """
    return audits_in_step([functools.partial(_verified, options) for options in every])


def _verified(options: VerifyOptions, in_step: AuditInStep[Verification] | None = None) -> Verification:
    """One proof, with its reports."""
    begun = time.perf_counter()
    request = replace(_request(options), in_step=in_step)
    with stated_memory(options.memory):
        candidate = _candidate(options)
        request = replace(request, origin=_origin(request, candidate))
        _refuse_adapter(candidate, request)
        proof = _judge(candidate, request)
    if request.strict:
        proof = proof.strictly()
    seconds = time.perf_counter() - begun
    when = {
        "strict": request.strict,
        "seconds": round(seconds, 1),
        "created": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    signed = {} if request.expected.signature is None else {"signature": str(request.expected.signature)}
    about = {**proof.about, **signed, **when, **(options.about or {})}
    result = Verification(replace(proof, about=about, seconds=seconds))
    for path in options.reports:
        result.write_report(path)
    return result


def _candidate(options: VerifyOptions) -> Artifact:
    """The candidate; one in a store that is run is a copy on the disk.

    Raises WrongUsage as `refuse_address`, and InputRefused for a folder that lacks a graph.
    """
    if is_address(options.candidate):
        from lora_export.runtime.endpoint.client import refuse_address  # Python's HTTP takes time to import

        refuse_address(str(options.candidate).rstrip("/"))
        return open_artifact(options.candidate)
    named_path = options.candidate
    path = locate(named_path, options.on_message) if is_hub_address(named_path) else newly_opened(named_path)
    opened = open_artifact(path if options.model is None else on_disk(path, options.on_message))
    opened.refuse_missing_graph()
    return opened


def _refuse_adapter(candidate: Artifact, request: VerifyRequest) -> None:
    """Raise InputRefused for an adapter. A file with adapters and tensors of the base is a model that has both."""
    of_adapters = (ArtifactKind.ADAPTER, ArtifactKind.GGUF, ArtifactKind.SCRIPT, ArtifactKind.OTHER)
    may_be = candidate.kind in of_adapters or candidate.kind.is_checkpoint
    if request.runner is not None or not may_be or not is_only_adapter(candidate.path):
        return
    if candidate.kind is ArtifactKind.WEIGHTS and request.origin is not None and request.origin.kind.is_checkpoint:
        own, others = ({spec.name for spec in each.checkpoint.specs} for each in (candidate, request.origin))
        if own & others or _is_saved_wrapper(own, others):
            return
    raise InputRefused(f"{candidate.path} is an adapter. Give the file or folder that was made with it")


def _is_saved_wrapper(names: Set[str], base: Set[str]) -> bool:
    """Whether a file is the state of PEFT's wrapper: it has weights of the base that its adapter changes, or all.

    An adapter's file has whole modules, too, but of those that it changes only tables of words.
    """
    own = {name.removeprefix(WRAPPER).replace(INNER, "") for name in names}
    changed = {name[:end] for name in own - base for end, letter in enumerate(name) if letter == "."}
    modules = {name.removesuffix(".weight") for name in own & base} & changed
    tables = {each for each in modules if is_embedding(each) or each.rpartition(".")[2] in read_table().tied_modules}
    return bool(modules - tables) or {name for name in base if name.endswith(".weight")} <= own


def _origin(request: VerifyRequest, candidate: Artifact) -> Artifact | None:
    """What the candidate's weights are compared with: the base, or the model's folder. None for a model in memory."""
    given = request.base or request.model
    if not isinstance(given, str | Path):
        return None
    path = place(given)
    return Artifact(path, artifact_kind(path), like=candidate)


def _judge(candidate: Artifact, request: VerifyRequest) -> Proof | Audit:
    """The verdict on what the candidate computes; without a model, on its weights.

    Raises WrongUsage for options that do not go together, Different or Undecided where the signature, the adapters or
    the base are not those that were expected, and InputRefused where there is no candidate, or its files change
    meanwhile.
    """
    _check_usage(candidate, request)
    if request.onnx_adapter is not None:
        input_files.must_exist(request.onnx_adapter, "adapter file")
    if (signature := request.expected.signature) is not None:
        refuse_unsigned(candidate.path, signature)
        request.on_message(f"{candidate.path} is signed by {signature}, and unchanged since")
    request = _read(request)
    _refuse_unexpected(candidate, request)
    with candidate.unchanged(), no_adapter_as_model(request.model or request.base, request.adapters):
        if request.model is not None:
            judge = judge_quantised if _stayed_quantised(candidate, request.origin) else judge_outputs
            return judge(candidate, request)
        if request.checkpoint.kind is ArtifactKind.PIPELINE:
            return audit_pipeline(candidate, request, load_adapters(request.adapters, of_models=True))
        return judge_weights(candidate, request)


def _stayed_quantised(candidate: Artifact, origin: Artifact | None) -> bool:
    """Whether both are quantised, as a merge keeps it: a GGUF file of a GGUF file."""
    if origin is None or (candidate.kind is ArtifactKind.GGUF) != (origin.kind is ArtifactKind.GGUF):
        return False
    return candidate.is_quantised and origin.is_quantised


def _request(options: VerifyOptions) -> VerifyRequest:
    """The options with everything found that they name. Raises WrongUsage where a report would replace an input."""
    on_message, download = options.on_message, options.download
    refuse_weights_alone(options.adapters, options.weights)
    request = extended(
        options,
        VerifyRequest,
        model=None if options.model is None else locate_model(options.model, on_message, download),
        base=None if options.base is None else locate(options.base, on_message, download),
        adapters=locate_adapters(options.adapters, on_message, download),
        onnx_adapter=None if options.onnx_adapter is None else newly_opened(options.onnx_adapter),
        other=locate_adapters(options.other, on_message, download),
        inputs=None if options.inputs is None else newly_opened(options.inputs),
        cache=None if options.cache is None else place(options.cache),
        calibration=calibration_file(options.calibration),
        fixed=dict(options.fixed or {}),
        layout=dict(options.layout or {}),
    )
    paths = [*model_paths(request.model or ""), *adapter_paths(request.adapters)]
    is_remote = is_hub_address(options.candidate) or is_address(options.candidate)
    candidate = None if is_remote else place(options.candidate)
    sources = [candidate, request.base, request.onnx_adapter, request.inputs, *paths]
    for path in options.reports:
        check_report_path(place(path), [source for source in sources if source is not None])
        try_report_place(place(path))
    return request


def _read(request: VerifyRequest) -> VerifyRequest:
    """The request with its adapters loaded, where they are compared, or their reading depends on what else is given."""
    reading = request.reading.for_base(request.base if request.model is None else request.model)
    of_pipeline = request.model is None and request.checkpoint.kind is ArtifactKind.PIPELINE
    if not (request.prefixes or request.expected or reading != DEFAULTS or of_pipeline):
        return request
    loaded = load_adapters(
        *(request.adapters, request.prefixes),
        reading=reading,
        of_models=request.model is None,
        activated=request.model is not None,
    )
    return replace(request, adapters=loaded)


def _refuse_unexpected(candidate: Artifact, request: VerifyRequest) -> None:
    """Raise Different or Undecided where the adapters, which are loaded, or the base are not those expected.

    Nor may the record of a signed file have others. That of an exported file has the hash of the loaded model's
    weights, which is not compared with files.
    """
    expected = request.expected
    if not expected:
        return
    base = request.base if request.model is None else request.model
    base_hashes = _weight_hashes(base) if expected.base_sha256 else []
    # As they were read. What judges them refuses one that it cannot.
    adapters = load_adapters(request.adapters, of_models=request.model is None, activated=True)
    records = adapter_records(adapters, request.weights or [1.0] * len(adapters))
    refuse_unexpected(candidate.path, expected, records, base_hashes)
    if expected.signature is not None:
        record = candidate.record
        is_of_files = bool(record.base) and "sha256" not in record.base and isinstance(base, str | Path)
        signed = Expectations(
            tuple(str(adapter["sha256"]) for adapter in records),
            base_sha256=tuple(filter(None, base_hashes or _weight_hashes(base))) if is_of_files else (),
        )
        own = record.adapters[-len(records) :] if records else ()  # earlier merges are part of the base
        refuse_unexpected(candidate.path, signed, own, recorded_base(record.base))


def _weight_hashes(base: ModelSource | None) -> list[str | None]:
    """The SHA-256 of each file with weights of a base, or of the model's file."""
    if not isinstance(base, str | Path) or not place(base).exists():
        raise WrongUsage(f"{named('expect_base_sha256')} is for a base that is a folder or a file")
    artifact = open_artifact(base)
    if not artifact.path.is_dir() and artifact.kind is not ArtifactKind.WEIGHTS:
        return [file_sha256(artifact.path)]
    return [file_sha256(shard.path) for shard in artifact.checkpoint.shards.values()]


def _check_usage(candidate: Artifact, request: VerifyRequest) -> None:
    """Raise WrongUsage for options that do not go together."""
    model, is_graph = request.model, candidate.kind.is_graph
    if model is None and request.base is None:
        raise WrongUsage(
            f"give {named('model')}, to judge what CANDIDATE computes, or {named('base')}, to judge its weights"
        )
    if model is None and (names := [named(name) for name in request.chosen_of(Judging)]):
        raise WrongUsage(
            f"{' and '.join(names)}: with {named('base')} nothing is run. How CANDIDATE is run is for {named('model')}"
        )
    if model is None and is_graph:
        raise WrongUsage(
            f"{named('base')} alone judges checkpoints; what an .onnx computes is judged with {named('model')}"
        )
    stayed_quantised = model is not None and _stayed_quantised(candidate, request.origin)
    is_audit = model is None and (candidate.kind.is_checkpoint or candidate.kind is ArtifactKind.GGUF)
    if request.calibration is not None and not (is_audit or stayed_quantised):
        raise WrongUsage(f"{named('calibration')} is for a checkpoint and {named('base')}, without {named('model')}")
    if model is None and not request.adapters:
        raise WrongUsage(
            f"{named('base')} needs the adapters that were merged ({named('adapters')}){_contained(candidate)}"
        )
    kinds = {candidate.kind, *([] if request.origin is None else [request.origin.kind])}
    if model is not None and request.base is not None and kinds != {ArtifactKind.GRAPH}:
        way_out = f"Leave {named('base')} out"
        if candidate.kind is not ArtifactKind.GRAPH:
            way_out = (
                f"Give one of the two: {named('model')} judges what CANDIDATE computes, {named('base')} its weights"
            )
        raise WrongUsage(
            f"{named('base')} beside {named('model')} is the quantised .onnx that an .onnx was made from. {way_out}"
        )
    if request.provider != "cpu" and (not is_graph or request.runner is not None):
        whose = "PyTorch files are judged on the CPU" if request.runner is None else "a runner chooses its own"
        raise WrongUsage(f"{named('provider', request.provider)} is for .onnx files under onnxruntime; {whose}")
    dtype = "float32" if candidate.address else request.dtype  # any of the halves is served
    adapter = None if candidate.kind is ArtifactKind.EXECUTORCH else request.onnx_adapter
    of_graphs = (adapter, request.adapter_id, dtype) != (None, None, "float32")
    if of_graphs and not is_graph and request.runner is None:
        raise WrongUsage(f"{named('onnx_adapter')}, {named('adapter_id')} and {named('dtype')} are for .onnx files")
    _check_endpoint(candidate, request)
    if stayed_quantised:
        _check_quantised(request)


def _check_quantised(request: VerifyRequest) -> None:
    """Raise WrongUsage for options of a comparison of outputs, where the weights decide."""
    given: dict[str, object] = {
        "atol": request.atol is not None,
        "rtol": request.rtol is not None,
        "trace": request.trace,
        "cache": request.cache,
        "fixed": request.fixed,
        "onnx_adapter": request.onnx_adapter,
        "adapter_id": request.adapter_id is not None,
        "dtype": request.dtype != "float32",
        "timeout": request.timeout is not None and request.runner is None,
    }
    if names := [named(name) for name, value in given.items() if value]:
        raise WrongUsage(f"{' and '.join(names)}: CANDIDATE stayed quantised, and is judged by its weights")


def _check_endpoint(candidate: Artifact, request: VerifyRequest) -> None:
    """Raise WrongUsage for options of endpoints beside a file, and for those of files beside an endpoint."""
    if not candidate.address:
        given: dict[str, object] = {"served_name": request.served_name, "other": request.other}
        why = "CANDIDATE is an address such as https://host/v1"
    else:
        from lora_export.runtime.endpoint.tensors import is_of_tensors  # Python's HTTP takes time to import

        given = {"trace": request.trace, "fixed": request.fixed, "memory": request.memory, "runner": request.runner}
        given |= {"expect_signature": request.expected.signature}
        why = "an endpoint shows its answers alone, and is no file"
        if is_of_tensors(candidate.address) and request.other:
            raise WrongUsage(f"{named('other')} is for servers that give log-probabilities of tokens")
    if request.other and not request.adapters:
        given |= {"other": request.other}
        why = f"it is beside the adapter that is judged ({named('adapters')})"
    if names := [named(name) for name, value in given.items() if value]:
        raise WrongUsage(f"{' and '.join(names)}: {why}")


def _contained(candidate: Artifact) -> str:
    """Which adapters the candidate records, as the end of a message; empty where it records none."""
    if not candidate.path.exists():
        return ""
    names = ", ".join(f"`{adapter.get('name')}`" for adapter in candidate.record.adapters)
    return f". {candidate.path} contains {names}" if names else ""
