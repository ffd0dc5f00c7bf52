"""`combine`, `resize` and `extract`: an adapter made of adapters, or of two models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_export import provenance
from lora_export.adapters.combine import combine_adapters
from lora_export.adapters.low_rank import LayerShare, resize_adapter, total_share
from lora_export.adapters.singular_values import Truncation
from lora_export.api.load import adapter_paths, load_adapters, locate_adapters, no_adapter_as_model
from lora_export.callbacks import in_bytes, note_each
from lora_export.errors import count, first_of
from lora_export.formats.peft_lost_layers import notes_on_lost_layers
from lora_export.formats.peft_writing import name_in_patterns, write_any_ranks
from lora_export.lora import Adapter
from lora_export.options.adapters import CombineOptions, ExtractOptions, ResizeOptions
from lora_export.options.declaring import takes
from lora_export.options.spelling import named
from lora_export.storage import atomic_output, input_files
from lora_export.storage.hub_cache import hub_name, locate
from lora_export.storage.manifest import write_manifest
from lora_export.storage.store_path import place
from lora_export.weights.checkpoint import CONFIG, open_checkpoint
from lora_export.weights.extract import extract_adapter


@dataclass(frozen=True)
class CombineResult:
    """What was written."""

    output: Path
    modules: int  # modules with a pair
    shared: int  # of these, modules that several of the adapters have
    largest_rank: int
    notes: tuple[str, ...]


@takes(CombineOptions)
def combine(options: CombineOptions) -> CombineResult:
    """Combine adapters into one PEFT adapter, a folder.

    Needs no base and no PyTorch. All adapters are in memory at once.

    Raises InputRefused for adapters with more than pairs of plain LoRA, for pairs that the method cannot combine, and
    as loading does; WrongUsage for options that do not go together; OutputFailed where the output cannot be written.
    Nothing is left behind then.
    """
    output, weights, combination = place(options.output), options.weights, options.combined
    adapters = locate_adapters(options.adapters, options.on_message, options.download)
    loaded = load_adapters(adapters, options.prefixes, reading=options.reading)
    combined = combine_adapters(loaded, weights, combination, output.name)
    shared = [module for module in combined.pairs if sum(module in adapter.pairs for adapter in loaded) > 1]
    notes = (*(note for adapter in loaded for note in adapter.notes), *_notes(loaded, shared))
    note_each(options.on_message, notes)
    origin = provenance.record(loaded, weights or (1.0,) * len(loaded), {}, (), combination.settings)
    with atomic_output.staged(options, output, adapter_paths(adapters), 4 * combined.parameters) as stage:
        write_any_ranks(combined, stage, metadata={provenance.KEY: json.dumps(origin)})
        write_origin(stage, origin)
    ranks = [pair.rank for pair in combined.pairs.values()]
    return CombineResult(output, len(combined.pairs), len(shared), max(ranks), notes)


def write_origin(stage: Path, origin: Mapping[str, Any]) -> None:
    """Write the manifest of an adapter that was made of others."""
    write_manifest(stage, {"made_by": origin["made_by"], "sources": origin["adapters"], "settings": origin["settings"]})


def copy_head_config(adapters: Sequence[Path], stage: Path) -> None:
    """Copy the config.json beside an adapter, which has the classes and labels of its head."""
    for path in adapters:
        if (path / CONFIG).is_file():
            input_files.copy_file(path / CONFIG, stage / CONFIG)


def _notes(adapters: Sequence[Adapter], shared: Sequence[str]) -> list[str]:
    if len(adapters) < 2 or shared:
        return []
    names = ", ".join(f"{next(iter(adapter.pairs))} ({adapter.name})" for adapter in adapters)
    return [
        f"no module is in several of the adapters: {names}. {named('prefixes')} renames, where the "
        "same layers are meant"
    ]


@dataclass(frozen=True)
class ResizeResult:
    """What was written, and what is left of each layer's change."""

    output: Path
    layers: tuple[LayerShare, ...]
    share: float  # of ‖ΔW‖², of all layers together
    notes: tuple[str, ...]


