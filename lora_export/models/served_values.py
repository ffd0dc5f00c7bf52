"""A model whose outputs are what servers give of a text: log-probabilities of its tokens, or a vector.

The vector is an embedding, or has a value for each label. The model then takes `input_ids` alone, without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.extras import optional_package
from lora_export.graph.cache_names import IDS, LOGITS
from lora_export.layers.activation import CACHE_KEYWORDS
from lora_export.layers.torch_internals import exchange_forward
from lora_export.models.model import Limits, Model, ModelInputs, Sizes
from lora_export.models.outputs import named_outputs
from lora_export.models.sentence_transformer import SENTENCE
from lora_export.models.text_inputs import LONG
from lora_export.models.traced_lengths import OF_TEXTS, with_traced_lengths
from lora_export.weights.task_head import CLASS_ENDINGS

SCORES = "log_probabilities"
FP32_BYTES = 4
FEW_VALUES = 500  # of an output, above which the judge has its narrowest limits (`parity.ratio_limit`)
MOST_TEXTS = 64  # of an input whose outputs are vectors
SHORTEST = 4  # tokens of such a text
HALF_CACHE = "rounds_cache"  # attribute of a module whose keys and values are rounded to float16
LABEL_VALUES = "probabilities"  # (batch, labels)

DrawTexts = Callable[[int, int, int], list[list[int]] | None]  # batch, length, seed -> token ids, or None for any


class TextVector(NamedTuple):
    """What a model has for a text as a whole: `output` (batch, width), from `source`, one of its own outputs."""

    output: str
    source: str
    finish: Callable[[Tensor], Tensor]  # what a server makes of the model's own values, in fp32


TEXT_EMBEDDING = TextVector(SENTENCE, SENTENCE, lambda values: values)
UNIT_TEXT_EMBEDDING = TEXT_EMBEDDING._replace(finish=lambda values: nn.functional.normalize(values, dim=-1))


def vector_of(model: Model) -> TextVector | None:
    """The vector of an embedding model or a classifier of texts; None for others, such as language models.

    The values of labels are those of vLLM: the problem type of the config decides.
    """
    module: Any = model.module
    if getattr(module, "module_names", ()):
        return TEXT_EMBEDDING
    if not model.is_huggingface or not type(module).__name__.endswith(CLASS_ENDINGS["SEQ_CLS"]):
        return None
    config = module.config
    kind = config.problem_type or ("multi" if config.num_labels == 1 else "single")
    return TextVector(LABEL_VALUES, LOGITS, next(made for start, made in OF_PROBLEM.items() if kind.startswith(start)))


OF_PROBLEM: Mapping[str, Callable[[Tensor], Tensor]] = {
    "regression": lambda values: values,
    "multi": torch.sigmoid,
    "single": lambda values: values.softmax(-1),
}


def with_token_scores(
    model: Model, first: int, draw: DrawTexts, longest: int | None = None, *, is_costly: bool
) -> Model:
    """The model with log-probabilities (batch, sequence - first) as its output.

    `draw` gives the tokens of the inputs. Where each takes much (`is_costly`), they are few. The module computes that
    from now on. Raises InputRefused for what is no language model of transformers.
    """

    def scores(self: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
        outputs = _run(self, cls, input_ids)
        if LOGITS not in outputs:
            raise InputRefused(f"{model.source} has no {LOGITS} of tokens, and is no embedding model or classifier")
        values = _widened(outputs[LOGITS][:, first - 1 : -1]).log_softmax(-1)
        return {SCORES: values.gather(-1, input_ids[:, first:, None]).squeeze(-1)}

    cls = type(model.module)
    served = _of_texts(model, draw, first + 4, longest, lambda length: FEW_VALUES // (length - first) + 1)
    exchange_forward(served.module, scores)
    if not is_costly:
        return served
    most = served.limits[OF_TEXTS][1]
    limits: Limits = {"batch": (1, 1), OF_TEXTS: (first + 4, min(first + 8, most or first + 8))}
    return replace(served, limits=limits, further=())


def with_text_vector(
    model: Model, vector: TextVector, width: int, draw: DrawTexts, longest: int | None = None
) -> Model:
    """The model with a vector (batch, width) as its output. The module computes that from now on."""

    def computed(self: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
        return {vector.output: vector.finish(_widened(_run(self, cls, input_ids)[vector.source]))}

    cls = type(model.module)
    served = _of_texts(model, draw, SHORTEST, longest, lambda _: min(FEW_VALUES // width + 1, MOST_TEXTS))
    exchange_forward(served.module, computed)
    return served


def _of_texts(
    model: Model, draw: DrawTexts, shortest: int, longest: int | None, texts_for: Callable[[int], int]
) -> Model:
    """The model with `input_ids` as its only input. `texts_for` is how many of a length an output needs."""
    if not model.is_huggingface or IDS not in model.axes or "decoder_input_ids" in model.axes:
        raise InputRefused(
            f"{model.source} is no model of texts in a Hugging Face folder: a server gives values of texts"
        )
    model = with_traced_lengths(model)
    made_before = model.make_inputs

    def make(sizes: Sizes, generator: torch.Generator) -> ModelInputs:
        drawn = draw(sizes["batch"], sizes[OF_TEXTS], generator.initial_seed())
        return {IDS: made_before(sizes, generator)[IDS] if drawn is None else torch.tensor(drawn)}

    positions = model.limits.get(OF_TEXTS, (0, None))[1]  # the server generates one token beyond those of a text
    most = min((size for size in (longest, positions and positions - 1) if size), default=None)
    limits: Limits = {OF_TEXTS: (shortest, most)}
    further = tuple(sizes for sizes in model.further if sizes.get(OF_TEXTS, 0) > 1)
    if next(model.module.parameters()).itemsize < FP32_BYTES:
        # PyTorch's own error is large then. An output of few values would be allowed several times as much of it.
        length = min(LONG, most or LONG)
        batch = texts_for(length)
        limits, further = (
            {"batch": (batch, batch), OF_TEXTS: (length, most)},
            ({"batch": batch, OF_TEXTS: length + 24},),
        )
    return replace(
        model,
        axes={IDS: dict(model.axes[IDS])},
        make_inputs=make,
        limits=limits,
        further=further,
        traced=model.traced or {OF_TEXTS: (0, None)},  # known: its own inputs were looked at
        text_only=None,
    )


def _run(module: Any, cls: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """The outputs of the class, with a key/value cache in float16 where the module is to round it."""
    taken = cache_argument(cls) if hasattr(module, HALF_CACHE) else ""
    cache = {taken: _half_cache(module.config), "use_cache": True} if taken else {}
    return named_outputs(cls.forward(module, input_ids=input_ids, **cache))


def _widened(values: Tensor) -> Tensor:
    """Values in fp32 at least: servers take logarithms, sums and lengths in it."""
    return values.float() if values.itemsize < FP32_BYTES else values


def cache_argument(cls: type[nn.Module]) -> str:
    """What a model takes a key/value cache as; empty where it takes none."""
    names = [name for base in cls.__mro__ if hasattr(base, "forward") for name in signature(base.forward).parameters]
    return next((name for name in CACHE_KEYWORDS if name in names), "")


def _half_cache(config: Any) -> Any:
    """A key/value cache in float16, whatever the model is in: llama.cpp's, unless another type was chosen."""
    transformers = optional_package("transformers", "a Hugging Face model needs", "hf")

    class HalfCache(transformers.DynamicCache):  # type: ignore[name-defined,misc]
        def update(self, keys: Tensor, values: Tensor, *more: Any, **options: Any) -> Any:
            rounded = (each.to(torch.float16).to(each.dtype) for each in (keys, values))
            return super().update(*rounded, *more, **options)

    return HalfCache(config=config)
