"""Export a language model that reads images among its tokens, with its key/value cache: as three graphs.

The vision encoder takes the images and returns `image_features` [tokens of all images, features], behind the projector.
The embedding takes `input_ids` [batch, sequence] and returns `inputs_embeds` [batch, sequence, features]. The program
that runs the graphs puts the features in place of the embeddings of the images' tokens. The decoder is that of
`cached_decoder`, with `inputs_embeds` in place of `input_ids`. transformers.js has the same three graphs with the same
names.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from torch import nn

from lora_export.graph.cache_names import EMBEDS, FEATURES, GRIDS, IDS, IMAGE_FEATURES, IMAGE_INPUTS, LOGITS
from lora_export.graph.image_tokens import ImageTokens
from lora_export.models.cached_decoder import BATCH_SYMBOL, SEQUENCE_SYMBOL, export_decoder
from lora_export.models.export import to_onnx
from lora_export.models.model import Axes, Model, ModelInputs
from lora_export.models.packed_vision import GridEncoder, attention_in_groups
from lora_export.models.tracing import convert_outputs

# Type of a model -> the module that makes the features of its images: a projector behind the tower, or the tower of a
# model whose images are grids of patches. What follows it in the model's code loops over the images.
FEATURES_OF: Mapping[str, str] = {
    "llava": "multi_modal_projector",
    "qwen2_vl": "visual",
    "qwen2_5_vl": "visual",
}
TOWER = "visual"
TYPES_OF_TOWERS = {"llava": ("clip_vision_model", "siglip_vision_model")}  # those that are exported, where not all are


class ImageTextGraphs(NamedTuple):
    """The graphs of one model. Their weights have the names of the whole model."""

    vision: ir.Model
    embedding: ir.Model
    decoder: ir.Model


def export_image_text(model: Model, *, opset: int | None = None) -> ImageTextGraphs:
    """Export a model of transformers that reads images, in eval mode, with its cache. Writes no file.

    Weights are as `to_onnx` leaves them. Raises InputRefused as `export_decoder`, and RuntimeRefused where the exporter
    refuses a part of the model.
    """
    module: Any = model.module
    inputs = {name: value for name, value in model.example_inputs().items() if name in IMAGE_INPUTS}
    with _encoder(module) as encoder:
        vision = _part(encoder, inputs, {name: model.axes[name] for name in inputs}, opset)
    merge = module.config.vision_config.spatial_merge_size if GRIDS in inputs else 0
    (token,) = model.placeholders
    vision.metadata_props.update(ImageTokens(token, merge).properties)
    ids = {IDS: model.example_inputs()[IDS]}
    embedding = _part(_Embedding(module), ids, {IDS: {0: BATCH_SYMBOL, 1: SEQUENCE_SYMBOL}}, opset)
    return ImageTextGraphs(vision, embedding, export_decoder(module, opset=opset, takes_embeds=True))


def _part(part: nn.Module, inputs: ModelInputs, axes: Axes, opset: int | None) -> ir.Model:
    """The graph of a part; its weights have the names that they have in the whole model."""
    graph = to_onnx(part, inputs, axes=axes, opset=opset)
    for value in list(graph.graph.initializers.values()):
        value.name = (value.name or "").removeprefix("model.")
    return graph


@contextlib.contextmanager
def _encoder(module: Any) -> Iterator[nn.Module]:
    last = FEATURES_OF[module.config.model_type]
    part = getattr(module.base_model, last)
    if last == TOWER:
        with attention_in_groups(part):
            yield GridEncoder(module, last)
        return
    # In a list: LLaVA's code would list the features image by image, and their number would be fixed
    hook = part.register_forward_hook(lambda _, __, features: [features])
    try:
        yield _Encoder(module)
    finally:
        hook.remove()


class _Encoder(nn.Module):
    """Images of one size as features (tokens of all images, features)."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        (features,) = self.model.get_image_features(pixel_values=pixel_values).pooler_output
        return {FEATURES: features.flatten(0, 1)}


class _Embedding(nn.Module):
    """The embeddings of tokens, without those of images."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {EMBEDS: self.model.get_input_embeddings()(input_ids)}


def return_image_features(module: nn.Module) -> None:
    """Let a model return its logits and the features of all images (tokens, features), and nothing else."""
    convert_outputs(module, _logits_and_features)


def _logits_and_features(outputs: Any) -> dict[str, torch.Tensor]:
    found = outputs.image_outputs.pooler_output
    images = found if isinstance(found, list | tuple) else [found]
    return {LOGITS: outputs.logits, IMAGE_FEATURES: torch.cat([each.flatten(0, -2) for each in images])}
