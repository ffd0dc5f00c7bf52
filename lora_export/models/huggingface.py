"""A model in a Hugging Face folder. Nothing is downloaded, and no code of the folder is run."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_export.errors import EscapedLines, InputRefused, count, escaped_lines, first_of, listed
from lora_export.extras import optional_package
from lora_export.isolation.limits import MAX_OBJECTS
from lora_export.layers.frozen_linear import scales_of_4bit
from lora_export.layers.module_tensors import input_embeddings
from lora_export.lora import Adapter
from lora_export.models.four_bit_base import TrainedBase, loading_options, quantised_modules, widen_floats
from lora_export.models.generated_inputs import generated_inputs
from lora_export.models.model import Model, ModelInputs, Sizes
from lora_export.models.processors import open_image_processor, open_tokenizer
from lora_export.models.sentence_transformer import (
    POOLER,
    as_embedder,
    embedder_modules,
    encoder_fields,
    has_removable_pooler,
)
from lora_export.models.stored_parameter import StoredParameter, StreamedFolder, streamed_folder
from lora_export.models.tracing import disable_cache
from lora_export.storage import json_files
from lora_export.weights.checkpoint import CONFIG, Checkpoint, custom_code, open_checkpoint
from lora_export.weights.task_head import TaskHead, config_for_head, config_with_heads, number_of_labels

PEFT_CONFIG = "adapter_config.json"
MODULE_COUNT = re.compile(r"(layer|depth|block|expert|stage)s?$")  # of the names in a config that count modules
SHARED_MODULES = 1000  # modules may share their weights
LABEL_COUNT, MOST_LABELS = "num_labels", MAX_OBJECTS
# A model may have more numbers than its folder: shared weights, tables that are computed, a new head.
MOST_NUMBERS, LARGER = 1 << 26, 2
TAG = "__float__"
NUMBERS = {name: float(name) for name in ("Infinity", "-Infinity", "NaN")}
COMPOSITE = "EncoderDecoderModel"  # the end of the names of classes that are made of two models
PLACE = "encoder.pooler."


def load_tokenizer(model: Model) -> Any:
    """The tokenizer in a Hugging Face model's folder. Raises InputRefused where there is none."""
    return _beside(model, "tokenizer", lambda folder: open_tokenizer(folder, needed=True))


def load_image_processor(model: Model) -> Any:
    """The image processor in a Hugging Face model's folder. Raises InputRefused where there is none."""
    return _beside(model, "image processor", open_image_processor)


def _beside(model: Model, what: str, opened: Callable[[Path], Any]) -> Any:
    if not model.is_huggingface:
        raise InputRefused(f"{model.source} has no {what}: it is no Hugging Face folder. Give arrays (.npz)")
    with quiet(_transformers()):
        return opened(Path(model.source))


def set_padding_token(model: Model, tokenizer: Any) -> None:
    """Name the tokenizer's padding token in the model's config, where the config names none.

    A classifier of a decoder reads the last token that is no padding. Without this id it takes no batch.
    Raises InputRefused where the model has no row for this token.
    """
    table = input_embeddings(model.module)
    if isinstance(table, torch.nn.Embedding) and tokenizer.pad_token_id >= table.num_embeddings:
        raise InputRefused(
            f"{model.source}: the tokenizer's padding token has the id {tokenizer.pad_token_id}, and the model has "
            f"rows for {table.num_embeddings} tokens. Add the row (resize_token_embeddings), or choose another token"
        )
    config: Any = model.module.config
    for part in (config, config.get_text_config()):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = tokenizer.pad_token_id


