"""Export a language model that reads images among its tokens, with its key/value cache: as three graphs.

The vision encoder takes the images and returns `image_features` [tokens of all images, features], behind the projector.
The embedding takes `input_ids` [batch, sequence] and returns `inputs_embeds` [batch, sequence, features]. The program
that runs the graphs puts the features in place of the embeddings of the images' tokens. The decoder is that of
`cached_decoder`, with `inputs_embeds` in place of `input_ids`. transformers.js has the same three graphs with the same
names.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from torch import Tensor, nn

from lora_export.graph.cache_names import (
    EMBEDS,
    FEATURES,
    GRIDS,
    IDS,
    IMAGE_FEATURES,
    IMAGE_INPUTS,
    LOGITS,
    ImageTokens,
)
from lora_export.models.cached_decoder import BATCH_SYMBOL, SEQUENCE_SYMBOL, export_decoder
from lora_export.models.export import to_onnx
from lora_export.models.model import Axes, Model, ModelInputs
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
            yield GridEncoder(module)
        return
    # In a list: LLaVA's code would list the features image by image, and their number would be fixed
    hook = part.register_forward_hook(lambda _, __, features: [features])
    try:
        yield _Encoder(module)
    finally:
        hook.remove()


class _PartOf(nn.Module):
    """A part of a model, whose weights have their names in the model behind `model.`."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model


class _Encoder(_PartOf):
    """Images of one size as features (tokens of all images, features)."""

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        (features,) = self.model.get_image_features(pixel_values=pixel_values).pooler_output
        return {FEATURES: features.flatten(0, 1)}


class _Embedding(_PartOf):
    """The embeddings of tokens, without those of images."""

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {EMBEDS: self.model.get_input_embeddings()(input_ids)}


def return_image_features(module: nn.Module) -> None:
    """Let a model return its logits and the features of all images (tokens, features), and nothing else."""
    convert_outputs(module, _logits_and_features)


def _logits_and_features(outputs: Any) -> dict[str, torch.Tensor]:
    found = outputs.image_outputs.pooler_output
    images = found if isinstance(found, list | tuple) else [found]
    return {LOGITS: outputs.logits, IMAGE_FEATURES: torch.cat([each.flatten(0, -2) for each in images])}


# --- The vision encoder of a model whose images are grids of patches of any size (Qwen2-VL), for an exporter ---
#
# The patches of all images are one sequence. The model's own code loops over the images, which no exporter takes with
# another number or another size of images. Here the place of each patch is computed from the grids by tensor
# operations, and passed to the model where it would compute it. A patch attends to those of its own frame or window: a
# mask from the number of the frame or window of each patch takes the place of the limits of each.

GROUPED_ATTENTION = "lora_export_flash"  # a name with "flash" in it is given the limits of frames and windows


class PatchPlaces(NamedTuple):
    """Where each patch (patches,) of a sequence is, in the order of a model that merges `merge` x `merge` of them."""

    image: Tensor
    frame: Tensor  # counted over all images
    row: Tensor
    column: Tensor


def patch_places(patches: Tensor, grids: Tensor, merge: int) -> PatchPlaces:
    """The places of patches (patches, ...) in images with these grids (images, 3): frames, rows and columns of each."""
    number = torch.arange(patches.shape[0])
    image = _group_of(number, grids.prod(1).cumsum(0))
    within = number - _before(grids.prod(1))[image]
    rows, columns = grids[:, 1][image], grids[:, 2][image]
    frame = within // (rows * columns)
    block, inner = within % (rows * columns) // merge**2, within % merge**2
    across = columns // merge
    return PatchPlaces(
        image,
        _before(grids[:, 0])[image] + frame,
        block // across * merge + inner // merge,
        block % across * merge + inner % merge,
    )


class Windows(NamedTuple):
    """The order of merged patches by windows, and the window of each patch in this order."""

    order: Tensor
    window: Tensor


def windows(places: PatchPlaces, grids: Tensor, merge: int, size: int) -> Windows:
    """Windows of `size` x `size` merged patches of each frame (Qwen2.5-VL)."""
    high, wide = (-(-(grids[:, axis] // merge) // size) for axis in (1, 2))  # rounded up
    row, column, image, frame = (
        each[:: merge**2] for each in (places.row // merge, places.column // merge, places.image, places.frame)
    )
    of_frame = frame - _before(grids[:, 0])[image]
    first = _before(grids[:, 0] * high * wide)[image]
    window = first + (of_frame * high[image] + row // size) * wide[image] + column // size
    key = (window * size + row % size) * size + column % size
    order = torch.argsort(key)
    return Windows(order, window[order].repeat_interleave(merge**2))


def _before(counts: Tensor) -> Tensor:
    """How many there are before each group."""
    return counts.cumsum(0) - counts


def _group_of(numbers: Tensor, ends: Tensor) -> Tensor:
    """The group of each number, given the number behind the last one of each group."""
    return (numbers[:, None] >= ends[None, :]).sum(1)


def _attention(
    _: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *__: Any,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **___: Any,
) -> tuple[Tensor, None]:
    """Attention (1, heads, patches, features) within groups; here `cu_seq_lens_q` is the group of each patch."""
    same = cu_seq_lens_q[:, None] == cu_seq_lens_q[None, :]
    found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=same[None, None], scale=scaling)
    return found.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def attention_in_groups(tower: Any) -> Iterator[None]:
    """The attention of a tower by a mask, while active."""
    functions: Any = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    own = tower.config._attn_implementation
    functions.register(GROUPED_ATTENTION, _attention)
    tower.config._attn_implementation = GROUPED_ATTENTION
    try:
        yield
    finally:
        tower.config._attn_implementation = own


class GridEncoder(_PartOf):
    """Patches of images with grids as features (tokens of all images, features)."""

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> dict[str, Tensor]:
        tower = getattr(self.model.base_model, TOWER)
        merge = tower.spatial_merge_size
        places = patch_places(pixel_values, image_grid_thw, merge)
        given = {
            "position_ids": torch.stack([places.row, places.column], 1),
            "cu_seqlens": places.frame,
            "max_seqlen": 1,
        }
        if hasattr(tower, "window_size"):
            size = tower.window_size // merge // tower.patch_size
            order, window = windows(places, image_grid_thw, merge, size)
            given |= {"window_index": order, "cu_window_seqlens": window, "max_window_seqlen": 1}
        return {FEATURES: tower(pixel_values, grid_thw=image_grid_thw, **given).pooler_output}
