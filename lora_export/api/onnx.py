"""`lora_export.export_onnx`: a model or an existing graph, with adapters, into one ONNX file."""

from __future__ import annotations

from lora_export.api.generation_task import first_file, task_of
from lora_export.api.load import (
    adapter_paths,
    load_adapters,
    locate_adapters,
    no_adapter_as_model,
    refuse_weights_alone,
)
from lora_export.api.load_model import locate_model, names_kind, refuse_no_source, refuse_pt2
from lora_export.api.onnx_request import OnnxRequest, OnnxResult, check_adapters
from lora_export.api.publish import require_provider
from lora_export.artifacts.files import names_file, with_suffix
from lora_export.errors import InputRefused, WrongUsage
from lora_export.graph.cache_names import IMAGE_INPUTS
from lora_export.isolation.limits import stated_memory
from lora_export.isolation.turns import pytorch_turn
from lora_export.options.common import ModelSource
from lora_export.options.declaring import extended, takes
from lora_export.options.export import IMAGE_TEXT_TO_TEXT, TEXT_GENERATION, OnnxOptions
from lora_export.options.spelling import named
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.hub_cache import locate
from lora_export.storage.npz import read_arrays
from lora_export.storage.store_path import newly_opened, place


@takes(OnnxOptions)
def export_onnx(options: OnnxOptions) -> OnnxResult:
    """Put adapters into an ONNX graph, prove the graph, and only then publish it.

    `model` is a Hugging Face folder, `package.module:factory`, `file.py:factory` or `(module, example_inputs)`: it is
    exported once, with dynamic batch and sequence. Or it is an existing .onnx, quantised ones included: then PyTorch is
    not needed, and the graph itself is the reference of the proof unless `reference` names the PyTorch model. `output`
    is an .onnx: a name without this suffix gets it. With a task it is a folder, which gets the graphs.

    With `lora="inputs"`, each adapter becomes a file NAME.onnx_adapter beside the graph. With "rows", the input
    `adapter_ids` (int64 [batch]) chooses the adapter of each row: 0 is the base, n the n-th adapter. With `per_row`
    above 1, it is [batch, per_row], and so is the input `adapter_scales` (float32), with a factor for each. With
    "slots", the adapters are inputs too (slots + 1, ...), which `AdapterSlots` fills while the graph is in use; those
    that are given become files, and without any the proof generates two.

    With `strength_input`, "nodes" and "inputs" get the input `adapter_strengths` (float32 [adapters], by default 1; of
    "inputs" [1]): a factor of each adapter's change, which every run may choose. The proof runs others than 1, too.

    With `share_with`, an existing graph in the output's folder, the output refers to weights of that graph's data file
    that are equal to its own, and its own file has the others alone.

    The task "text-generation" makes a graph of a causal language model that takes and returns its key/value cache, for
    a prompt and for every token after it. The other tasks make three graphs of a model with an encoder:
    `encoder_model.onnx`, `decoder_model.onnx` for the first tokens, and `decoder_with_past_model.onnx`. That of a model
    that reads images among its tokens, "image-text-to-text", makes `vision_encoder.onnx`, `embed_tokens.onnx` and
    `decoder_model_merged.onnx`. The tokenizer,
    the model's configs and, for a decoder, `genai_config.json` are written beside them.

    Raises InputRefused (MatchError with every misfit) for what does not fit; Different or Undecided, with `.proof`,
    where a proof fails; EnvironmentLacking where the provider does not run; RuntimeRefused where the exporter or
    onnxruntime refuses the model; OutputFailed where a file cannot be written; WrongUsage for options that do not go
    together. Nothing is published then, and an existing output is unchanged.
    """
    refuse_pt2(options.model)
    refuse_weights_alone(options.adapters, options.weights)
    model = locate_model(options.model, options.on_message, options.download)
    with no_adapter_as_model(model, options.adapters), stated_memory(options.memory):
        refuse_no_source(model, or_graph=True)
        request = checked_request(options, model)
        is_graph = names_kind(model, ArtifactKind.GRAPH)
        if request.verify or _runs_without_proof(request, is_graph=is_graph):
            require_provider(request.provider)
        # A graph needs no PyTorch: only what is used is imported, before there is an output to remove again.
        if not is_graph:
            from lora_export.api.onnx_from_model import export_from_model

            with pytorch_turn():
                return export_from_model(request)
        from lora_export.api.onnx_from_graph import export_from_graph

        return export_from_graph(request)


def checked_request(options: OnnxOptions, model: ModelSource) -> OnnxRequest:
    """The options with all that they name, for a model that was found. Does not open it.

    Raises WrongUsage for options that do not go together, and InputRefused for adapters that no such graph takes.
    """
    is_graph = names_kind(model, ArtifactKind.GRAPH)
    options.check_usage(model="graph" if is_graph else "module")
    request = _request(options, model)
    _check_usage(request, is_graph=is_graph)
    check_adapters(request)
    return request


def _request(options: OnnxOptions, model: ModelSource) -> OnnxRequest:
    """The options with everything found and loaded that they name."""
    on_message, download = options.on_message, options.download
    sources = locate_adapters(options.adapters, on_message, download)
    checkpoint = None if options.checkpoint is None else locate(options.checkpoint, on_message, download)
    reference = None if options.reference is None else locate_model(options.reference, on_message, download)
    reading = options.reading.for_base(checkpoint or reference or model)
    task = options.task or (task_of(model, takes_images=_takes_images(options)) if options.with_cache else None)
    return extended(
        options,
        OnnxRequest,
        model=model,
        output=first_file(place(options.output), task) if task else with_suffix(options.output, ".onnx"),
        adapters=load_adapters(sources, options.prefixes, reading=reading, activated=options.lora == "nodes"),
        sources=adapter_paths(sources),
        task=task,
        checkpoint=checkpoint,
        reference=reference,
        inputs=None if options.inputs is None else newly_opened(options.inputs),
        share_with=None if options.share_with is None else place(options.share_with),
    )


