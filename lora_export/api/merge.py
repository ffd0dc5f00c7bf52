"""`lora_export.merge`: adapters into the weights of a checkpoint or a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from lora_export.adapters.combination import Combination
from lora_export.api.callbacks import OnMessage, OnProgress, ignore
from lora_export.api.load import AdapterSources, adapter_paths, load_adapters, locate_adapters
from lora_export.api.merge_checkpoint import merge_into_checkpoint
from lora_export.api.merge_pipeline import merge_into_pipeline
from lora_export.api.merge_request import MergeRequest, MergeResult
from lora_export.api.output_names import with_suffix
from lora_export.api.shared_head import head_alone
from lora_export.errors import WrongUsage
from lora_export.formats.read_options import DEFAULTS, ReadOptions
from lora_export.plan import Tied
from lora_export.storage.hub_cache import locate
from lora_export.weights.merge_report import MIN_RETENTION
from lora_export.weights.pipeline import is_pipeline


def merge(
    base: str | Path,
    adapters: AdapterSources,
    output: str | Path,
    *,
    weights: Sequence[float] = (),
    dtype: str = "keep",
    min_retention: float = MIN_RETENTION,
    hashing: str = "xxh3_128",
    checkpoint: str | Path | None = None,
    requantize: bool = False,
    dequantize: bool = False,
    float_base: str | Path | None = None,
    variant: str | None = None,
    layout: Mapping[str, str] | None = None,
    prefixes: Mapping[str, str] | None = None,
    combination: str | Combination = "cat",
    reading: ReadOptions = DEFAULTS,
    tied: str = "error",
    only_head: bool = False,
    keep_residual: str | Path | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    overwrite: bool = False,
    download: bool = False,
    on_message: OnMessage = ignore,
    on_progress: OnProgress = ignore,
) -> MergeResult:
    """Merge adapters into the weights of a base: W' = W + Σ weight·scale·B·A, summed in fp32 and rounded once.

    `base` is a Hugging Face folder, a .safetensors file or an .onnx file; `output` becomes the same kind, with the same
    layout. `adapters` are paths, `NAME=PATH` or loaded adapters; `weights` has one factor for each (default 1.0).
    `dtype` is the type in which floats of a checkpoint are stored: "keep", "float32", "bfloat16" or "float16".
    `min_retention` (0 to 1) is the least part of a weight's change that has to survive rounding.
    `hashing` is "xxh3_128" or "sha256". For an .onnx base, `checkpoint` is what it was exported from: it names weights
    whose names were lost; `requantize` merges into quantised weights too. With `dequantize`, a base that is
    quantised (bitsandbytes, fp8, mxfp4, compressed-tensors, modelopt, GPTQ, AWQ) becomes a float model: each weight is
    what the base's library makes of it. Without, it is refused. `float_base` is the float checkpoint that it was made
    from: the report then has the quantisation error of each weight beside its change (`quantisation`).
    `variant` chooses the weights in a folder with several sets: "fp16" those of `model.fp16.safetensors`, "none" those
    of `model.safetensors`. The others of a changed model are left out.
    `device` is "cpu" or "cuda".
    `layout` states how matrices of a checkpoint are stored, where neither its config nor an adapter does: the name of
    a tensor or module, or a glob, -> "out_in" (nn.Linear) or "in_out" (Conv1D). The last entry that matches counts.
    `prefixes` (FROM -> TO) replaces the beginnings of names in the adapters, before they are matched.
    `combination` is how the pairs of several adapters on one weight are combined: "cat", the exact sum, or another
    method of PEFT's `add_weighted_adapter`, by its name or as a `Combination`.
    `reading` states what the files of adapters do not record: a format where several fit, rank, alpha, the order of
    the columns of B on experts; and whether pickles are read.
    `tied` is what happens to tied embeddings of which an adapter changes one: "error" refuses it, "untie" gives each a
    tensor of its own (and the config `tie_word_embeddings: false`), "both" changes both.
    The folder of a diffusion pipeline is a base too: each model that an adapter changes is merged, the rest is copied.
    An adapter with changes for several models needs the pipeline, or a component in `reading`: "unet", "transformer",
    "text_encoder", ...
    `keep_residual` is a file to write: with it, the output and the adapters, `unmerge` makes the base again.
    With `only_head`, only the tensors that the adapters save whole are merged: a task head.
    With `dry_run` the plan is made and nothing is written.

    Needs no PyTorch unless `device` is "cuda". Peak memory is a few blocks, whatever the size of the model.

    With `download`, what the cache lacks of a name of the Hugging Face Hub is downloaded (`owner/name[@revision]`).
    Then EnvironmentLacking is raised without a connection.

    Raises InputRefused (MatchError with every misfit) for what is damaged, does not fit or would lose too much;
    OutputFailed where the output cannot be written; EnvironmentLacking where CUDA is missing; WrongUsage for options
    that do not go together. After an error an existing output is unchanged, and nothing new is left behind.
    """
    combination = Combination(combination) if isinstance(combination, str) else combination
    base, adapters = locate(base, on_message, download), locate_adapters(adapters, on_message, download)
    if device == "cuda":
        from lora_export.weights import cuda

        cuda.require_cuda()
    of_pipeline = is_pipeline(base)
    if of_pipeline:
        _refuse_for_pipeline(
            {
                "--base": checkpoint is not None,
                "--requantize": requantize,
                "--dequantize": dequantize,
                "--only-head": only_head,
                "--keep-residual": keep_residual is not None,
                "--tied": tied != "error",
                "--device cuda": device != "cpu",
            }
        )
    reading = reading.for_base(checkpoint or base)
    loaded = load_adapters(adapters, prefixes, reading=reading, of_models=base.suffix != ".onnx")
    paths = adapter_paths(adapters)
    if only_head:
        loaded = [head_alone(adapter) for adapter in loaded]
    stored = None if dtype == "keep" else dtype
    plan_settings = {
        "layout": dict(layout or {}),
        "prefixes": dict(prefixes or {}),
        "reading": reading.recorded,
        "combination": asdict(combination),
        "tied": str(Tied(tied)),
    }
    request = MergeRequest(
        base=base,
        adapters=loaded,
        sources=paths,
        output=with_suffix(output, base.suffix) if base.suffix in (".onnx", ".safetensors") else Path(output),
        weights=weights,
        min_retention=min_retention,
        hashing=hashing,
        device=device,
        layout=dict(layout or {}),
        combination=combination,
        tied=Tied(tied),
        float_base=None if float_base is None else locate(float_base, on_message, download),
        variant=variant,
        residual=None if keep_residual is None else Path(keep_residual),
        plan_settings=plan_settings,
        dry_run=dry_run,
        overwrite=overwrite,
        on_message=on_message,
        on_progress=on_progress,
    )
    if float_base is not None and not dequantize:
        raise WrongUsage("--float-base needs --dequantize: it is compared with the weights of a quantised BASE")
    if of_pipeline:
        return merge_into_pipeline(request, stored)
    if base.suffix == ".onnx":
        _refuse_for_graph(request, stored, dequantize=dequantize)
        # A merge into a checkpoint does not wait for onnx to be imported.
        from lora_export.api.merge_graph import merge_into_graph

        names_from = None if checkpoint is None else locate(checkpoint, on_message, download)
        return merge_into_graph(request, names_from, requantize=requantize)
    if checkpoint is not None:
        raise WrongUsage("--base is for an .onnx BASE: the weights of a checkpoint have their names")
    if requantize:
        raise WrongUsage("--requantize is for an .onnx BASE: merging into a quantised checkpoint is not supported")
    if request.residual is not None:
        if dequantize:
            raise WrongUsage("--keep-residual and --dequantize do not go together. Keep the quantised base itself")
        _refuse_place(request.residual, request.output)
    return merge_into_checkpoint(request, stored, dequantise=dequantize)


def _refuse_for_graph(request: MergeRequest, dtype: str | None, *, dequantize: bool) -> None:
    """Raise WrongUsage for options that do not apply to an .onnx BASE."""
    reasons = (
        (request.variant, "--variant is for folders of checkpoints, which may have several sets of weights"),
        (dtype, "--dtype is for checkpoints: the weights of a graph keep the types that its nodes expect"),
        (request.layout, "--layout is for checkpoints: a graph's operators determine the layout of its weights"),
        (dequantize, "--dequantize is for checkpoints. --requantize merges into the quantised weights of a graph"),
        (request.residual, "--keep-residual is for checkpoints. Keep the graph itself"),
        (
            request.tied is not Tied.ERROR,
            "--tied is for checkpoints: in a graph each layer gets a weight of its own where it changes",
        ),
    )
    for is_given, why in reasons:
        if is_given:
            raise WrongUsage(why)


def _refuse_for_pipeline(given: Mapping[str, bool]) -> None:
    """Raise WrongUsage for options that do not apply to the folder of a pipeline."""
    if wrong := [option for option, is_given in given.items() if is_given]:
        raise WrongUsage(f"{', '.join(wrong)} is not for a pipeline. Give the folder of one of its models as BASE")


def _refuse_place(residual: Path, output: Path) -> None:
    """Raise WrongUsage for a residual in the place of the output, or within it."""
    one, other = residual.absolute(), output.absolute()
    if one == other or other in one.parents:
        raise WrongUsage(f"--keep-residual {residual} is the output or inside it. Name a file beside it")