@takes(ResizeOptions)
def resize(options: ResizeOptions) -> ResizeResult:
    """Write an adapter with pairs of a lower rank: the best ones, by an exact SVD of each change.

    Each pair gets `rank`, or the least rank that holds the share `energy` (above 0, at most 1) of its ‖ΔW‖²; with both,
    at most `rank`. No rank grows. The SVD is that of A and B after a QR of each: no ΔW is computed. The output is a
    PEFT adapter, a folder, with scale 1. Tensors that are saved whole are copied. `reading` is that of `merge`. Needs
    no base and no PyTorch.

    Raises InputRefused for adapters with more than plain pairs and whole tensors, and as loading does; WrongUsage
    without `rank` and `energy`, and for values out of range; OutputFailed where the output cannot be written. Nothing
    is left behind then.
    """
    output, truncation = place(options.output), Truncation(options.rank, options.energy)
    (adapter,) = locate_adapters(options.adapter, options.on_message, options.download)
    (loaded,) = load_adapters(adapter, reading=options.reading)
    resized, layers = resize_adapter(loaded, truncation, lambda module: name_in_patterns(loaded, module))
    note_each(options.on_message, loaded.notes)
    origin = provenance.record([loaded], [1.0], {}, (), {"resize": _limits(truncation)})
    inputs = adapter_paths(adapter)
    with atomic_output.staged(options, output, inputs, 4 * resized.parameters) as stage:
        write_any_ranks(resized, stage, metadata={provenance.KEY: json.dumps(origin)})
        copy_head_config(inputs, stage)
        write_origin(stage, origin)
    return ResizeResult(output, layers, total_share(layers), loaded.notes)


# Ending of a model's class -> PEFT's task
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


@dataclass(frozen=True)
class ExtractResult:
    """What was written, and what the pairs hold of each layer's change."""

    output: Path
    layers: tuple[LayerShare, ...]
    share: float  # of ‖ΔW‖², of all layers together
    whole: tuple[str, ...]  # tensors that are saved whole
    excluded: tuple[str, ...]  # tensors that differ and were left out on request


@takes(ExtractOptions)
def extract(options: ExtractOptions) -> ExtractResult:
    """Write the PEFT adapter whose merge turns `base` into `tuned`, as far as its rank allows.

    Both are Hugging Face folders or .safetensors files with the same tensors; `tuned` may have a head more. Each matrix
    and convolution that differs gets a pair of `rank`, or of the least rank that holds the share `energy` (above 0, at
    most 1) of its ‖ΔW‖²; with both, at most `rank`. Norms, biases and buffers that differ, and a new head, are saved
    whole. Names are those of the model as transformers loads it. `layout` states how matrices are stored where the
    config of the base does not, as in `merge`. `exclude` are tensors, modules or globs over the names of tensors: what
    differs there is left out, and listed.

    Needs no PyTorch. Peak memory is the adapter and one block of a difference, whatever the size of the model.

    Raises InputRefused with all names for tensors that no adapter can hold, that only the base has, or that have
    other shapes, where no tensor has the name of an `exclude`, and where nothing differs; WrongUsage for values out of
    range; OutputFailed where the output cannot be written. Nothing is left behind then.
    """
    base, tuned = (locate(path, options.on_message, options.download) for path in (options.base, options.tuned))
    with no_adapter_as_model(base, ()), no_adapter_as_model(tuned, (), "There is nothing to extract from it"):
        return _extracted(options, base, tuned)


def _extracted(options: ExtractOptions, base: Path, tuned: Path) -> ExtractResult:
    """As `extract`, with both checkpoints found."""
    output, truncation = place(options.output), Truncation(options.rank, options.energy)
    one, other = open_checkpoint(base), open_checkpoint(tuned, what="tuned model")
    with atomic_output.staged(options, output, [base, tuned]) as stage:
        found = extract_adapter(
            one,
            other,
            truncation,
            name=output.name,
            layout=options.layout,
            exclude=options.exclude,
            progress=in_bytes(options.on_progress, "comparing", sum(spec.nbytes for spec in one.specs)),
        )
        atomic_output.refuse_lack_of_space(stage.parent, 4 * found.adapter.parameters)
        settings = {"extract": _limits(truncation), "excluded": list(found.excluded)}
        record = provenance.record([], [], {}, (), settings)
        architecture = str((other.config.get("architectures") or [""])[0])
        facts: dict[str, Any] = {"base_model_name_or_path": hub_name(base) or str(base)}
        if task := next((task for ending, task in TASKS.items() if architecture.endswith(ending)), ""):
            facts["task_type"] = task
        write_any_ranks(replace(found.adapter, metadata=facts), stage, metadata={provenance.KEY: json.dumps(record)})
        for checkpoint in (one, other):
            checkpoint.refuse_changed_files("read")
        write_manifest(stage, {"made_by": record["made_by"], "settings": record["settings"]})
    note_each(options.on_message, notes_on_lost_layers(found.adapter.pairs, one.config))
    if found.excluded:
        names = first_of(found.excluded, 3)
        number = count(len(found.excluded), "tensor")
        options.on_message(f"note: left out, though other than the base's: {number} ({named('exclude')}): {names}")
    return ExtractResult(output, found.layers, total_share(found.layers), found.whole, found.excluded)


def _limits(truncation: Truncation) -> dict[str, Any]:
    return {name: value for name, value in asdict(truncation).items() if value is not None}
