"""`lora_export.merge`: adapters into the weights of a checkpoint or a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from lora_export import plan
from lora_export.adapters.combination import Combination
from lora_export.adapters.combine import combine_in_plan
from lora_export.api.callbacks import OnMessage, OnProgress, ignore, in_bytes
from lora_export.api.generation_files import copy_generation_files, size_of_generation_files
from lora_export.api.load import AdapterSources, adapter_paths, load_adapters, locate_adapters
from lora_export.api.merge_pipeline import merge_into_pipeline, plan_of_all, plan_pipeline
from lora_export.api.output_names import with_suffix
from lora_export.api.shared_head import head_alone
from lora_export.errors import InputRefused, WrongUsage
from lora_export.formats.read_options import DEFAULTS, ReadOptions
from lora_export.lora import Adapter
from lora_export.plan import Plan, Tied
from lora_export.plan.spelling import respelled
from lora_export.storage import atomic_output, input_files
from lora_export.storage.hub_cache import HUB_NAME, hub_name, locate
from lora_export.weights.apply_step import Backend
from lora_export.weights.checkpoint import Checkpoint, custom_code, open_checkpoint
from lora_export.weights.merge import merge_checkpoint, output_size, refuse_before_merge
from lora_export.weights.merge_report import MIN_RETENTION, MergeReport, refuse_no_change
from lora_export.weights.pipeline import is_pipeline, open_pipeline
from lora_export.weights.quantisation_loss import (
    bytes_to_measure,
    measure_quantisation,
    notes_on_quantisation,
    refuse_other_shapes,
)
from lora_export.weights.quantised import caution_for
from lora_export.weights.residuals.writing import refuse_without_hash, write_residual
from lora_export.weights.tied_tensors import tied_as_remedy, ties_of

FLOAT32 = "--dtype float32 keeps it"
NODES = "keep the adapter beside the weights (onnx MODEL.onnx --lora nodes)"


@dataclass(frozen=True)
class MergeResult:
    """What a merge did. `str()` of `plan` is the list of weights with the pairs that are added to each."""

    output: Path
    plan: Plan
    report: MergeReport | None  # None after a dry run: nothing was written
    notes: tuple[str, ...]  # what the caller should know: on the adapters, the plan and the base
    residual_bytes: int | None = None  # the size of the residual, where one was kept


@dataclass(frozen=True)
class _Options:
    """The arguments of `merge` that are the same for a checkpoint and a graph."""

    base: Path
    adapters: Sequence[Adapter]
    sources: Sequence[Path]  # the paths of the adapters
    output: Path
    weights: Sequence[float]
    min_retention: float
    hashing: str
    device: str
    layout: Mapping[str, str]
    combination: Combination
    tied: Tied
    float_base: Path | None
    residual: Path | None
    plan_settings: Mapping[str, Any]  # what `unmerge` needs to make the same plan
    dry_run: bool
    overwrite: bool
    on_message: OnMessage = field(repr=False)
    on_progress: OnProgress = field(repr=False)


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
    residual = None if keep_residual is None else Path(keep_residual)
    plan_settings = {
        "layout": dict(layout or {}),
        "prefixes": dict(prefixes or {}),
        "reading": reading.recorded,
        "combination": asdict(combination),
        "tied": str(Tied(tied)),
    }
    target = with_suffix(output, base.suffix) if base.suffix in (".onnx", ".safetensors") else Path(output)
    options = _Options(
        base, loaded, paths, target, weights, min_retention, hashing, device, dict(layout or {}), combination,
        Tied(tied), None if float_base is None else locate(float_base, on_message, download), residual, plan_settings,
        dry_run, overwrite, on_message, on_progress,
    )  # fmt: skip
    if float_base is not None and not dequantize:
        raise WrongUsage("--float-base needs --dequantize: it is compared with the weights of a quantised BASE")
    if of_pipeline:
        return _into_pipeline(options, stored)
    if base.suffix == ".onnx":
        if stored:
            raise WrongUsage("--dtype is for checkpoints: the weights of a graph keep the types that its nodes expect")
        if options.layout:
            raise WrongUsage("--layout is for checkpoints: a graph's operators determine the layout of its weights")
        if dequantize:
            raise WrongUsage(
                "--dequantize is for checkpoints. --requantize merges into the quantised weights of a graph"
            )
        if residual is not None:
            raise WrongUsage("--keep-residual is for checkpoints. Keep the graph itself")
        if options.tied is not Tied.ERROR:
            raise WrongUsage(
                "--tied is for checkpoints: in a graph each layer gets a weight of its own where it changes"
            )
        names_from = None if checkpoint is None else locate(checkpoint, on_message, download)
        return _into_graph(options, names_from, requantize=requantize)
    if checkpoint is not None:
        raise WrongUsage("--base is for an .onnx BASE: the weights of a checkpoint have their names")
    if requantize:
        raise WrongUsage("--requantize is for an .onnx BASE: merging into a quantised checkpoint is not supported")
    if residual is not None:
        if dequantize:
            raise WrongUsage("--keep-residual and --dequantize do not go together. Keep the quantised base itself")
        _refuse_place(residual, target)
    return _into_checkpoint(options, stored, dequantise=dequantize)


def _refuse_for_pipeline(given: Mapping[str, bool]) -> None:
    """Raise WrongUsage for options that do not apply to the folder of a pipeline."""
    if wrong := [option for option, is_given in given.items() if is_given]:
        raise WrongUsage(f"{', '.join(wrong)} is not for a pipeline. Give the folder of one of its models as BASE")


def _into_pipeline(options: _Options, dtype: str | None) -> MergeResult:
    pipeline = open_pipeline(options.base)
    merges, unchanged = plan_pipeline(pipeline, options.adapters, options.weights, options.layout, options.combination)
    strengths = options.weights or [1.0] * len(options.adapters)
    whole = plan_of_all(merges, options.adapters, strengths)
    notes = [note for each in merges for note in _notes_on(each.checkpoint, options.adapters)]
    notes = list(_report_notes(options, whole, list(dict.fromkeys((*unchanged, *notes)))))
    if options.dry_run:
        return MergeResult(options.output, whole, None, tuple(notes))
    report = merge_into_pipeline(
        pipeline,
        options.adapters,
        merges,
        options.output,
        strengths=strengths,
        inputs=[options.base, *options.sources],
        dtype=dtype,
        min_retention=options.min_retention,
        hashing=options.hashing,
        settings=options.combination.settings,
        overwrite=options.overwrite,
        on_message=options.on_message,
        on_progress=options.on_progress,
    )
    _warn_of_rounding(report, FLOAT32, options.on_message)
    return MergeResult(options.output, whole, report, tuple(notes))


def _into_checkpoint(options: _Options, dtype: str | None, *, dequantise: bool) -> MergeResult:
    checkpoint = open_checkpoint(options.base, dequantise=dequantise)
    if dequantise and not checkpoint.quantised:
        raise InputRefused(f"{options.base} is not quantised. Leave --dequantize out")
    floats = None if options.float_base is None else open_checkpoint(options.float_base)
    if floats is not None:
        refuse_other_shapes(checkpoint, floats)
    # Raises for links that lead out of the folder: before the work, not after it.
    companions = sum((checkpoint.path / name).stat().st_size for name in checkpoint.other_files())
    with tied_as_remedy(checkpoint, options.tied):
        steps = plan.make(
            options.adapters,
            checkpoint.specs,
            strengths=options.weights,
            may_add=True,
            layout=options.layout,
            rules=checkpoint.rules,
            ties=ties_of(checkpoint, options.tied),
        )
    steps = combine_in_plan(steps, options.combination)
    refuse_before_merge(steps, checkpoint)
    if options.residual is not None:
        refuse_without_hash(steps)
    notes = _report_notes(options, steps, _notes_on(checkpoint, options.adapters))
    if options.dry_run:
        return MergeResult(options.output, steps, None, notes)
    stage = atomic_output.stage_folder if checkpoint.is_folder else atomic_output.stage_file
    size = output_size(steps, checkpoint, dtype)
    with _backend(options.device) as backend, _staged(options, stage, size + companions) as folder:
        report = merge_checkpoint(
            steps,
            checkpoint,
            folder,
            file_name=options.output.name,
            dtype=dtype,
            min_retention=options.min_retention,
            hashing=options.hashing,
            progress=in_bytes(options.on_progress, "merging", size),
            backend=backend,
            more_settings=options.combination.settings,
        )
        refuse_no_change(report)
        if floats is not None:
            report, more = _with_quantisation(report, checkpoint, floats, steps, options)
            notes = (*notes, *more)
        residual_bytes = None if options.residual is None else _keep_residual(options, steps, checkpoint, folder)
    _warn_of_rounding(report, FLOAT32, options.on_message)
    return MergeResult(options.output, steps, report, notes, residual_bytes)


def _keep_residual(options: _Options, steps: Plan, base: Checkpoint, merged: Path) -> int:
    """Write the residual of a merge that is not published yet. Returns its size in bytes."""
    assert options.residual is not None
    size = sum(step.spec.nbytes for step in steps.steps)
    with atomic_output.stage_file(
        options.residual,
        inputs=[options.base, *options.sources],
        overwrite=options.overwrite,
        on_message=options.on_message,
    ) as folder:
        path = folder / options.residual.name
        write_residual(
            path,
            steps,
            base,
            merged if base.is_folder else merged / options.output.name,
            hashing=options.hashing,
            settings=options.plan_settings,
            progress=in_bytes(options.on_progress, "keeping the residual", size),
        )
        written = path.stat().st_size
    options.on_message(
        f"note: {options.residual} has {written:,} bytes, {written / base.nbytes:.2%} of the base: with it and the "
        "adapters, `lora-export unmerge` makes the base again"
    )
    return written


def _refuse_place(residual: Path, output: Path) -> None:
    """Raise WrongUsage for a residual in the place of the output, or within it."""
    one, other = residual.absolute(), output.absolute()
    if one == other or other in one.parents:
        raise WrongUsage(f"--keep-residual {residual} is the output or inside it. Name a file beside it")


def _with_quantisation(
    report: MergeReport, base: Checkpoint, floats: Checkpoint, steps: Plan, options: _Options
) -> tuple[MergeReport, list[str]]:
    """The report with the quantisation error of each weight, and the notes on it."""
    progress = in_bytes(options.on_progress, "measuring the quantisation", bytes_to_measure(base))
    losses = measure_quantisation(base, floats, steps, report.results, progress)
    notes = list(notes_on_quantisation(base, floats, losses))
    for note in notes:
        options.on_message(f"note: {note}")
    return replace(report, quantisation=losses), notes


def _into_graph(options: _Options, origin: Path | None, *, requantize: bool) -> MergeResult:
    # A merge into a checkpoint does not wait for onnx to be imported.
    from lora_export.graph.find_sites import find_sites
    from lora_export.graph.merge.merge_graph import merge_graph, refuse_before_graph_merge
    from lora_export.graph.onnx_file.reading import open_graph
    from lora_export.graph.quantised.scheme_of_weight import requantise_notes
    from lora_export.graph.refusals import base_as_remedy

    input_files.must_exist(options.base, "base model")
    graph = open_graph(options.base)
    checkpoint = None if origin is None else open_checkpoint(origin)
    sites = find_sites(graph.model, checkpoint)
    if checkpoint is not None:
        options = replace(options, adapters=respelled(options.adapters, sites.specs, checkpoint.rules))
    with base_as_remedy(sites) if origin is None else contextlib.nullcontext():
        steps = plan.make(options.adapters, sites.specs, strengths=options.weights)
    steps = combine_in_plan(steps, options.combination)
    refuse_before_graph_merge(steps, graph, sites, requantise=requantize)
    quantised = requantise_notes(steps, graph.model, sites) if requantize else ()
    notes = _report_notes(options, steps, [*sites.notes, *quantised])
    if options.dry_run:
        return MergeResult(options.output, steps, None, notes)
    with (
        _backend(options.device) as backend,
        _staged(options, atomic_output.stage_file, graph.nbytes + size_of_generation_files(options.base)) as folder,
    ):
        report = merge_graph(
            steps,
            graph,
            sites,
            folder,
            file_name=options.output.name,
            min_retention=options.min_retention,
            hashing=options.hashing,
            progress=in_bytes(options.on_progress, "merging", graph.nbytes),
            requantise=requantize,
            backend=backend,
            more_settings=options.combination.settings,
        )
        refuse_no_change(report)
        copy_generation_files(options.base, options.output, folder, options.on_message)
    _warn_of_rounding(report, NODES, options.on_message)
    return MergeResult(options.output, steps, report, notes)


def _backend(device: str) -> AbstractContextManager[Backend | None]:
    if device == "cpu":
        return contextlib.nullcontext()
    from lora_export.weights import cuda

    return cuda.cuda()


def _staged(options: _Options, stage: Any, size: int) -> AbstractContextManager[Path]:
    staged: AbstractContextManager[Path] = stage(
        options.output,
        inputs=[options.base, *options.sources],
        overwrite=options.overwrite,
        required_bytes=size,
        on_message=options.on_message,
    )
    return staged


def _report_notes(options: _Options, steps: Plan, more: Sequence[str]) -> tuple[str, ...]:
    in_plan = () if options.dry_run else steps.notes  # a printed plan contains its notes
    notes = (*(note for adapter in options.adapters for note in adapter.notes), *in_plan, *more)
    for note in notes:
        options.on_message(f"note: {note}")
    return notes


def _warn_of_rounding(report: MergeReport, remedy: str, on_message: OnMessage) -> None:
    if report.below_rounding:
        worst = min(report.below_rounding, key=lambda result: result.retention)
        on_message(
            f"warning: rounding took more than a tenth of the change of {len(report.below_rounding)} of "
            f"{len(report.results)} weights, most of {worst.weight} ({worst.retention:.0%} is left); {remedy}"
        )


def _notes_on(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> list[str]:
    notes = list(_other_bases(adapters, checkpoint))
    if code := custom_code(checkpoint.config):
        notes.append(f"the base's config names code of its own ({code}): it is copied, and was not run")
    if checkpoint.quantised:
        schemes = ", ".join(sorted({tensor.scheme for tensor in checkpoint.quantised.values()}))
        number = len(checkpoint.quantised)
        notes.append(
            f"{number} quantised weights ({schemes}) are stored as floats. An adapter that was trained beside them "
            "fits them; their distance from the original float weights stays in the output"
        )
        notes += sorted({caution for tensor in checkpoint.quantised.values() if (caution := caution_for(tensor))})
    return notes + [
        f"{name} contains weights too, unmerged ones; it is left out" for name in checkpoint.unmerged_weights()
    ]


def _other_bases(adapters: Sequence[Adapter], base: Checkpoint) -> Iterator[str]:
    """Adapters that name another model of the Hub than this base. A note only: a name does not identify weights.

    A local path in an adapter's config means nothing on this machine.
    """
    own = [name for name in (hub_name(base.path), base.config.get("_name_or_path")) if _is_hub_name(name)]
    known = {_without_owner(name) for name in (*own, *base.path.absolute().parts)}
    for adapter in adapters:
        named = adapter.metadata.get("base_model_name_or_path")
        if own and _is_hub_name(named) and _without_owner(named) not in known:
            yield f"{adapter.name} was made for {named}, the base is {own[0]}: shapes that agree prove nothing"


def _is_hub_name(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _without_owner(name: str) -> str:
    """The model's name alone: mirrors store the same weights under another owner."""
    return name.rpartition("/")[2].casefold()
