"""The three graphs of a language model that reads images among its tokens, run as one model without a cache.

The vision encoder runs on all images, and the embedding on all tokens. The features of the images then take the places
of the embeddings of their tokens, in order, and the decoder runs with its cache: a prompt, then token by token.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.artifacts.files import EMBEDDING_FILE, IMAGE_TEXT_FILES, MERGED_FILE, VISION_FILE
from lora_export.errors import RuntimeRefused
from lora_export.graph.cache_names import (
    EMBEDS,
    FEATURES,
    GRIDS,
    IDS,
    IMAGE_FEATURES,
    IMAGE_INPUTS,
    LOGITS,
    MASK,
    POSITION_IDS,
    TOKEN_TYPE_INPUTS,
    ImageTokens,
    image_tokens_of,
)
from lora_export.runtime.kv_cache import CacheRunner, with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays
from lora_export.runtime.several_graphs import SeveralGraphs


class ImageTextRunner(SeveralGraphs):
    """The graphs of a model with images, run as one model. Takes token ids, their mask, and the encoder's inputs."""

    FILES = IMAGE_TEXT_FILES
    OUTPUTS = (LOGITS, IMAGE_FEATURES)

    @property
    def vision(self) -> OnnxRunner:
        return self.graphs[0]

    @property
    def embedding(self) -> OnnxRunner:
        return self.graphs[1]

    @property
    def decoder(self) -> OnnxRunner:
        return self.graphs[2]

    @cached_property
    def tokens(self) -> ImageTokens:
        """The token of the images. Raises InputRefused where the graphs do not record it."""
        return image_tokens_of(self.vision.metadata, self.vision.path)

    def lacking(self) -> list[str]:
        has_cache = isinstance(with_cache(self.decoder, EMBEDS), CacheRunner)
        return [
            *([] if FEATURES in self.outputs_of(self.vision) else [f"{VISION_FILE} has no output {FEATURES}"]),
            *([] if EMBEDS in self.outputs_of(self.embedding) else [f"{EMBEDDING_FILE} has no output {EMBEDS}"]),
            *([] if LOGITS in self.outputs_of(self.decoder) else [f"{MERGED_FILE} has no output {LOGITS}"]),
            *([] if has_cache else [f"{MERGED_FILE} does not take {EMBEDS} and a cache"]),
        ]

    @property
    def axes(self) -> Mapping[str, tuple[int | None, ...]]:
        """The sizes of the token ids, their mask and types, and of the encoder's inputs."""
        return {
            **dict.fromkeys((IDS, MASK, *TOKEN_TYPE_INPUTS), (None, None)),
            **{name: self.vision.axes[name] for name in self.image_inputs},
        }

    @property
    def image_inputs(self) -> list[str]:
        """The names of the vision encoder's inputs, without those of adapters."""
        return [name for name in IMAGE_INPUTS if name in self.vision.axes]

    @property
    def notes(self) -> list[str]:
        return ["run as vision encoder, embedding and decoder", *self._cached.notes]

    @property
    def takes_positions(self) -> bool:
        """Whether the decoder takes the number of each token, and no place in a grid."""
        return len(self.decoder.axes.get(POSITION_IDS, ())) == 2

    @property
    def takes_padding(self) -> bool:
        return self._cached.takes_padding

    @cached_property
    def _cached(self) -> CacheRunner:
        runner = with_cache(self.decoder, EMBEDS)
        assert isinstance(runner, CacheRunner)
        return runner

    def run(self, inputs: Arrays) -> Arrays:
        """The logits of every token, and the features of all images (tokens, features).

        Raises RuntimeRefused for inputs that the graphs do not take, and where the images have more or fewer features
        than the texts have places for them.
        """
        if lacking := [name for name in (IDS, *self.image_inputs) if name not in inputs]:
            raise RuntimeRefused(f"the graphs take {', '.join(lacking)}; the model takes {', '.join(inputs)}")
        features = self.features(inputs)
        ids, mask = inputs[IDS], inputs.get(MASK, np.ones_like(inputs[IDS]))
        given = {EMBEDS: self.embeds(ids, features), MASK: mask}
        if positions := self.positions(inputs):
            given[POSITION_IDS] = positions[0]
        elif POSITION_IDS in inputs:
            given[POSITION_IDS] = inputs[POSITION_IDS]
        return {**self._cached.run(given), IMAGE_FEATURES: features}

    def features(self, inputs: Arrays) -> NDArray[Any]:
        """What the vision encoder makes of images, (tokens, features)."""
        found: NDArray[Any] = self.vision.run({name: inputs[name] for name in self.image_inputs})[FEATURES]
        return found

    def embeds(self, ids: NDArray[np.int64], features: NDArray[Any] | None) -> NDArray[Any]:
        """The embeddings (batch, tokens, features) of tokens, those of images from their features.

        Raises RuntimeRefused for another number of features than of places.
        """
        places = ids == self.tokens.token
        if features is None:
            return self._embedded(ids)
        if len(features) != (count := int(places.sum())):
            raise RuntimeRefused(f"the images have {len(features)} features, and the texts {count} places for them")
        embeds = self._embedded(np.where(places, 0, ids))  # the token may be beyond the table
        embeds[places] = features.astype(embeds.dtype)
        return embeds

    def _embedded(self, ids: NDArray[np.int64]) -> NDArray[Any]:
        found: NDArray[Any] = self.embedding.run({IDS: ids})[EMBEDS]
        return found

    def positions(self, inputs: Arrays) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Positions (3, batch, tokens) in time, rows and columns, and the next one of each row (batch,).

        None where the decoder counts the tokens.
        """
        if not self.tokens.merge:
            return None
        grids = inputs.get(GRIDS, np.zeros((0, 3), np.int64))
        return grid_positions(inputs[IDS], inputs.get(MASK, np.ones_like(inputs[IDS])), grids, self.tokens)

    def outputs_by_graph(self, length: int) -> dict[str, tuple[str, slice]]:  # noqa: ARG002
        """The embedding shows in the logits alone, so that the decoder stands for both."""
        return {VISION_FILE: (IMAGE_FEATURES, slice(None)), MERGED_FILE: (LOGITS, slice(None))}


def grid_positions(
    ids: NDArray[np.int64], mask: NDArray[np.int64], grids: NDArray[np.int64], tokens: ImageTokens
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions (3, batch, tokens) of texts with images of these grids (images, 3), as in Qwen2-VL.

    A text token has one number on all three axes. The tokens of an image begin at the next number, and add their frame,
    row and column. The token behind an image follows the greatest of these. Also returns the number behind the last
    token of each row (batch,).
    """
    positions = np.zeros((3, *ids.shape), np.int64)
    following = np.zeros(len(ids), np.int64)
    images = iter(grids)
    for row, (own, ones) in enumerate(zip(ids, mask, strict=True)):
        places, number, done = np.flatnonzero(ones), 0, 0
        while done < len(places):
            if own[places[done]] != tokens.token:
                positions[:, row, places[done]] = number
                done, number = done + 1, number + 1
                continue
            grid = _next_grid(images) // (1, tokens.merge, tokens.merge)
            offsets = np.indices(tuple(map(int, grid))).reshape(3, -1)
            now = places[done : done + offsets.shape[1]]
            positions[:, row, now] = number + offsets[:, : len(now)]
            done, number = done + len(now), number + int(grid[1:].max())
        following[row] = positions[:, row, places].max(initial=-1) + 1
    return positions, following


def _next_grid(images: Any) -> NDArray[np.int64]:
    grid: NDArray[np.int64] | None = next(images, None)
    if grid is None:
        raise RuntimeRefused("the texts have places for more images than there are")
    return grid