def from_folder(
    folder: Path,
    adapters: Sequence[Adapter],
    head: TaskHead | None,
    dtype: torch.dtype,
    *,
    may_add: bool,
    streamed: bool,
    base: TrainedBase | None,
) -> Model:
    """Load the model of a folder. Arguments and errors are those of `models.load.load_model`.

    A sentence-transformers folder is the whole embedding model, unless it is to be trained or has a classifier.
    """
    # Refuses what is damaged, quantised or pickled before anything is built.
    checkpoint = open_checkpoint(folder, dequantise=base is not None)
    fields = _config_fields(folder, adapters, head)
    modules = None if may_add or head else embedder_modules(folder, fields)
    fields = fields if modules is None else encoder_fields(fields)
    _refuse_other_weights(folder, fields)
    _refuse_more_modules(folder, fields, len(checkpoint.specs))
    transformers = _transformers()
    if head:
        _refuse_missing_class(transformers, folder, fields)
    with quiet(transformers):
        weights = streamed_folder(checkpoint, dtype) if streamed and (may_add or dtype is torch.float32) else None
        module, loading = _pretrained(transformers, checkpoint, fields, dtype, weights, base or TrainedBase())
    new = tuple(sorted(loading["missing_keys"]))
    notes = notes_on_unread_tensors(module, loading["unexpected_keys"])
    new = without_unread_pooler(module, new)
    if modules is not None:
        notes += as_embedder(module, modules, dtype)
        new = tuple(name for name in new if not name.startswith(POOLER))
    if not (may_add or head):
        refuse_random_weights(folder, module, new, adapters)
    scales = itertools.chain.from_iterable(map(scales_of_4bit, module.parameters()))
    for tensor in itertools.chain(module.parameters(), module.buffers(), list(scales)):
        if isinstance(tensor, StoredParameter):
            continue
        # Copied out of the mapped file: truncating that would end this process. Also, a verification that widens the
        # model tensor by tensor would hold all of both.
        tensor.data = tensor.data.clone()
    if checkpoint.quantised:
        widen_floats(module, dtype)
    module.eval()
    return _with_inputs(module, folder, new, notes)


def _with_inputs(
    module: Any, folder: Path, new: tuple[str, ...], notes: Sequence[str], *, with_images: bool = True
) -> Model:
    """The model. Where its inputs cannot be generated, that is an error when they are first needed."""
    try:
        model = generated_inputs(module, folder, with_images=with_images)
    except InputRefused as error:
        reason = error

        def refuse(_: Sizes, __: torch.Generator) -> ModelInputs:
            raise reason

        model = Model(str(folder), module, {}, refuse, {}, is_huggingface=True)
    text_only = _with_inputs(module, folder, new, notes, with_images=False) if model.placeholders else None
    return replace(model, new_weights=new, notes=(*model.notes, *notes), text_only=text_only)


def _config_fields(folder: Path, adapters: Sequence[Adapter], head: TaskHead | None) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise InputRefused(f"{folder} has no {CONFIG}: it has weights, but their model is unknown")
    fields = config_with_heads(json_files.read_json(path), adapters)
    if head:
        if not fields.get("architectures"):
            raise InputRefused(f"{path} names no architecture, so that its classifier is unknown")
        _refuse_other_head(folder, fields, head)
        fields = config_for_head(fields, head)
    if code := custom_code(fields):
        raise InputRefused(
            f"{path} names code of its own ({code}), which lora-export never runs. Build the model in a "
            "factory, `file.py:factory`, where you trust it"
        )
    if "model_type" not in fields:
        raise InputRefused(f"{path} has no model_type: give the folder of a Hugging Face model, or a factory")
    return fields


def _refuse_other_weights(folder: Path, fields: dict[str, Any]) -> None:
    """Raise InputRefused where transformers would load other weights than the folder's model files, or more."""
    if name := fields.get("transformers_weights"):
        raise InputRefused(
            f"{folder / CONFIG} names a file of weights (transformers_weights: {name!r}), which transformers loads in "
            "place of the model's. Remove this entry"
        )
    if (folder / PEFT_CONFIG).exists():
        raise InputRefused(
            f"{folder} has an {PEFT_CONFIG}: transformers attaches this adapter when it loads the folder. Move the "
            "adapter to a folder of its own"
        )


def _refuse_more_modules(folder: Path, fields: Mapping[str, Any], tensors: int) -> None:
    """Raise InputRefused for a config with far more layers than the folder has tensors: building them has no end."""
    for name, value in fields.items():
        counts = [count for count in (value if isinstance(value, list) else [value]) if isinstance(count, int)]
        if isinstance(value, dict):
            _refuse_more_modules(folder, value, tensors)
        elif MODULE_COUNT.search(name) and sum(counts) > SHARED_MODULES + tensors:
            raise InputRefused(
                f"{folder / CONFIG}: {name} is {sum(counts):,}, and the folder has {count(tensors, 'tensor')}"
            )
        elif name == LABEL_COUNT and sum(counts) > MOST_LABELS:  # transformers makes a name for each
            raise InputRefused(f"{folder / CONFIG}: {name} is {sum(counts):,}; at most {MOST_LABELS:,} are supported")


