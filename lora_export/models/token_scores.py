"""A language model whose output is the log-probability of each token of its text, as servers give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_export.errors import InputRefused
from lora_export.graph.cache_names import IDS, LOGITS
from lora_export.layers.torch_internals import exchange_forward
from lora_export.models.model import Limits, Model, ModelInputs, Sizes
from lora_export.models.processors import optional_package
from lora_export.models.traced_lengths import OF_TEXTS, with_traced_lengths
from lora_export.models.tracing import named_outputs

SCORES = "log_probabilities"
HALF_CACHE = "rounds_cache"  # attribute of a module whose keys and values are rounded to float16

Draw = Callable[[int, int, int], list[list[int]] | None]  # batch, length, seed -> token ids, or None for any


def with_token_scores(model: Model, first: int, draw: Draw, longest: int | None = None, *, is_costly: bool) -> Model:
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

    usual: Limits = {OF_TEXTS: (first + 4, longest)}
    few: Limits = {"batch": (1, 1), OF_TEXTS: (first + 4, min(first + 8, longest or first + 8))}
    most = model.limits.get(OF_TEXTS, (0, None))[1]
    limits = few if is_costly else usual
    if most is not None:
        low, high = limits[OF_TEXTS]
        limits[OF_TEXTS] = (low, most if high is None else min(most, high))
    return replace(
        model,
        axes={IDS: dict(model.axes[IDS])},
        make_inputs=make,
        limits=limits,
        further=() if is_costly else tuple(sizes for sizes in model.further if sizes.get(OF_TEXTS, 0) > 1),
        traced=model.traced or {OF_TEXTS: (0, None)},  # known: its own inputs were looked at
        text_only=None,
    )


def _score_tokens(module: nn.Module, first: int) -> None:
    cls: Any = type(module)

    def forward(self: Any, input_ids: Tensor) -> dict[str, Tensor]:
        cache = {"past_key_values": _half_cache(self.config), "use_cache": True} if hasattr(self, HALF_CACHE) else {}
        logits = named_outputs(cls.forward(self, input_ids=input_ids, **cache))[LOGITS][:, first - 1 : -1]
        scores = logits.float().log_softmax(-1)  # servers take the logarithm in fp32
        return {SCORES: scores.gather(-1, input_ids[:, first:, None]).squeeze(-1)}

    exchange_forward(module, forward)


def _half_cache(config: Any) -> Any:
    """A key/value cache in float16, whatever the model is in: llama.cpp's, unless it is told otherwise."""
    transformers = optional_package("transformers", "a Hugging Face model needs", "hf")

    class HalfCache(transformers.DynamicCache):  # type: ignore[name-defined,misc]
        def update(self, keys: Tensor, values: Tensor, *more: Any, **options: Any) -> Any:
            rounded = (each.to(torch.float16).to(each.dtype) for each in (keys, values))
            return super().update(*rounded, *more, **options)

    return HalfCache(config=config)
