"""`lora_export.convert`: an adapter into another format."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_export import plan, provenance
from lora_export.api.adapter_names import NAMES_OF, named_for
from lora_export.api.callbacks import OnMessage, ignore
from lora_export.api.load import AdapterSource, adapter_paths, load_adapters, locate_adapters
from lora_export.api.output_names import with_suffix
from lora_export.api.pipeline_names import family_of_base, named_for_pipeline
from lora_export.api.shared_head import stored_in_graph, without_shared_head
from lora_export.errors import InputRefused, MatchError, WrongUsage
from lora_export.formats import onnx_adapter
from lora_export.formats.read_options import DEFAULTS, ReadOptions
from lora_export.formats.writers import OF_PIPELINES, WriteOptions, writer_of
from lora_export.graph.find_sites import find_sites
from lora_export.graph.insert.check_contract import checked_contract, contract_dora_factors
from lora_export.graph.merge.isolate import without_unchanged_tables
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.lora import Adapter
from lora_export.plan.diffusion.families import Family, family_of_names
from lora_export.storage import atomic_output, input_files
from lora_export.storage.hub_cache import locate
from lora_export.storage.manifest import write_manifest


@dataclass(frozen=True)
class ConvertResult:
    """What was written."""

    output: Path
    weights: int  # weights of the graph that this adapter changes; without a graph, pairs of the adapter
    of: int  # weights of the graph that take an adapter; without a graph, pairs of the adapter
    base: str  # the fingerprint of the graph's base weights, which the file carries; empty without a graph
    notes: tuple[str, ...]


def convert(
    adapter: AdapterSource,
    output: str | Path,
    *,
    to: str = "onnx_adapter",
    graph: str | Path | None = None,
    names: str | None = None,
    base: str | Path | None = None,
    weight: float = 1.0,
    reading: ReadOptions = DEFAULTS,
    ignore_head: bool = False,
    overwrite: bool = False,
    download: bool = False,
    on_message: OnMessage = ignore,
) -> ConvertResult:
    """Convert an adapter to another format. Needs no PyTorch.

    `to` is "peft" or "mlx" (a folder), "kohya", "comfyui" or "diffusers" (a .safetensors file), "gguf" (a file for
    llama.cpp, with the package gguf), or "onnx_adapter": next week's adapter for an existing graph, without another
    export. `graph` is then that .onnx, made with `--lora inputs`. Values keep the smallest type that holds them
    exactly, and what a format cannot express is refused by name.

    With `names`, a PEFT adapter gets the names of the checkpoint `base` ("transformers4", "vllm"), with all experts of
    a projection in one tensor ("sglang"), or the names of the model that transformers 5 loads ("transformers5").
    Adapters for mlx-lm and llama.cpp get the names of `base` where it is given; GGUF needs it. For diffusion models
    `base` is a pipeline or one of its models: kohya's and diffusers' adapters get its names, ComfyUI's those of the
    original model. Flattened names need it.

    `weight` multiplies the adapter's scale. `reading` is that of `merge`.
    `ignore_head` leaves out a task head that the adapter saves whole, where it is equal to the graph's own.

    With `download`, what the cache lacks of a name of the Hugging Face Hub is downloaded (`owner/name[@revision]`).
    Then EnvironmentLacking is raised without a connection.

    Raises InputRefused for what the format cannot express, where a tensor of the adapter has no input of its shape and
    type in the graph, or where the graph has changed since it was made; WrongUsage for options that do not go together;
    EnvironmentLacking without the package gguf; OutputFailed where the output cannot be written. Nothing is left
    behind then.
    """
    output = Path(output)
    _check_usage(to, graph, names, base, ignore_head=ignore_head)
    (adapter,) = locate_adapters(adapter, on_message, download)
    base = None if base is None else locate(base, on_message, download)
    reading = _with_config_beside(reading.for_base(base), adapter)
    (loaded,) = load_adapters(adapter, reading=reading, of_models=to in OF_PIPELINES)
    if graph is not None:
        return _for_graph(adapter, loaded, output, Path(graph), weight, ignore_head, overwrite, on_message)
    loaded = _scaled(loaded, weight)
    if base is not None and to in OF_PIPELINES:
        loaded = named_for_pipeline(loaded, base, to)
    elif base is not None and (names is not None or to != "peft"):
        # mlx-lm and llama.cpp have the names of the original checkpoint.
        loaded = named_for(loaded, names or "transformers4", base)
    writer = writer_of(to)
    target = with_suffix(output, writer.SUFFIX) if writer.SUFFIX else output
    stage = atomic_output.stage_file if writer.SUFFIX else atomic_output.stage_folder
    family = Family.UNKNOWN
    if to in OF_PIPELINES:
        family = family_of_names(loaded.names) if base is None else family_of_base(base)
    options = WriteOptions(reading, stacked_experts=names == "sglang", family=family)
    inputs = [*adapter_paths(adapter), *([] if base is None else [base])]
    size = 4 * loaded.parameters
    with stage(target, inputs=inputs, overwrite=overwrite, required_bytes=size, on_message=on_message) as folder:
        notes = (*loaded.notes, *writer.write(loaded, folder / target.name if writer.SUFFIX else folder, options))
        if not writer.SUFFIX:
            if to == "peft":
                _copy_model_config(adapter, folder)
            origin = provenance.record([loaded], [weight], {}, (), {"to": to, "names": names})
            facts = {"made_by": origin["made_by"], "sources": origin["adapters"], "settings": origin["settings"]}
            write_manifest(folder, facts)
    for note in notes:
        on_message(f"note: {note}")
    return ConvertResult(target, len(loaded.pairs), len(loaded.pairs), "", notes)


def _copy_model_config(adapter: AdapterSource, folder: Path) -> None:
    """Copy the config.json beside an adapter, which has the labels of its task head."""
    for path in adapter_paths(adapter):
        if path.is_dir() and (path / "config.json").is_file():
            shutil.copyfile(path / "config.json", folder / "config.json")


def _check_usage(
    to: str, graph: str | Path | None, names: str | None, base: str | Path | None, *, ignore_head: bool
) -> None:
    if (to == "onnx_adapter") is not (graph is not None):
        raise WrongUsage("--to onnx_adapter needs --for MODEL.onnx, and no other format has it")
    if ignore_head and graph is None:
        raise WrongUsage("--ignore-head is for --to onnx_adapter")
    if names is None:
        return
    if names not in NAMES_OF:
        raise WrongUsage(f"--names is {names!r}; it must be one of {', '.join(NAMES_OF)}")
    if to != "peft" or base is None:
        raise WrongUsage("--names is for --to peft, and needs --base CHECKPOINT, which has the names")


def _with_config_beside(reading: ReadOptions, adapter: AdapterSource) -> ReadOptions:
    """The same, with the config.json that is beside the adapter, where no base is stated."""
    for path in adapter_paths(adapter):
        folder = path if path.is_dir() else path.parent
        if reading.base_config is None and (folder / "config.json").is_file():
            return replace(reading, base_config=folder)
    return reading


def _scaled(adapter: Adapter, weight: float) -> Adapter:
    """The adapter with its changes times `weight`. Raises InputRefused where it has whole tensors, which have none."""
    if weight == 1:
        return adapter
    if adapter.replaced or adapter.token_rows:
        whole = ", ".join([*adapter.replaced, *adapter.token_rows])
        raise InputRefused(f"--weight is a factor on pairs, and {adapter.name} saves tensors whole: {whole}")
    return replace(
        adapter,
        pairs={name: pair.times(weight) for name, pair in adapter.pairs.items()},
        biases={name: np.float32(weight) * change for name, change in adapter.biases.items()},
        added={name: np.float32(weight) * change for name, change in adapter.added.items()},
    )


def _for_graph(
    adapter: AdapterSource,
    loaded: Adapter,
    output: Path,
    graph: Path,
    weight: float,
    ignore_head: bool,
    overwrite: bool,
    on_message: OnMessage,
) -> ConvertResult:
    onnx_adapter.refuse_beyond_low_rank([replace(loaded, replaced={}) if ignore_head else loaded])
    input_files.must_exist(graph, "graph")
    model = load_graph(graph)
    if ignore_head:
        sites = find_sites(model)
        (loaded,) = without_shared_head([loaded], sites.specs, stored_in_graph(sites))
    contract = checked_contract(model, graph)
    try:
        steps = plan.make([loaded], [place.spec for place in contract.slots], strengths=[weight])
    except MatchError as error:
        raise error.with_remedy(
            f"{graph} takes adapters at {len(contract.slots)} layers. `lora-export onnx --lora inputs "
            "--target NAMES` makes a graph that takes them at others"
        ) from error
    if any(step.replace is not None for step in steps.low_rank):
        steps = without_unchanged_tables(steps, find_sites(model))
    onnx_adapter.refuse_new_tables(steps)
    notes = (*loaded.notes, *steps.notes)
    for note in notes:
        on_message(f"note: {note}")
    onnx_adapter.refuse_dora_without_factor(contract, steps)
    factors = contract_dora_factors(model, contract, steps, loaded.name)
    parameters = onnx_adapter.input_values(contract, steps, loaded.name, factors)
    inputs = [graph, *adapter_paths(adapter)]
    with atomic_output.stage_file(output, inputs=inputs, overwrite=overwrite, on_message=on_message) as folder:
        onnx_adapter.write(folder / output.name, parameters, contract, sha256=loaded.sha256)
    changed = {contract.inputs[name].weight for name in parameters}
    return ConvertResult(output, len(changed), len(contract.slots), contract.base, notes)
