"""The inputs of the layers that a merge changes, from texts or arrays: the merged model runs on them, in PyTorch."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_export.artifacts.kind import is_arrays
from lora_export.callbacks import OnMessage
from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.extras import pip_install
from lora_export.isolation.limits import MAX_ROW
from lora_export.options.spelling import named
from lora_export.plan import Plan
from lora_export.storage.atomic_output import refuse_lack_of_space
from lora_export.storage.input_files import read_text
from lora_export.storage.npz import read_arrays
from lora_export.storage.store_copy import on_disk
from lora_export.training.records.opening import ROW_READERS, open_records
from lora_export.weights.calibrated_rounding import LayerInputs
from lora_export.weights.checkpoint import Checkpoint
from lora_export.weights.gguf.base import GgufBase, open_base
from lora_export.weights.gguf.floats import size_in_floats, write_as_floats
from lora_export.weights.gguf.merge import merge_gguf
from lora_export.weights.merge import merge_checkpoint, output_size


def calibrate(
    plan: Plan, base: Checkpoint | GgufBase, path: Path, on_message: OnMessage, *, others: str = "the others are"
) -> Mapping[str, LayerInputs]:
    """The inputs of layers, by the names of their weights in the output, where the merged model runs on a file's texts.

    `base` has its quantised weights as floats. The merged model is one of floats, in a temporary folder. `others` are
    the words of the note for what is rounded to nearest. Raises InputRefused where there is no model to run, and for a
    file without inputs; EnvironmentLacking without PyTorch, and for a GGUF file without what transformers needs to read
    it; OutputFailed where the temporary folder lacks space.
    """
    option = named("calibration", path)
    if isinstance(base, Checkpoint) and not (base.is_folder and base.config):
        raise InputRefused(f"{option} runs the model, and {base.path} has none: merge into its Hugging Face folder")
    arrays = read_arrays(path) if is_arrays(path) else None
    texts = _texts(path, on_message) if arrays is None else []
    try:
        from lora_export.models import layer_inputs
        from lora_export.models.load import load_model
    except ImportError as error:
        raise EnvironmentLacking(f"{option} needs PyTorch ({error}): {pip_install('hf')}") from error

    changed = [plan.output_name(step.spec.stored_name) for step in plan.steps if step.terms]
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(base, GgufBase):
            model = load_model(str(_merged_as_folder(plan, base, Path(folder), arrays is None)), streamed=True)
        else:
            refuse_lack_of_space(Path(folder), output_size(plan, base))
            merge_checkpoint(plan, base, Path(folder), min_retention=0)
            model = replace(load_model(folder, streamed=True), source=str(base.path))  # which has the tokenizer
        cases = layer_inputs.cases_of_texts(model, texts) if arrays is None else layer_inputs.cases_of_arrays(arrays)
        found = layer_inputs.collect_inputs(model, changed, cases)
    tokens = [each.fitted.count for each in found.values()] or [0]
    on_message(
        f"note: {len(found)} of {len(changed)} weights that change have calibration inputs, at least {min(tokens):,}"
        f" each; {others} rounded to nearest"
    )
    return found


def _merged_as_folder(plan: Plan, base: GgufBase, folder: Path, with_tokenizer: bool) -> Path:
    """The merge of a GGUF file without rounding, as a Hugging Face folder. Raises as `save_config`."""
    from lora_export.models.gguf_files import save_config

    merged, output = folder / "merged.gguf", folder / "model"
    refuse_lack_of_space(folder, _bytes_at_once(plan, base))
    merge_gguf(plan, base, merged, min_retention=0, types={"*": "F32"})
    output.mkdir()
    save_config(base, output, with_tokenizer=with_tokenizer)
    write_as_floats(open_base(merged), output)
    merged.unlink()
    return output


def _bytes_at_once(plan: Plan, base: GgufBase) -> int:
    """The size of the merge in which what changes is fp32, and of its copy in which no weight is in blocks."""
    changed = {step.spec.stored_name for step in plan.steps}
    in_fp32 = sum(4 * math.prod(base.tensors[name].shape) for name in changed)
    others = sum(size_in_floats(tensor) for name, tensor in base.tensors.items() if name not in changed)
    return base.file.size + 2 * in_fp32 + others


def _texts(path: Path, on_message: OnMessage) -> list[str]:
    """The lines of a text file, or the column `text` of a file of rows: what is not empty."""
    if path.suffix.lower() in ROW_READERS:
        records = open_records(on_disk(path, on_message, "file", is_alone=True))
        texts: list[Any] = [records[row].get("text") for row in range(len(records))]
    else:
        texts = read_text(path, MAX_ROW).splitlines()
    return [text for text in texts if isinstance(text, str) and text.strip()]
