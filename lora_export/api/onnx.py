"""`lora_export.export_onnx`: a model or an existing graph, with adapters, into one ONNX file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_export.adapters.combination import Combination
from lora_export.api.application import Application
from lora_export.api.callbacks import OnMessage, OnProgress, ignore
from lora_export.api.generation_task import first_file, task_of
from lora_export.api.load import (
    AdapterSources,
    ModelSource,
    adapter_paths,
    load_adapters,
    locate_adapters,
    locate_model,
    refuse_no_source,
    refuse_pt2,
    refuse_weights_alone,
)
from lora_export.api.onnx_options import (
    CACHED_TASKS,
    FUSED_FOR,
    QUANTISED_KINDS,
    TEXT_GENERATION,
    OnnxOptions,
    OnnxResult,
    check_adapters,
)
from lora_export.api.output_names import with_suffix
from lora_export.api.publish import require_provider
from lora_export.errors import WrongUsage
from lora_export.formats.read_options import DEFAULTS, ReadOptions
from lora_export.plan import Tied
from lora_export.runtime.runner import TIMEOUT
from lora_export.storage.hub_cache import locate


def export_onnx(
    model: ModelSource,
    output: str | Path,
    *,
    adapters: AdapterSources = (),
    weights: Sequence[float] = (),
    prefixes: Mapping[str, str] | None = None,
    reading: ReadOptions = DEFAULTS,
    combination: str | Combination = "cat",
    tied: str = "error",
    lora: str = "merged",
    target: str | Sequence[str] | None = None,
    dora: bool = False,
    names: str = "olive",
    max_rank: int | None = None,
    required_inputs: bool = False,
    per_row: int = 1,
    task: str | None = None,
    with_cache: bool = False,
    fuse: str | None = None,
    opset: int | None = None,
    dtype: str = "float32",
    quantize: str | None = None,
    checkpoint: str | Path | None = None,
    reference: ModelSource | None = None,
    inputs: str | Path | None = None,
    provider: str = "cpu",
    ignore_head: bool = False,
    timeout: float = TIMEOUT,
    verify: bool = True,
    overwrite: bool = False,
    download: bool = False,
    on_message: OnMessage = ignore,
    on_progress: OnProgress = ignore,
) -> OnnxResult:
    """Put adapters into an ONNX graph, prove the graph, and only then publish it.

    `model` is a Hugging Face folder, `package.module:factory`, `file.py:factory` or `(module, example_inputs)`: it is
    exported once, in `dtype` ("float32", "float16" or "bfloat16"), with dynamic batch and sequence. Or it is an
    existing .onnx, quantised ones included: then PyTorch is not needed, and the graph itself is the reference of the
    proof unless `reference` names the PyTorch model. `checkpoint` is what an existing graph was exported from: it names
    weights whose names were lost. `opset` is the ONNX operator set (default: the exporter's).

    `prefixes` (FROM -> TO) replaces the beginnings of names in the adapters. `reading` states what the files of
    adapters do not record. `combination` and `tied` are those of `merge`.

    `lora` is "merged" (folded into the weights), "nodes" (A and B as nodes beside the weights), "inputs" (A and B are
    optional inputs, and each adapter becomes a file NAME.onnx_adapter beside the graph) or "rows" (the input
    `adapter_ids`, int64 [batch], chooses the adapter of each row: 0 is the base, n the n-th adapter). `weights` has one
    factor for each adapter. With "inputs", `target` adds inputs at further layers for future adapters ("all-linear" or
    endings of layer names), `dora` lets these have DoRA, and `names` is the naming convention of the inputs: "olive",
    "genai" or "peft".

    With "inputs" and "rows", `max_rank` pads the rank of every adapter to this number with zeros, so that no shape of
    an adapter is dynamic. An adapter of a larger rank is refused.

    With "inputs" and `required_inputs`, the inputs have no default: every run has to feed them, as JavaScript does.

    With "rows" and `per_row` above 1, each row has so many adapters: `adapter_ids` is [batch, per_row], and so is the
    input `adapter_scales` (float32), with a factor for each.

    `task` "text-generation" makes a graph of a causal language model that takes and returns its key/value cache, for a
    prompt and for every token after it. "text2text-generation", "automatic-speech-recognition" and "image-to-text" make
    three graphs of a model with an encoder: `encoder_model.onnx`, `decoder_model.onnx` for the first tokens, and
    `decoder_with_past_model.onnx`. The tokenizer, the model's configs and, for a decoder, `genai_config.json` are
    written beside them. `with_cache` chooses the task by the model's class. `fuse` ("cpu", "cuda" or "webgpu") puts
    onnxruntime's own operators for that provider into the graph, such as GroupQueryAttention; it then runs in
    onnxruntime only.

    `quantize` ("int4" or "int8") stores the weights of linear layers in 4 or 8 bits, in blocks of 32 with a scale each.
    Adapters beside the weights stay floats; a merged graph is quantised after the merge.

    With "inputs" and "rows", `ignore_head` leaves out a task head that the adapters save whole, where it is equal to
    the model's own.

    `output` is an .onnx: a name without this suffix gets it. With a task it is a folder, which gets the graphs.

    `inputs` is an .npz of further inputs for the proof. `provider` ("cpu" or "cuda") is where onnxruntime has to run.
    A run of a graph is stopped after `timeout` seconds.

    With `download`, what the cache lacks of a name of the Hugging Face Hub is downloaded (`owner/name[@revision]`).
    Then EnvironmentLacking is raised without a connection.

    Raises InputRefused (MatchError with every misfit) for what does not fit; Different or Undecided, with `.proof`,
    where a proof fails; EnvironmentLacking where the provider does not run; RuntimeRefused where the exporter or
    onnxruntime refuses the model; OutputFailed where a file cannot be written; WrongUsage for options that do not go
    together. Nothing is published then, and an existing output is unchanged.
    """
    refuse_pt2(model)
    refuse_weights_alone(adapters, weights)
    model = locate_model(model, on_message, download)
    refuse_no_source(model)
    adapters = locate_adapters(adapters, on_message, download)
    is_graph = isinstance(model, str | Path) and str(model).endswith(".onnx")
    if task not in (None, *CACHED_TASKS):
        raise WrongUsage(f"--task {task} is unknown; the tasks with a cache are {', '.join(CACHED_TASKS)}")
    if with_cache and task is None:
        task = TEXT_GENERATION if is_graph else task_of(model)
    options = OnnxOptions(
        output=first_file(Path(output), task) if task else with_suffix(output, ".onnx"),
        lora=lora,
        adapters=load_adapters(adapters, prefixes, reading=reading.for_base(checkpoint or reference or model)),
        weights=tuple(weights),
        sources=tuple(adapter_paths(adapters)),
        application=Application.of(combination, tied),
        target=target,
        dora=dora,
        names=names,
        max_rank=max_rank,
        required_inputs=required_inputs,
        per_row=per_row,
        task=task,
        fuse=fuse,
        quantize=quantize,
        inputs=None if inputs is None else Path(inputs),
        provider=provider,
        ignore_head=ignore_head,
        timeout=timeout,
        verify=verify,
        overwrite=overwrite,
        on_message=on_message,
        on_progress=on_progress,
    )
    _check_usage(options, is_graph=is_graph, opset=opset, checkpoint=checkpoint, reference=reference, dtype=dtype)
    require_provider(provider)
    check_adapters(options)
    # A graph needs no PyTorch: only what is used is imported, before there is an output to remove again.
    if not is_graph:
        from lora_export.api.onnx_from_model import export_from_model

        return export_from_model(model, options, dtype=dtype, opset=opset)
    from lora_export.api.onnx_from_graph import export_from_graph

    names_from = None if checkpoint is None else locate(checkpoint, on_message, download)
    reference = None if reference is None else locate_model(reference, on_message, download)
    return export_from_graph(Path(str(model)), options, checkpoint=names_from, reference=reference, dtype=dtype)


def _check_usage(
    options: OnnxOptions,
    *,
    is_graph: bool,
    opset: int | None,
    checkpoint: str | Path | None,
    reference: ModelSource | None,
    dtype: str,
) -> None:
    """Raise WrongUsage for options that do not go together."""
    adapters, target, lora = options.adapters, options.target, options.lora
    if lora != "inputs" and options.dora:
        raise WrongUsage("--dora is for --lora inputs: other graphs contain the adapters of -a and no others")
    if lora != "inputs" and target is not None:
        raise WrongUsage("--target is for --lora inputs: other graphs contain the adapters of -a and no others")
    if options.required_inputs and lora != "inputs":
        raise WrongUsage("--required-inputs is for --lora inputs")
    if options.per_row != 1 and options.lora != "rows":
        raise WrongUsage("--adapters-per-row is for --lora rows")
    if options.per_row < 1:
        raise WrongUsage(f"--adapters-per-row {options.per_row}: the smallest is 1")
    if options.max_rank is not None and not options.is_swapped:
        raise WrongUsage("--max-rank is for --lora inputs and rows: in other graphs an adapter has its own rank")
    if options.max_rank is not None and options.max_rank < 1:
        raise WrongUsage(f"--max-rank {options.max_rank}: the smallest is 1")
    if options.ignore_head and not options.is_swapped:
        raise WrongUsage("--ignore-head is for --lora inputs and rows: other graphs contain the head of the adapter")
    if options.is_swapped and not options.application.combination.is_exact:
        raise WrongUsage(
            f"--combine is for --lora merged and nodes: in a graph of --lora {lora} adapters run one by one"
        )
    if is_graph and options.application.tied is Tied.BOTH:
        raise WrongUsage("--tied both is for models: in a graph each layer gets a weight of its own where it changes")
    if lora == "inputs" and not adapters and target is None:
        raise WrongUsage("--lora inputs needs an adapter (-a), or --target for future ones")
    if lora == "rows" and not adapters:
        raise WrongUsage("--lora rows needs the adapters that rows may choose from (-a)")
    if is_graph and not adapters and target is None:
        raise WrongUsage("MODEL is a graph already: name the adapters to put into it (-a)")
    if options.has_encoder and target is not None:
        raise WrongUsage(f"--target is not for {options.task}: inputs are where the adapters of -a are")
    if options.has_encoder and options.fuse:
        raise WrongUsage(f"--fuse is for decoders alone, not for {options.task}")
    if options.fuse not in (None, *FUSED_FOR):
        raise WrongUsage(f"--fuse {options.fuse} is unknown; graphs are fused for {', '.join(FUSED_FOR)}")
    if options.quantize not in (None, *QUANTISED_KINDS):
        raise WrongUsage(
            f"--quantize {options.quantize} is unknown; weights are quantised to {', '.join(QUANTISED_KINDS)}"
        )
    if options.quantize and dtype == "bfloat16" and options.provider == "cpu":
        raise WrongUsage("--quantize needs onnxruntime, which does not run --dtype bfloat16 on the CPU")
    if is_graph and options.quantize:
        raise WrongUsage(
            "--quantize is for models that are exported; MODEL is a graph already. A graph that other tools quantised "
            "is a MODEL, too"
        )
    if is_graph and options.task:
        raise WrongUsage("--task and --with-cache are for models that are exported; MODEL is a graph already")
    if is_graph and options.fuse:
        raise WrongUsage("--fuse is for models that are exported; MODEL is a graph already")
    if is_graph and opset is not None:
        raise WrongUsage("--opset is for models that are exported; MODEL is a graph already")
    if not is_graph and (checkpoint, reference) != (None, None):
        raise WrongUsage("--base and --model are for an .onnx MODEL")
    if is_graph and reference is None and dtype != "float32":
        raise WrongUsage("--dtype is the precision of a PyTorch model: the one that is exported, or that of --model")
    if isinstance(reference, str | Path) and str(reference).endswith(".onnx"):
        raise WrongUsage("--model names a PyTorch model; without it the graph is compared with itself")
