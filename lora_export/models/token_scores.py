"""A language model whose output is the log-probability of each token of its text, as servers give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.extras import optional_package
from lora_export.graph.cache_names import IDS, LOGITS
from lora_export.layers.torch_internals import exchange_forward
from lora_export.models.model import Limits, Model, ModelInputs, Sizes
from lora_export.models.text_inputs import LONG
from lora_export.models.traced_lengths import OF_TEXTS, with_traced_lengths
from lora_export.models.tracing import named_outputs

SCORES = "log_probabilities"
FP32_BYTES = 4
FEW_VALUES = 500  # of an output, above which the judge has its narrowest limits (`parity.ratio_limit`)
HALF_CACHE = "rounds_cache"  # attribute of a module whose keys and values are rounded to float16

DrawTexts = Callable[[int, int, int], list[list[int]] | None]  # batch, length, seed -> token ids, or None for any


def with_token_scores(
    model: Model, first: int, draw: DrawTexts, longest: int | None = None, *, is_costly: bool
) -> Model:
    """The model with `input_ids` alone as its input, and log-probabilities (batch, sequence - first) as its output.

    A text has no padding. `draw` gives the tokens of the inputs. Where each takes much (`is_costly`), they are few.
    The module computes that from now on. Raises InputRefused for what is no language model of transformers.
    """
    if not model.is_huggingface or IDS not in model.axes or "decoder_input_ids" in model.axes:
        raise InputRefused(
            f"{model.source} is no language model in a Hugging Face folder: a server gives values of texts"
        )
    model = with_traced_lengths(model)
    _score_tokens(model.module, first)
    made_before = model.make_inputs

    def make(sizes: Sizes, generator: torch.Generator) -> ModelInputs:
        drawn = draw(sizes["batch"], sizes[OF_TEXTS], generator.initial_seed())
        return {IDS: made_before(sizes, generator)[IDS] if drawn is None else torch.tensor(drawn)}

    positions = model.limits.get(OF_TEXTS, (0, None))[1]  # the server generates one token beyond those of a text
    most = min((size for size in (longest, positions and positions - 1) if size), default=None)
    limits: Limits = {OF_TEXTS: (first + 4, most)}
    further = tuple(sizes for sizes in model.further if sizes.get(OF_TEXTS, 0) > 1)
    if is_costly:
        limits, further = {"batch": (1, 1), OF_TEXTS: (first + 4, min(first + 8, most or first + 8))}, ()
    elif next(model.module.parameters()).itemsize < FP32_BYTES:
        # PyTorch's own error is large then. An output of few values would be allowed several times as much of it.
        length = min(LONG, most or LONG)
        batch = FEW_VALUES // (length - first) + 1
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


def _score_tokens(module: nn.Module, first: int) -> None:
    cls: Any = type(module)

    def forward(self: Any, input_ids: Tensor) -> dict[str, Tensor]:
        taken = cache_argument(cls) if hasattr(self, HALF_CACHE) else ""
        cache = {taken: _half_cache(self.config), "use_cache": True} if taken else {}
        logits = named_outputs(cls.forward(self, input_ids=input_ids, **cache))[LOGITS][:, first - 1 : -1]
        scores = logits.float().log_softmax(-1)  # servers take the logarithm in fp32
        return {SCORES: scores.gather(-1, input_ids[:, first:, None]).squeeze(-1)}

    exchange_forward(module, forward)


def cache_argument(cls: type[nn.Module]) -> str:
    """What a model takes a key/value cache as; empty where it takes none."""
    names = [name for base in cls.__mro__ if hasattr(base, "forward") for name in signature(base.forward).parameters]
    return next((name for name in ("cache", "past_key_values") if name in names), "")


def _half_cache(config: Any) -> Any:
    """A key/value cache in float16, whatever the model is in: llama.cpp's, unless another type was chosen."""
    transformers = optional_package("transformers", "a Hugging Face model needs", "hf")

    class HalfCache(transformers.DynamicCache):  # type: ignore[name-defined,misc]
        def update(self, keys: Tensor, values: Tensor, *more: Any, **options: Any) -> Any:
            rounded = (each.to(torch.float16).to(each.dtype) for each in (keys, values))
            return super().update(*rounded, *more, **options)

    return HalfCache(config=config)
