"""`lora_export.extract`: the adapter that turns a base into a model that was trained from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export import provenance
from lora_export.adapters.low_rank import LayerShare, Truncation, total_share
from lora_export.callbacks import in_bytes
from lora_export.formats.peft_writing import write_any_ranks
from lora_export.options.adapters import ExtractOptions
from lora_export.options.declaring import takes
from lora_export.options.spelling import named
from lora_export.storage import atomic_output
from lora_export.storage.hub_cache import hub_name, locate
from lora_export.storage.manifest import write_manifest
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint
from lora_export.weights.extract import extract_adapter

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
    config of the base does not, as in `merge`. `exclude` are globs over the names of tensors: what differs there is
    left out, and listed.

    Needs no PyTorch. Peak memory is the adapter and one block of a difference, whatever the size of the model.

    Raises InputRefused with all names for tensors that no adapter can hold, that only the base has, or that have
    other shapes, and where nothing differs; WrongUsage for values out of range; OutputFailed where the output cannot be
    written. Nothing is left behind then.
    """
    base, tuned = (locate(path, options.on_message, options.download) for path in (options.base, options.tuned))
    output, truncation = Path(options.output), Truncation(options.rank, options.energy)
    one, other = open_checkpoint(base), open_checkpoint(tuned)
    with atomic_output.stage_folder(
        output, inputs=[base, tuned], overwrite=options.overwrite, on_message=options.on_message
    ) as stage:
        found = extract_adapter(
            one,
            other,
            truncation,
            name=output.name,
            layout=options.layout,
            exclude=options.exclude,
            progress=in_bytes(options.on_progress, "comparing", sum(spec.nbytes for spec in one.specs)),
        )
        atomic_output.refuse_lack_of_space(stage, 4 * found.adapter.parameters)
        settings = {
            name: value for name, value in (("rank", options.rank), ("energy", options.energy)) if value is not None
        }
        record = provenance.record([], [], {}, (), {"extract": settings, "excluded": list(found.excluded)})
        config: dict[str, Any] = {"base_model_name_or_path": hub_name(base) or str(base)}
        if task := _task(other):
            config["task_type"] = task
        write_any_ranks(found.adapter, stage, metadata={provenance.KEY: json.dumps(record)}, **config)
        for checkpoint in (one, other):
            checkpoint.refuse_changed_files("read")
        write_manifest(stage, {"made_by": record["made_by"], "settings": record["settings"]})
    if found.excluded:
        names = ", ".join(found.excluded[:3]) + (f" and {len(found.excluded) - 3} more" if found.excluded[3:] else "")
        options.on_message(
            f"note: {len(found.excluded)} tensors that differ are left out ({named('exclude')}): {names}"
        )
    return ExtractResult(output, found.layers, total_share(found.layers), found.whole, found.excluded)


def _task(tuned: Checkpoint) -> str:
    architecture = str((tuned.config.get("architectures") or [""])[0])
    return next((task for ending, task in TASKS.items() if architecture.endswith(ending)), "")