def _refuse_larger_model(module: Any, checkpoint: Checkpoint) -> None:
    """Raise InputRefused where a config describes a far larger model than the folder has: before it takes memory."""
    described = sum(tensor.numel() for tensor in itertools.chain(module.parameters(), module.buffers()))
    stored = sum(math.prod(spec.shape) for spec in checkpoint.specs)
    if described > MOST_NUMBERS + LARGER * stored:
        raise InputRefused(
            f"{checkpoint.path / CONFIG} describes a {type(module).__name__} of {described:,} numbers, and the folder "
            f"has {stored:,}",
            _other_shapes(module, checkpoint),
        )


def _refuse_other_head(folder: Path, fields: dict[str, Any], head: TaskHead) -> None:
    """Raise InputRefused where the folder has a trained classifier with another number of labels."""
    count = number_of_labels(fields, head.ending)
    if count in (None, len(head.labels)):
        return
    names = ", ".join(head.labels)
    raise InputRefused(
        f"{folder} has a classifier of {count} labels, and the data has {len(head.labels)} ({names}). Give data "
        "with the labels of the model, or a base without a classifier: "
        f"transformers.AutoModel.from_pretrained({str(folder)!r}).save_pretrained(FOLDER), with the tokenizer"
    )


def _refuse_missing_class(transformers: Any, folder: Path, fields: Mapping[str, Any]) -> None:
    """Raise InputRefused where transformers has no such model with the head that the data need."""
    wanted = fields["architectures"][0]
    if not hasattr(transformers, wanted):
        own = json_files.read_json(folder / CONFIG)["architectures"][0]
        raise InputRefused(
            f"{folder} is a {own}, and these data need a {wanted}, which transformers does not have. Give data of "
            "another kind, or another base"
        )


def notes_on_unread_tensors(module: Any, tensors: Collection[str]) -> list[str]:
    """A remark on the tensors of a folder that its model does not have: its config may be another model's."""
    if not tensors:
        return []
    left_out, those = count(len(tensors), "tensor"), first_of(sorted(tensors), 3)
    return [f"the model leaves out {left_out} of the folder, which {type(module).__name__} does not have: {those}"]


def refuse_random_weights(folder: Path, module: Any, new: Collection[str], adapters: Sequence[Adapter] = ()) -> None:
    """Raise InputRefused for weights that neither the folder nor an adapter has: no two loads would be the same."""
    brought = [f".{name}" for adapter in adapters for name in adapter.replaced]
    missing = [
        name for name in sorted(new) if not any(end.endswith(f".{name}") or f".{name}".endswith(end) for end in brought)
    ]
    if missing:
        adding = ", and no adapter brings them" if adapters else ""
        raise InputRefused(
            f"{folder} lacks weights of {type(module).__name__}{adding}. They would be random, and different each "
            "time:",
            listed(missing, 10),
        )


def _first_sentence(error: Exception) -> str:
    """The first line of a message, with the next one where it announces that; the type of an error without any."""
    lines = filter(None, (line.strip() for line in str(error).splitlines()))
    first, *others = (*lines,) or (type(error).__name__,)
    return f"{first} {others[0]}" if first.endswith(":") and others else first


