"""`lora_export.merge`: adapters into the weights of a checkpoint or a graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_export.api.load import adapter_paths, calibration_file, locate_adapters, no_adapter_as_model
from lora_export.api.merge_request import MergeRequest, MergeResult, read_adapters
from lora_export.artifacts.files import with_suffix
from lora_export.artifacts.kind import artifact_kind
from lora_export.errors import WrongUsage
from lora_export.options.declaring import extended, takes
from lora_export.options.merge import MergeOptions
from lora_export.options.spelling import named
from lora_export.storage.artifact_kinds import ArtifactKind, claimed_kind
from lora_export.storage.hub_cache import locate
from lora_export.storage.store_path import place
from lora_export.weights.one_pass import Merging, alone, together

# Kinds of BASE as the usage of options names them; everything else is a checkpoint
KINDS_OF_BASE = {ArtifactKind.PIPELINE: "pipeline", ArtifactKind.GRAPH: "graph", ArtifactKind.GGUF: "gguf"}


@takes(MergeOptions)
def merge(options: MergeOptions) -> MergeResult:
    """Merge adapters into the weights of a base: W' = W + Σ weight·scale·B·A, summed in fp32 and rounded once.

    `base` is a Hugging Face folder, a .safetensors file, an .onnx file or a .gguf file; `output` becomes the same kind,
    with the same layout. `adapters` are paths, `NAME=PATH` or loaded adapters. The folder of a diffusion pipeline is a
    base too: each model that an adapter changes is merged, the rest is copied. An adapter with changes for several
    models needs the pipeline, or a component in `reading`.

    Needs no PyTorch unless `device` is "cuda". Peak memory is a few blocks, whatever the size of the model.

    Raises InputRefused (MatchError with every misfit) for what is damaged, does not fit or would lose too much;
    OutputFailed where the output cannot be written; EnvironmentLacking where CUDA is missing; WrongUsage for options
    that do not go together. After an error an existing output is unchanged, and nothing new is left behind.
    """
    return alone(_merging(options))


def merge_together(every: Sequence[MergeOptions]) -> list[MergeResult | Exception]:
    """Merges as by `merge`, those into one checkpoint in one pass over it. The result of each, or what it raised.

    Peak memory is that of one merge, the adapters of all, and a few MiB for each, or 60 MiB for an upload to a store.
    Each has two open files.
    """
    return together([_merging(options) for options in every])


def _merging(options: MergeOptions) -> Merging[MergeResult]:
    """One merge (see `one_pass`)."""
    base = locate(options.base, options.on_message, options.download)
    kind = artifact_kind(base)
    if kind is ArtifactKind.GRAPH:
        from lora_export.storage.store_copy import on_disk

        base = on_disk(base, options.on_message)  # ONNX's libraries open files of the disk alone
    options.check_usage(base=KINDS_OF_BASE.get(kind, "checkpoint"))
    if options.rounding == "calibrated" and options.calibration is None:
        raise WrongUsage(f"{named('rounding', 'calibrated')} needs {named('calibration', 'TEXTS')}")
    if options.device == "cuda":
        from lora_export.weights import cuda

        cuda.require_cuda()
    if base.is_dir() and claimed_kind(options.output) is not None:
        raise WrongUsage(
            f"{base} is a folder, and so is its merge: {named('output', options.output)} is the name of a file. Name a "
            "folder, or merge into the file of weights in the base"
        )
    with no_adapter_as_model(base, options.adapters):
        return (yield from _merging_into(kind, _request(options, base, kind)))


def _merging_into(kind: ArtifactKind, request: MergeRequest) -> Merging[MergeResult]:
    """Merge into a base of this kind."""
    if request.keep_residual is not None:
        residual, output = request.keep_residual.absolute(), request.output.absolute()
        if output in (residual, *residual.parents):
            raise WrongUsage(
                f"{named('keep_residual', request.keep_residual)} is the output or inside it. Name a file beside it"
            )
    # A merge does not wait for what bases of other kinds need to be imported, such as onnx.
    if kind is ArtifactKind.PIPELINE:
        from lora_export.api.merge_pipeline import merge_into_pipeline

        return merge_into_pipeline(request)
    if kind is ArtifactKind.GGUF:
        from lora_export.api.merge_gguf import merge_into_gguf

        return merge_into_gguf(request)
    if kind is not ArtifactKind.GRAPH:
        from lora_export.api.merge_checkpoint import merging_into_checkpoint

        return (yield from merging_into_checkpoint(request))
    from lora_export.api.merge_graph import merge_into_graph

    return merge_into_graph(request)


def _request(options: MergeOptions, base: Path, kind: ArtifactKind) -> MergeRequest:
    """The options with everything found and loaded that they name."""

    def found(path: str | Path | None) -> Path | None:
        return None if path is None else locate(path, options.on_message, options.download)

    checkpoint = found(options.checkpoint)
    sources = locate_adapters(options.adapters, options.on_message, options.download)
    reading = options.reading.for_base(checkpoint or base)
    loaded = read_adapters(options, sources, reading, of_models=kind is not ArtifactKind.GRAPH)

    gguf = ArtifactKind.GGUF.suffixes[0]
    suffixes = {ArtifactKind.GGUF: gguf, ArtifactKind.GRAPH: base.suffix, ArtifactKind.WEIGHTS: base.suffix}

    return extended(
        options,
        MergeRequest,
        base=base,
        adapters=loaded,
        sources=adapter_paths(sources),
        located=sources,
        output=with_suffix(options.output, suffixes[kind]) if kind in suffixes else place(options.output),
        reading=reading,
        layout=dict(options.layout or {}),
        dtype_of=dict(options.dtype_of or {}),
        checkpoint=checkpoint,
        float_base=found(options.float_base),
        hashing=options.hashing if options.sign is None else "sha256",  # a signature is worth what its hashes are
        share_with=None if options.share_with is None else place(options.share_with),
        keep_residual=None if options.keep_residual is None else place(options.keep_residual),
        calibration=calibration_file(options.calibration),
    )
