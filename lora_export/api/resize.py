"""`lora_export.resize`: an adapter of a lower rank."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from lora_export import provenance
from lora_export.adapters.low_rank import LayerShare, Truncation, resize_adapter, total_share
from lora_export.api.load import adapter_paths, load_adapters, locate_adapters
from lora_export.formats.peft_writing import name_in_patterns, write_any_ranks
from lora_export.options.adapters import ResizeOptions
from lora_export.options.declaring import takes
from lora_export.storage import atomic_output
from lora_export.storage.manifest import write_manifest

HEAD_CONFIG = "config.json"  # beside an adapter: the classes and labels of its head


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
    output, truncation = Path(options.output), Truncation(options.rank, options.energy)
    (adapter,) = locate_adapters(options.adapter, options.on_message, options.download)
    (loaded,) = load_adapters(adapter, reading=options.reading)
    resized, layers = resize_adapter(loaded, truncation, lambda module: name_in_patterns(loaded, module))
    for note in loaded.notes:
        options.on_message(f"note: {note}")
    settings = {
        name: value for name, value in (("rank", options.rank), ("energy", options.energy)) if value is not None
    }
    origin = provenance.record([loaded], [1.0], {}, (), {"resize": settings})
    inputs = adapter_paths(adapter)
    with atomic_output.stage_folder(
        output,
        inputs=inputs,
        overwrite=options.overwrite,
        required_bytes=4 * resized.parameters,
        on_message=options.on_message,
    ) as stage:
        write_any_ranks(resized, stage, metadata={provenance.KEY: json.dumps(origin)})
        for path in inputs:
            if (path / HEAD_CONFIG).is_file():
                shutil.copyfile(path / HEAD_CONFIG, stage / HEAD_CONFIG)
        facts = {"made_by": origin["made_by"], "sources": origin["adapters"], "settings": origin["settings"]}
        write_manifest(stage, facts)
    return ResizeResult(output, layers, total_share(layers), loaded.notes)
