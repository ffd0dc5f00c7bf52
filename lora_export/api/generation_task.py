"""What a model with a key/value cache does, and the file that its first graph gets."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.artifacts.files import ENCODER_FILE, SINGLE_GRAPH
from lora_export.callbacks import OnMessage
from lora_export.errors import InputRefused, WrongUsage
from lora_export.options.common import ModelSource
from lora_export.options.export import IMAGE_TO_TEXT, SPEECH_TO_TEXT, TEXT_GENERATION, TEXT_TO_TEXT
from lora_export.options.spelling import named
from lora_export.storage import json_files
from lora_export.weights.checkpoint import CONFIG

if TYPE_CHECKING:
    from torch import nn

    from lora_export.models.model import Model

# The main input of a model with an encoder -> its task
TASK_BY_INPUT = {
    "input_ids": TEXT_TO_TEXT,
    "input_features": SPEECH_TO_TEXT,
    "input_values": SPEECH_TO_TEXT,
    "pixel_values": IMAGE_TO_TEXT,
}


def task_of(source: ModelSource) -> str:
    """The task of a model that is not loaded yet: that of a decoder, unless the model is known to have an encoder.

    A factory is not called. Raises InputRefused for a config that cannot be read.
    """
    if not isinstance(source, str | Path):
        return _own_task(source[0] if isinstance(source, tuple) else source.module)
    path = Path(source) / CONFIG
    config = json_files.read_json(path) if path.is_file() else {}
    if not config.get("is_encoder_decoder"):
        return TEXT_GENERATION
    transformers: Any = importlib.import_module("transformers")
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    return TASK_BY_INPUT.get(getattr(model_class, "main_input_name", ""), TEXT_TO_TEXT)


def first_file(output: Path, task: str) -> Path:
    """The file of the first graph: in a folder where `output` has no suffix.

    Raises WrongUsage for a file where there are three graphs.
    """
    if task == TEXT_GENERATION:
        return output if output.suffix else output / SINGLE_GRAPH
    if output.suffix:
        raise WrongUsage(f"a model with an encoder becomes three graphs: -o {output} has to name a folder")
    return output / ENCODER_FILE


def generating_model(base: Model, task: str, on_message: OnMessage) -> Model:
    """The model as graphs with a cache take it. Raises InputRefused for a model that does not do the task."""
    from lora_export.models.cached_decoder import refuse_other_than_decoder
    from lora_export.models.encoder_decoder import is_encoder_decoder

    name = type(base.module).__name__
    if not is_encoder_decoder(base.module):
        refuse_other_than_decoder(base.module, base.source)
    if task != (own := _own_task(base.module)):
        raise InputRefused(f"{base.source}: {name} does {own}, not {task}: {named('task', own)}")
    on_message(f"task: {task}, {name} with its key/value cache")
    return base if base.text_only is None else base.without_images("a graph with a cache takes texts alone")


def _own_task(module: nn.Module) -> str:
    model: Any = module
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return TEXT_GENERATION
    return TASK_BY_INPUT.get(model.main_input_name, TEXT_TO_TEXT)
