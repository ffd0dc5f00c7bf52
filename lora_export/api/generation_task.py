"""What a model with a key/value cache does, and the file that its first graph gets."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.artifacts.files import GRAPH_FILES, IMAGE_TEXT_FILES, SINGLE_GRAPH, names_file
from lora_export.callbacks import OnMessage
from lora_export.errors import InputRefused, WrongUsage
from lora_export.options.common import ModelSource
from lora_export.options.export import IMAGE_TEXT_TO_TEXT, IMAGE_TO_TEXT, SPEECH_TO_TEXT, TEXT_GENERATION, TEXT_TO_TEXT
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


def task_of(source: ModelSource, *, takes_images: bool = True) -> str:
    """The task of a model that is not loaded yet: that of a decoder, unless the model is known to have an encoder.

    A factory is not called. Without `takes_images`, a decoder reads no images. Raises InputRefused for a config that
    cannot be read.
    """
    if not isinstance(source, str | Path):
        return _own_task(source[0] if isinstance(source, tuple) else source.module)
    path = Path(source) / CONFIG
    config = json_files.read_json(path) if path.is_file() else {}
    if not config.get("is_encoder_decoder"):
        return IMAGE_TEXT_TO_TEXT if takes_images and _has_image_graphs(config) else TEXT_GENERATION
    transformers: Any = importlib.import_module("transformers")
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    return TASK_BY_INPUT.get(getattr(model_class, "main_input_name", ""), TEXT_TO_TEXT)


def _has_image_graphs(config: Mapping[str, Any]) -> bool:
    """Whether the images of a model are exported."""
    from lora_export.models.image_text import image_family  # torch

    return bool(image_family(config))


def graph_files(task: str | None) -> tuple[str, ...]:
    """The files of the three graphs of a task; none where there is one graph."""
    if task in (None, TEXT_GENERATION):
        return ()
    return IMAGE_TEXT_FILES if task == IMAGE_TEXT_TO_TEXT else GRAPH_FILES


def first_file(output: Path, task: str) -> Path:
    """The file of the first graph: in a folder where `output` has no suffix of a file.

    Raises WrongUsage for a file where there are three graphs.
    """
    if task == TEXT_GENERATION:
        return output if names_file(output) else output / SINGLE_GRAPH
    if names_file(output):
        raise WrongUsage(f"this model becomes three graphs: -o {output} has to name a folder")
    return output / graph_files(task)[0]


def generating_model(base: Model, task: str, on_message: OnMessage) -> Model:
    """The model as graphs with a cache take it. Raises InputRefused for a model that does not do the task."""
    from lora_export.models.cached_decoder import refuse_other_than_decoder
    from lora_export.models.encoder_decoder import is_encoder_decoder

    name = type(base.module).__name__
    if not is_encoder_decoder(base.module):
        refuse_other_than_decoder(base.module, base.source)
    if task == IMAGE_TEXT_TO_TEXT:
        _refuse_without_images(base)
    elif task != (own := _own_task(base.module)):
        raise InputRefused(f"{base.source}: {name} does {own}, not {task}: {named('task', own)}")
    on_message(f"task: {task}, {name} with its key/value cache")
    if task == IMAGE_TEXT_TO_TEXT or base.text_only is None:
        return base
    return base.without_images(f"a graph of {TEXT_GENERATION} takes texts alone")


def _refuse_without_images(base: Model) -> None:
    """Raise InputRefused for a model whose images cannot be exported, or are not known."""
    config = getattr(base.module, "config", None)
    if config is None or not _has_image_graphs(config.to_dict()):
        why = f"{type(base.module).__name__} is no model whose images are exported"
    elif base.text_only is None:
        why = next(iter(base.not_judged), "its inputs have no images")
    else:
        return
    raise InputRefused(f"{base.source}: {why}", f"Its texts alone: {named('task', TEXT_GENERATION)}")


def _own_task(module: nn.Module) -> str:
    model: Any = module
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return TEXT_GENERATION
    return TASK_BY_INPUT.get(model.main_input_name, TEXT_TO_TEXT)
