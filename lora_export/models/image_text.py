"""Export a language model that reads images among its tokens, with its key/value cache: as three graphs.

The vision encoder takes the images and returns `image_features` [tokens of all images, features], behind the projector.
The embedding takes `input_ids` [batch, sequence] and returns `inputs_embeds` [batch, sequence, features]. The program
that runs the graphs puts the features in place of the embeddings of the images' tokens. The decoder is that of
`cached_decoder`, with `inputs_embeds` in place of `input_ids`. That of a model whose tokens of an image attend to each
other also takes `token_type_ids` [batch, past + sequence]. `deepstack` has what later layers add. transformers.js has
the same three graphs with the same names.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import onnx_ir as ir
import torch
from torch import nn

from lora_export.graph.cache_names import EMBEDS, GRIDS, IDS, IMAGE_FEATURES, IMAGE_INPUTS, LOGITS, ImageTokens
from lora_export.models.cached_decoder import BATCH_SYMBOL, SEQUENCE_SYMBOL, export_decoder
from lora_export.models.deepstack import all_features, embeds_of
from lora_export.models.export import to_onnx
from lora_export.models.image_encoders import FeatureEncoder, MaskedTileEncoder, PartOf, listed_images
from lora_export.models.image_grids import grid_images
from lora_export.models.image_sizes import ROW_TOWER, RowEncoder, SizedTileEncoder, pixels_of_token
from lora_export.models.model import Axes, Model, ModelInputs
from lora_export.models.outputs import convert_outputs


class Images(NamedTuple):
    """How the images of one type of model are exported."""

    encoder: Callable[[Any], AbstractContextManager[nn.Module]]
    two_way: int | None = None  # the type of the tokens that attend to each other in both directions; None: no token


IMAGE_FAMILIES: Mapping[str, Images] = {  # by the type of the model, and of a tower that decides alone
    "llava": Images(listed_images),
    ROW_TOWER: Images(RowEncoder.opened),
    "llava_next": Images(SizedTileEncoder.opened),
    "qwen2_vl": Images(grid_images),
    "qwen2_5_vl": Images(grid_images),
    "qwen3_vl": Images(grid_images),
    "gemma3": Images(FeatureEncoder.opened, two_way=1),
    "paligemma": Images(FeatureEncoder.opened, two_way=0),
    "internvl": Images(FeatureEncoder.opened),
    "idefics3": Images(MaskedTileEncoder.opened),
    "smolvlm": Images(MaskedTileEncoder.opened),
}
# Models that have a tower of a type that their config names -> the types that are exported
TOWERS: Mapping[str, tuple[str, ...]] = {
    "llava": ("clip_vision_model", "siglip_vision_model", ROW_TOWER),
    "llava_next": ("clip_vision_model", "siglip_vision_model"),
    "mistral3": (ROW_TOWER,),
}


def image_family(config: Mapping[str, Any]) -> str:
    """The key of IMAGE_FAMILIES for a model with this config; "" where there is none."""
    kind, vision = config.get("model_type"), config.get("vision_config")
    tower = vision.get("model_type") if isinstance(vision, dict) else None
    if not isinstance(kind, str) or tower not in (None, *TOWERS.get(kind, (tower,))):
        return ""
    family = ROW_TOWER if kind in TOWERS and tower == ROW_TOWER else kind
    return family if family in IMAGE_FAMILIES else ""


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
    family = image_family(module.config.to_dict())
    images = IMAGE_FAMILIES[family]
    inputs = {name: value for name, value in model.example_inputs().items() if name in IMAGE_INPUTS}
    with images.encoder(module) as encoder:
        vision = _part(encoder, inputs, {name: model.axes[name] for name in inputs}, opset)
    merge = module.config.vision_config.spatial_merge_size if GRIDS in inputs else 0
    pixels = pixels_of_token(module.config) if family == ROW_TOWER else 0
    (token,) = model.placeholders
    vision.metadata_props.update(ImageTokens(token, merge, images.two_way, pixels).properties)
    ids = {IDS: model.example_inputs()[IDS]}
    embedding = _part(_Embedding(module), ids, {IDS: {0: BATCH_SYMBOL, 1: SEQUENCE_SYMBOL}}, opset)
    with _token_types_behind_a_cache():
        decoder = export_decoder(module, opset=opset, takes_embeds=True, takes_token_types=images.two_way is not None)
    return ImageTextGraphs(vision, embedding, decoder)


def _part(part: nn.Module, inputs: ModelInputs, axes: Axes, opset: int | None) -> ir.Model:
    """The graph of a part; its weights have the names that they have in the whole model."""
    graph = to_onnx(part, inputs, axes=axes, opset=opset)
    for value in list(graph.graph.initializers.values()):
        value.name = (value.name or "").removeprefix("model.")
    return graph


@contextlib.contextmanager
def _token_types_behind_a_cache() -> Iterator[None]:
    """Let a model read the types of tokens also behind a cache. PaliGemma reads them where the cache is empty."""
    cache: Any = importlib.import_module("transformers.cache_utils").Cache
    with mock.patch.object(cache, "is_initialized", new=False):
        yield


class _Embedding(PartOf):
    """The embeddings of tokens, without those of images."""

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {EMBEDS: embeds_of(self.model, input_ids)}


def return_image_features(module: nn.Module) -> None:
    """Let a model return its logits and the features of all images (tokens, features), and nothing else."""
    convert_outputs(module, _logits_and_features)


def _logits_and_features(outputs: Any) -> dict[str, torch.Tensor]:
    return {LOGITS: outputs.logits, IMAGE_FEATURES: all_features(outputs.image_outputs)}
