"""`lora_export.combine`: several adapters as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export import provenance
from lora_export.adapters.combine import combine_adapters
from lora_export.api.load import adapter_paths, load_adapters, locate_adapters
from lora_export.formats.peft_writing import write_any_ranks
from lora_export.lora import Adapter
from lora_export.options.adapters import CombineOptions
from lora_export.options.declaring import takes
from lora_export.options.spelling import named
from lora_export.storage import atomic_output
from lora_export.storage.manifest import write_manifest


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
    output, weights, combination = Path(options.output), options.weights, options.combined
    adapters = locate_adapters(options.adapters, options.on_message, options.download)
    loaded = load_adapters(adapters, options.prefixes, reading=options.reading)
    combined = combine_adapters(loaded, weights, combination, output.name)
    shared = [module for module in combined.pairs if sum(module in adapter.pairs for adapter in loaded) > 1]
    notes = (*(note for adapter in loaded for note in adapter.notes), *_notes(loaded, shared))
    for note in notes:
        options.on_message(f"note: {note}")
    origin = provenance.record(loaded, weights or (1.0,) * len(loaded), {}, (), combination.settings)
    size = 4 * combined.parameters
    with atomic_output.stage_folder(
        output,
        inputs=adapter_paths(adapters),
        overwrite=options.overwrite,
        required_bytes=size,
        on_message=options.on_message,
    ) as stage:
        write_any_ranks(combined, stage, metadata={provenance.KEY: json.dumps(origin)})
        write_manifest(
            stage, {"made_by": origin["made_by"], "sources": origin["adapters"], "settings": origin["settings"]}
        )
    ranks = [pair.rank for pair in combined.pairs.values()]
    return CombineResult(output, len(combined.pairs), len(shared), max(ranks), notes)


def _notes(adapters: Sequence[Adapter], shared: Sequence[str]) -> list[str]:
    if len(adapters) < 2 or shared:
        return []
    names = ", ".join(f"{next(iter(adapter.pairs))} ({adapter.name})" for adapter in adapters)
    return [
        f"no module is in several of the adapters: {names}. {named('prefixes')} renames, where the "
        "same layers are meant"
    ]
