"""What training writes: the adapter with its card and metrics, and the table of a comparison."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_export.api.training_data import TrainingData
from lora_export.api.training_strategies import TrainingRun, has_whole_head, losses_of
from lora_export.callbacks import OnMessage
from lora_export.errors import LoraExportError, OutputFailed
from lora_export.extras import pip_install
from lora_export.formats import WriteOptions, peft
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.options.reading import DEFAULTS
from lora_export.options.spelling import named
from lora_export.options.train import TrainOptions
from lora_export.report.json_document import plain
from lora_export.report.training import MODEL_CARD, comparison_page, draw_losses, model_card
from lora_export.storage import atomic_output
from lora_export.storage.hub_cache import hub_name
from lora_export.storage.json_files import write_json
from lora_export.training.checkpoint import METRICS, TRAINING_STATE, checkpoint_folder
from lora_export.training.processes import rank as process_rank
from lora_export.version import __version__
from lora_export.weights.quantised import QUANTIZATION

LOSSES = "losses.png"
COMPARISON = "comparison"  # the name of the table's files: .json, .png and .html
SHOWN_VERSIONS = ("torch", "transformers", "accelerate")


@contextlib.contextmanager
def staged_output(output: Path, inputs: Sequence[Path], *, overwrite: bool, on_message: OnMessage) -> Iterator[Path]:
    """A folder that becomes the output. Of several processes one writes it; the files of the others are dropped.

    The message of an output that could not be written names the checkpoint, where there is one.
    """
    if process_rank() > 0:
        with tempfile.TemporaryDirectory(prefix="lora-export-") as dropped:
            yield Path(dropped)
        return
    try:
        with atomic_output.stage_folder(output, inputs=inputs, overwrite=overwrite, on_message=on_message) as stage:
            yield stage
    except OutputFailed as error:
        folder = checkpoint_folder(output)
        if not (folder / TRAINING_STATE).is_file() or named("resume") in str(error):
            raise
        raise OutputFailed(
            error.lines, f"The last checkpoint is in {folder}: {named('resume', True)} continues from it."
        ) from error


@contextlib.contextmanager
def noted_checkpoint(folder: Path) -> Iterator[None]:
    """Let the message of a command that is interrupted or refused know of the checkpoint that it has left."""
    try:
        yield
    except (KeyboardInterrupt, LoraExportError):
        if folder.exists():
            atomic_output.published.append(folder)
        raise


def write_trained_adapter(
    folder: Path, loaded: Model, learnt: TrainingData, run: TrainingRun, new: Adapter, facts: Mapping[str, Any]
) -> None:
    """Write an adapter with its card, its metrics, and their plot where the card has one."""
    assert run.adapter is not None
    folder.mkdir(exist_ok=True)
    facts_of_base = {"base_model_name_or_path": hub_name(Path(loaded.source)) or loaded.source}
    if (task := learnt.peft_task) and loaded.is_huggingface and has_whole_head(loaded, task, new):
        facts_of_base["task_type"] = task
    written = dataclasses.replace(run.adapter, metadata={**new.metadata, **facts_of_base}, targets=new.targets)
    reading = DEFAULTS.for_base(loaded.source) if loaded.is_huggingface else DEFAULTS
    peft.write(written, folder, WriteOptions(reading))
    if loaded.is_huggingface:
        # The head's class and labels: PEFT's own files do not name the labels.
        config: Any = loaded.module.config
        config.architectures = [type(loaded.module).__name__]
        own = copy.deepcopy(config)
        if hasattr(own, QUANTIZATION):  # the adapter fits the float base as well
            delattr(own, QUANTIZATION)
        own.save_pretrained(folder)
    run.history.write(folder / METRICS)
    if facts["plot"]:
        held_out = {record.step: record.held_out_loss for record in run.history.evaluations}
        if run.score is not None and run.history.steps:
            held_out.setdefault(run.history.steps[-1].step, run.score.loss)
        draw_losses({"training": run.history.losses}, folder / facts["plot"], held_out=held_out)
    (folder / MODEL_CARD).write_text(model_card(facts), encoding="utf-8", newline="\n")


def facts_for_card(
    loaded: Model, learnt: TrainingData, run: TrainingRun, base_hash: str, quantised: str, options: TrainOptions
) -> dict[str, Any]:
    """What the card of an adapter contains. `quantised` describes a base in 4 bits."""
    assert run.adapter is not None
    scores = {"held out": run.score, "held out, adapter off": run.score_without}
    settings = {**run.settings.recorded, "base_dtype": options.base_dtype}
    versions = {"lora-export": __version__}
    for package in (*SHOWN_VERSIONS, *(["bitsandbytes"] if quantised else [])):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "base": hub_name(Path(loaded.source)) or loaded.source,
        "base_sha256": base_hash,
        "base_quantization": quantised,
        "data": str(options.data),
        "data_sha256": learnt.sha256,
        "examples": str(learnt),
        "adapter": {**run.adapter.metadata, "layers": len(run.adapter.pairs), "trained": str(run.parameters)},
        "settings": {name.replace("_", " "): value for name, value in settings.items()},
        "figures": {"training": str(run.history), **{name: str(score) for name, score in scores.items() if score}},
        "versions": versions,
        "plot": LOSSES if importlib.util.find_spec("matplotlib") else "",
    }


def write_comparison(
    stage: Path, document: Mapping[str, Any], runs: Sequence[TrainingRun], on_message: OnMessage
) -> None:
    """Write the table of all runs as JSON; its curves as PNG and a page, where matplotlib and jinja2 are installed."""
    write_json(stage / f"{COMPARISON}.json", plain(document))
    picture = f"{COMPARISON}.png" if importlib.util.find_spec("matplotlib") else ""
    if picture:
        draw_losses(losses_of(runs), stage / picture)
    if importlib.util.find_spec("jinja2"):
        page = comparison_page(document, picture)
        (stage / f"{COMPARISON}.html").write_text(page, encoding="utf-8", newline="\n")
    else:
        on_message(f"note: the table is not written as a page: jinja2 is missing ({pip_install('report')})")