def _pretrained(
    transformers: Any,
    checkpoint: Checkpoint,
    fields: dict[str, Any],
    dtype: torch.dtype,
    weights: StreamedFolder | None,
    base: TrainedBase,
) -> tuple[Any, Mapping[str, Collection[str]]]:
    """The module, and the names that transformers found missing or unexpected in the folder.

    `weights` are left out where they do not fit.
    """
    folder = checkpoint.path
    path = folder / CONFIG
    try:
        config = transformers.AutoConfig.for_model(**with_numbers(fields))
    except Exception as error:  # values of the wrong type raise any type
        kind = fields.get("model_type")
        known = isinstance(kind, str) and kind in transformers.CONFIG_MAPPING
        what = "cannot read this config" if known else "does not know this model"
        raise InputRefused(f"{path}: transformers {what} ({_first_sentence(error)})") from error
    architecture = (fields.get("architectures") or ["AutoModel"])[0]
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise InputRefused(f"{path}: transformers has no class {architecture}")
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)) and architecture != "AutoModel":
        raise InputRefused(f"{path}: {architecture} is no model of transformers")
    disable_cache(config)  # the exported graph takes and returns no key-value cache
    if (described := _described(cls, config)) is not None:
        _refuse_larger_model(described, checkpoint)
        cls = type(described)  # of AutoModel, which takes no weights in place of a folder
    quantisation = loading_options(transformers, base, checkpoint, config, lambda: _built(cls, config))
    try:
        load = functools.partial(
            cls.from_pretrained, config=config, local_files_only=True, dtype=dtype, trust_remote_code=False,
            output_loading_info=True, **quantisation,
        )  # fmt: skip
        if weights is not None:
            module, loading = load(None, state_dict=dict(weights.empty))
            if weights.fill(module, frozenset(loading["missing_keys"])):
                return module, loading
            del module
        module, loading = load(folder)
    except MemoryError:
        raise
    except Exception as error:  # values that do not fit together raise any type
        has_other_shapes = described is not None and "ignore_mismatched_sizes" in str(error)
        why = _other_shapes(described, checkpoint) if has_other_shapes else EscapedLines()
        raise InputRefused(
            f"{folder}: transformers cannot load it as {architecture}:", why or listed(str(error).splitlines())
        ) from error
    trained = quantised_modules(module, sorted(loading["missing_keys"]))
    if not set(trained) <= set(base.floats):  # their values are new, and are trained: they must be floats
        del module
        floats = replace(base, floats=(*base.floats, *trained))
        return _pretrained(transformers, checkpoint, fields, dtype, None, floats)
    return module, loading


def _built(cls: Any, config: Any) -> Any:
    return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)


def _described(cls: Any, config: Any) -> Any:
    """The model without weights; None where it cannot be built: loading it fails, too."""
    with torch.device("meta"), contextlib.suppress(Exception):
        return _built(cls, config)
    return None


def _other_shapes(module: Any, checkpoint: Checkpoint) -> EscapedLines:
    """The tensors whose shapes in the folder are not those that the config describes; empty where none is found."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {spec.name: spec.shape for spec in checkpoint.specs}
    differing = [
        f"{name} is {found[name]} in the folder, and {shape} by the config and the adapters"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    return escaped_lines("  tensors have other shapes", listed(differing, 5, "    ")) if differing else EscapedLines()


def _transformers() -> Any:
    return optional_package("transformers", "a Hugging Face model needs", "hf")


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no load report: a head with new weights is expected here. And no question on stdin."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    stdin, sys.stdin = sys.stdin, io.StringIO()  # at its end
    try:
        yield
    finally:
        sys.stdin = stdin
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def with_numbers(value: Any) -> Any:
    """The value with these objects as the numbers that they stand for, at any depth."""
    if isinstance(value, list):
        return [with_numbers(each) for each in value]
    if not isinstance(value, dict):
        return value
    number = value.get(TAG) if len(value) == 1 else None
    if isinstance(number, str) and number in NUMBERS:
        return NUMBERS[number]
    return {key: with_numbers(each) for key, each in value.items()}


def without_unread_pooler(module: Any, new: Sequence[str]) -> tuple[str, ...]:
    """Remove the pooler whose weights are all `new`, those that the folder lacks; return the other new weights.

    Pairs on it are then left out, with a note (see `layers.module_tensors`).
    """
    encoder = getattr(module, "encoder", None)
    if encoder is None or not type(module).__name__.endswith(COMPOSITE) or not has_removable_pooler(encoder):
        return tuple(new)
    own = {f"{PLACE}{name}" for name, _ in encoder.pooler.named_parameters()}
    if not own or not own <= set(new):
        return tuple(new)
    encoder.pooler = None
    module.unread = (PLACE,)
    return tuple(name for name in new if name not in own)
