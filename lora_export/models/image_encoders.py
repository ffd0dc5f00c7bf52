"""The vision encoders of models whose images have one size, for an exporter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lora_export.graph.cache_names import FEATURES


class PartOf(nn.Module):
    """A part of a model, whose weights have their names in the model behind `model.`."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    @classmethod
    @contextlib.contextmanager
    def opened(cls, model: Any) -> Iterator[nn.Module]:
        """The part of a model that needs no change for it."""
        yield cls(model)


class FeatureEncoder(PartOf):
    """Images or tiles of one size as features (tokens of all images, features)."""

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        found = self.model.get_image_features(pixel_values=pixel_values).pooler_output
        (features,) = found if isinstance(found, list | tuple) else (found,)
        return {FEATURES: features.flatten(0, 1)}


class MaskedTileEncoder(PartOf):
    """Tiles (1, tiles, channels, height, width) and masks of their pixels as features (tokens of all tiles, features).

    The model's own code drops tiles of zeros, and lists the features row by row (Idefics 3).
    """

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor) -> dict[str, Tensor]:
        base, size = self.model.base_model, self.model.config.vision_config.patch_size
        mask = pixel_attention_mask.flatten(0, 1)
        by_patch = mask.unflatten(1, (-1, size)).unflatten(3, (-1, size)).sum((2, 4))
        hidden = base.vision_model(pixel_values=pixel_values.flatten(0, 1), patch_attention_mask=by_patch > 0)
        return {FEATURES: base.connector(hidden.last_hidden_state).flatten(0, 1)}


@contextlib.contextmanager
def listed_images(module: Any) -> Iterator[nn.Module]:
    """The encoder of a model that lists the features image by image (LLaVA).

    What its projector returns is put in a list of one entry, while active: the number of entries would be fixed.
    """
    hook = module.base_model.multi_modal_projector.register_forward_hook(lambda _, __, features: [features])
    try:
        yield FeatureEncoder(module)
    finally:
        hook.remove()
