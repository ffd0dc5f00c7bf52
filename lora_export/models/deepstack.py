"""Features of images that later layers of a decoder add (Qwen3-VL's deepstack), in an exported model.

The tower of such a model returns features of several depths for each token of an image: those that take the place of
its embedding, and those that each of the first layers of the decoder adds to its output. In the graphs they are one
row, one behind the other. The embedding of a text's token has zeros behind it, which change nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lora_export.layers.torch_internals import adding_to_all_tokens


def deepstack_layers(module: Any) -> int:
    """How many layers of the decoder add features of images. 0 for most models."""
    return len(getattr(getattr(module.config, "vision_config", None), "deepstack_visual_indexes", None) or ())


def embeds_of(module: Any, ids: Tensor) -> Tensor:
    """The embeddings of tokens (batch, tokens, features), with zeros for what each of these layers adds."""
    embeds: Tensor = module.get_input_embeddings()(ids)
    return torch.nn.functional.pad(embeds, (0, deepstack_layers(module) * embeds.shape[-1]))


def all_features(outputs: Any) -> Tensor:
    """The features of all images (tokens, features of all depths), from the outputs of a tower."""
    depths = (outputs.pooler_output, *(getattr(outputs, "deepstack_features", None) or ()))
    return torch.cat([_joined(images) for images in depths], dim=-1)


def _joined(found: Any) -> Tensor:
    """(tokens of all images, features), from a list by image or (images, tokens, features)."""
    images = found if isinstance(found, list | tuple) else [found]
    return torch.cat([each if each.ndim == 2 else each.flatten(0, -2) for each in images])


@contextlib.contextmanager
def deepstack_in_embeds(module: Any) -> Iterator[None]:
    """Let the decoder of a model read the features for its layers behind the embeddings, while active."""
    if not (count := deepstack_layers(module)):
        yield
        return
    decoder = module.base_model.language_model

    def divide(_: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeds, *added = given["inputs_embeds"].chunk(count + 1, dim=-1)
        return args, {**given, "inputs_embeds": embeds, "deepstack_visual_embeds": added}

    hook = decoder.register_forward_pre_hook(divide, with_kwargs=True)
    try:
        with adding_to_all_tokens(decoder):
            yield
    finally:
        hook.remove()