def _takes_images(options: OnnxOptions) -> bool:
    """Whether graphs may read images: not where the output is one graph, or the inputs are texts alone."""
    has_images = options.inputs is None or IMAGE_INPUTS[0] in read_arrays(newly_opened(options.inputs))
    return not names_file(place(options.output)) and has_images


def _check_usage(options: OnnxRequest, *, is_graph: bool) -> None:
    """Raise WrongUsage for options whose sum has no meaning."""
    adapters, target, lora = options.adapters, options.target, options.lora
    if options.is_swapped and not options.combined.is_exact:
        raise WrongUsage(
            f"{named('combine')} is for {named('lora', 'merged')} and nodes: in a graph of {named('lora', lora)} "
            "adapters run one by one"
        )
    if is_graph and options.tied == "both":
        raise WrongUsage(
            f"{named('tied', 'both')} is for models: in a graph each layer gets a weight of its own where it changes"
        )
    if is_graph and options.layout and options.reference is None:
        raise WrongUsage(
            f"{named('layout')} is for models: the operators of a graph determine the layout of its weights"
        )
    if lora in ("inputs", "slots") and not adapters and target is None:
        raise WrongUsage(
            f"{named('lora', lora)} needs an adapter ({named('adapters')}), or {named('target')} for future ones"
        )
    if lora == "rows" and not adapters:
        raise WrongUsage(f"{named('lora', lora)} needs the adapters that rows may choose from ({named('adapters')})")
    if is_graph and not adapters and target is None:
        raise WrongUsage(f"MODEL is a graph already: name the adapters to put into it ({named('adapters')})")
    _refuse_beside_parts(options)
    if not options.verify:
        _note_without_proof(options, is_graph=is_graph)
    if any(adapter.invocation_tokens for adapter in adapters):
        _refuse_activated(options, is_graph=is_graph)
    if options.dora and options.per_row > 1:
        raise WrongUsage(f"{named('dora')} and {named('per_row')} exclude each other: DoRA has no sum")
    if options.strength_input and not adapters and target is None:
        raise WrongUsage(f"{named('strength_input')} needs an adapter ({named('adapters')})")
    if options.quantize and options.dtype == "bfloat16" and options.provider == "cpu":
        raise WrongUsage(
            f"{named('quantize')} needs onnxruntime, which does not run {named('dtype', 'bfloat16')} on the CPU"
        )
    if is_graph and options.reference is None and options.dtype != "float32":
        raise WrongUsage(
            f"{named('dtype')} is the precision of a PyTorch model: the one that is exported, or that of "
            f"{named('reference')}"
        )
    if options.reference is not None and names_kind(options.reference, ArtifactKind.GRAPH):
        raise WrongUsage(f"{named('reference')} names a PyTorch model; without it the graph is compared with itself")


def _note_without_proof(options: OnnxRequest, *, is_graph: bool) -> None:
    """Name the options of the proof, where there is none, and a provider that the proof would find lacking.

    An export may have no other example than `inputs`.
    """
    unused = ["reference"] if is_graph else []
    if not (is_graph and options.by_row):
        unused += ["timeout", "memory", *(["inputs"] if is_graph else [])]
    if not _runs_without_proof(options, is_graph=is_graph):
        unused += ["provider"]
    if names := [named(name) for name in unused if name in options.chosen()]:
        options.on_message(f"note: no effect without a proof ({named('verify', False)}): {' and '.join(names)}")
    if options.dtype == "bfloat16" and options.provider == "cpu":
        options.on_message("note: onnxruntime's CPU provider has no kernels for bfloat16: it does not load the graph")


def _runs_without_proof(options: OnnxRequest, *, is_graph: bool) -> bool:
    """Whether a provider counts without a proof.

    The shapes of a graph for rows may be measured by a run, and whether there is a provider for bf16 is checked before
    a graph is quantised.
    """
    return (is_graph and options.by_row) or (options.quantize is not None and options.dtype == "bfloat16")


def _refuse_beside_parts(options: OnnxRequest) -> None:
    """Raise WrongUsage for options that models of three graphs do not have."""
    if not options.has_parts:
        return
    task, has_images = options.task, options.task == IMAGE_TEXT_TO_TEXT
    refused = {
        f"{named('fuse')} is for decoders alone, not for {task}": options.fuse is not None,
        f"{named('strength_input')} is not for {task}, whose adapters are in several graphs": options.strength_input,
        f"{named('target')} is not for {task}: graphs take adapters where {named('adapters')} has them": (
            has_images and options.target is not None
        ),
        f"{named('lora', options.lora)} is not for {task}: its vision encoder takes images, and no rows": (
            has_images and options.by_row
        ),
    }
    for why in (text for text, holds in refused.items() if holds):
        raise WrongUsage(f"{why}. Its texts alone: {named('task', TEXT_GENERATION)}" if has_images else why)


def _refuse_activated(options: OnnxRequest, *, is_graph: bool) -> None:
    """Raise InputRefused for an activated LoRA where its tokens, or what it computes, are not known."""
    if options.task:
        raise InputRefused(
            "an activated LoRA needs whole texts, and a graph with a cache does not get the earlier tokens, which show "
            f"whether it acts. Leave out {named('with_cache')} and {named('task')}"
        )
    if is_graph and options.verify and options.reference is None:
        raise InputRefused(
            f"a graph alone cannot be the reference of an activated LoRA: name its PyTorch model ({named('reference')})"
        )
