"""`lora_export.convert`: an adapter into another format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_export import provenance
from lora_export.adapters.low_rank import LayerShare, as_lora
from lora_export.api.adapter_names import (
    family_of_base,
    has_other_experts,
    named_for,
    named_for_pipeline,
    notes_on_experts,
    with_dots_of,
    with_kernels_of,
    with_shapes_of_base,
    without_repeated_tables,
)
from lora_export.api.adapter_values import adapter_values, taking_graphs
from lora_export.api.adapters import copy_head_config, write_origin
from lora_export.api.load import adapter_paths, load_adapters, locate_adapters, refuse_adapter_as_model
from lora_export.api.shared_head import stored_in_graph, without_shared_head
from lora_export.artifacts.artifact import open_artifact
from lora_export.artifacts.files import file_for_graph, with_suffix
from lora_export.artifacts.kind import artifact_kind
from lora_export.callbacks import note_each
from lora_export.errors import InputRefused, WrongUsage
from lora_export.formats import WriteOptions, holds_pipelines, onnx_adapter, program_adapter, writer_of
from lora_export.formats.peft_writing import name_in_patterns
from lora_export.formats.writing import with_positive_scales
from lora_export.lora import Adapter
from lora_export.options.adapters import RUNTIMES, ConvertOptions
from lora_export.options.combining import AdapterSource
from lora_export.options.declaring import takes
from lora_export.options.reading import ReadOptions
from lora_export.options.spelling import command, named
from lora_export.plan.build import checked_strengths
from lora_export.plan.diffusion import Family, family_of_names
from lora_export.storage import atomic_output, input_files
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.hub_cache import locate
from lora_export.storage.store_copy import on_disk
from lora_export.storage.store_path import newly_opened, place
from lora_export.weights.changes_of_base import with_changes_of_base
from lora_export.weights.pipeline import is_pipeline


@dataclass(frozen=True)
class ConvertResult:
    """What was written."""

    output: Path
    weights: int  # weights of the graph that this adapter changes; without a graph, pairs of the adapter
    of: int  # weights of the graph that take an adapter; without a graph, pairs of the adapter
    base: str  # the fingerprint of the graph's base weights, which the file carries; empty without a graph
    notes: tuple[str, ...]
    layers: tuple[LayerShare, ...] = ()  # with `as_kind`, what the pair of each layer holds of its change


@takes(ConvertOptions)
def convert(options: ConvertOptions) -> ConvertResult:
    """Convert an adapter to another format. Needs no PyTorch.

    `to` is "peft" or "mlx" (a folder), "kohya", "comfyui", "diffusers" or "openvino" (a .safetensors file), "gguf" (a
    file for llama.cpp, with the package gguf), or "onnx_adapter": next week's adapter for an existing graph, without
    another export. `graph` is then that .onnx, made with `lora="inputs"` or "slots"; of an encoder-decoder its folder,
    for which a file is written for each of its graphs, OUTPUT.GRAPH.onnx_adapter; or a .pte made with `lora="inputs"`,
    for which the file is .safetensors. Values keep the smallest type that
    holds them exactly, and what a format cannot express is refused by name.

    With `names`, a PEFT adapter gets the names of the checkpoint `base` ("transformers4", "vllm"), with all experts of
    a projection in one tensor ("sglang"), or the names of the model that transformers 5 loads ("transformers5").
    Adapters for mlx-lm and llama.cpp get the names of `base` where it is given; GGUF needs it. For diffusion models
    `base` is a pipeline or one of its models: kohya's and diffusers' adapters get its names, ComfyUI's those of the
    original model. Flattened names need it.

    With `as_kind="lora"` every change becomes a pair of LoRA of at most `rank` first: LoHa, LoKr, whole changes, pairs
    of a higher rank, and with `base` what follows from its weights (OFT, IA3 and others). The pair is exact where the
    rank is enough, else the best one of that rank, by an SVD. A layer of which less than `min_kept` of ‖ΔW‖² is left is
    refused: by default (1) whatever would lose more than float32's rounding, because a share that is lost is to be a
    number that the user gave. `layout` states how `base` stores square matrices, where nothing else shows it.

    Raises InputRefused for what the format cannot express, where a tensor of the adapter has no input of its shape and
    type in the graph, or where the graph has changed since it was made; WrongUsage for options that do not go together;
    EnvironmentLacking without the package gguf; OutputFailed where the output cannot be written. Nothing is left
    behind then.
    """
    (adapter,) = locate_adapters(options.adapter, options.on_message, options.download)
    base = None if options.base is None else locate(options.base, options.on_message, options.download)
    if base is not None:
        _must_be_model(base, adapter)
    to, names, weight, output = options.to, options.names, options.weight, place(options.output)
    reading = _with_config_beside(options.reading.for_base(base), adapter)
    (loaded,) = load_adapters(adapter, reading=reading, of_models=holds_pipelines(to))
    loaded = loaded if base is None else with_shapes_of_base(loaded, base, options.layout)
    layers: tuple[LayerShare, ...] = ()
    if options.rank is not None:
        loaded = loaded if base is None else with_kernels_of(with_changes_of_base(loaded, base, options.layout), base)
        of_adapter = loaded
        loaded, layers = as_lora(
            loaded, options.rank, options.min_kept, lambda module: name_in_patterns(of_adapter, module)
        )
    if options.graph is not None:
        is_program = artifact_kind(place(options.graph)) is ArtifactKind.EXECUTORCH
        for_it = _for_program if is_program else _for_graph
        return replace(for_it(options, adapter, loaded, options.graph), layers=layers)
    loaded = _scaled(loaded, weight)
    if base is not None and holds_pipelines(to):
        loaded = named_for_pipeline(loaded, base, to)
    elif base is not None and (names is not None or to != "peft"):
        # mlx-lm and llama.cpp have the names of the original checkpoint.
        loaded = named_for(loaded, names, base, tied_ok=to == "peft")
        loaded = loaded if to == "peft" else without_repeated_tables(loaded, base)
    elif base is not None and (loaded.flattened or has_other_experts(loaded, base)):
        loaded = with_kernels_of(with_dots_of(loaded, base), base)
    elif to == "peft":
        loaded = loaded if base is None else with_kernels_of(loaded, base)
        loaded = replace(loaded, notes=(*loaded.notes, *notes_on_experts(loaded, base)))
    writer = writer_of(to)
    target = with_suffix(output, writer.SUFFIX) if writer.SUFFIX else output
    family = Family.UNKNOWN
    if holds_pipelines(to):
        family = family_of_names(loaded.names) if base is None else family_of_base(base)
    how = WriteOptions(reading, stacked_experts=names == "sglang", family=family)
    inputs = [*adapter_paths(adapter), *([] if base is None else [base])]
    with atomic_output.staged(options, target, inputs, 4 * loaded.parameters, is_file=bool(writer.SUFFIX)) as folder:
        notes = (
            *loaded.notes,
            *writer.write(with_positive_scales(loaded), folder / target.name if writer.SUFFIX else folder, how),
        )
        if not writer.SUFFIX:
            if to == "peft":
                copy_head_config(adapter_paths(adapter), folder)
            of_lora = {"as": options.as_kind, "rank": options.rank, "min_kept": options.min_kept}
            settings = {"to": to, "names": names, **(of_lora if options.as_kind else {})}
            write_origin(folder, provenance.record([loaded], [weight], {}, (), settings))
    note_each(options.on_message, notes)
    return ConvertResult(target, len(loaded.pairs), len(loaded.pairs), "", notes, layers)


def _must_be_model(base: Path, adapter: AdapterSource) -> None:
    """Raise InputRefused for a base that is no model, also where the format needs nothing of it.

    A config.json is enough: the weights may be missing or pickled.
    """
    input_files.must_exist(base, "base model")
    refuse_adapter_as_model(base, adapter)
    if not (is_pipeline(base) or (base / "config.json").is_file()):
        _ = open_artifact(base).headers


def _with_config_beside(reading: ReadOptions, adapter: AdapterSource) -> ReadOptions:
    """The same, with the config.json that is beside the adapter, where no base is stated."""
    for path in adapter_paths(adapter):
        folder = path if path.is_dir() else path.parent
        if reading.base_config is None and (folder / "config.json").is_file():
            return replace(reading, base_config=folder)
    return reading


def _scaled(adapter: Adapter, weight: float) -> Adapter:
    """The adapter with its changes times `weight`.

    Raises InputRefused where it has whole tensors, which have none, and for a weight that leaves no effect: an alpha of
    0 is that of the rank to sd-scripts.
    """
    if weight == 1:
        return adapter
    checked_strengths([adapter], [weight], identity_ok=weight != 0)  # an adapter before training has no effect either
    if adapter.replaced or adapter.token_rows:
        whole = ", ".join([*adapter.replaced, *adapter.token_rows])
        raise InputRefused(f"{named('weight')} is a factor on pairs, and {adapter.name} saves tensors whole: {whole}")
    return replace(
        adapter,
        pairs={name: pair.times(weight) for name, pair in adapter.pairs.items()},
        biases={name: np.float32(weight) * change for name, change in adapter.biases.items()},
        added={name: np.float32(weight) * change for name, change in adapter.added.items()},
    )


def _for_program(options: ConvertOptions, adapter: AdapterSource, loaded: Adapter, source: str | Path) -> ConvertResult:
    program = on_disk(newly_opened(source), options.on_message)
    input_files.must_exist(program, "program")
    if options.ignore_head:
        raise WrongUsage(f"{named('ignore_head')} is for graphs: a .pte has the base's head")
    contract = program_adapter.contract_of(program, open_artifact(program).metadata)
    steps = program_adapter.plan_for(contract, [loaded], [options.weight], program)
    notes = tuple(dict.fromkeys([*loaded.notes, *steps.notes]))
    note_each(options.on_message, notes)
    arrays = program_adapter.values(contract, steps, loaded.name)
    output = with_suffix(place(options.output), program_adapter.SUFFIX)
    with atomic_output.staged(options, output, [program, *adapter_paths(adapter)], is_file=True) as folder:
        program_adapter.write(folder / output.name, arrays, contract, sha256=loaded.sha256)
    return ConvertResult(output, len(steps.low_rank), len(contract.places), contract.base, notes)


def _for_graph(options: ConvertOptions, adapter: AdapterSource, loaded: Adapter, source: str | Path) -> ConvertResult:
    output, model = place(options.output), on_disk(newly_opened(source), options.on_message)  # ONNX opens files alone
    output = output if model.is_dir() else with_suffix(output, onnx_adapter.SUFFIX)
    if options.ignore_head:
        onnx_adapter.refuse_beyond_low_rank([replace(loaded, replaced={})])
    if str(source) in RUNTIMES and not model.exists():
        raise InputRefused(
            f"{named('graph')} takes the file of a graph, and {source} is a runtime: `{command('check')}` shows what "
            "that takes of an adapter"
        )
    input_files.must_exist(model, "graph")
    graphs = taking_graphs(model)
    if options.ignore_head:
        specs = [spec for graph in graphs for spec in graph.sites.specs]
        (loaded,) = without_shared_head([loaded], specs, stored_in_graph(*(graph.sites for graph in graphs)))
    found = adapter_values(loaded, options.weight, graphs)
    notes = tuple(dict.fromkeys([*loaded.notes, *(note for own in found for note in own.plan.notes)]))
    note_each(options.on_message, notes)
    inputs = [*(graph.path for graph in graphs), *adapter_paths(adapter)]
    names = [output.name]
    if model.is_dir():
        names = [file_for_graph(output.name.removesuffix(onnx_adapter.SUFFIX), graph.path.name) for graph in graphs]
    output = output.with_name(names[0])
    with atomic_output.staged(options, output, inputs, is_file=True, streamed=False) as folder:
        for name, graph, own in zip(names, graphs, found, strict=True):
            # A graph may have nothing of this adapter. Its file then has a pair of zeros.
            arrays = own.arrays or graph.contract.places[0].zeros()
            onnx_adapter.write(folder / name, arrays, graph.contract, sha256=loaded.sha256)
    changed = {
        graph.contract.inputs[name].weight for graph, own in zip(graphs, found, strict=True) for name in own.arrays
    }
    taken = {one.weight for graph in graphs for one in graph.contract.every_place}
    return ConvertResult(output, len(changed), len(taken), graphs[0].contract.base, notes)
