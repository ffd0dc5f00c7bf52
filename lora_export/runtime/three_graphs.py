"""The three graphs of one model, run as the model without a cache: an encoder-decoder, or one that reads images.

Of an encoder-decoder, the encoder runs once. The decoder takes what it returned and the first tokens, and the decoder
with a past each token after them, with the cache so far. The outputs at every position must equal those of a model
without a cache.

Of a language model that reads images among its tokens, the vision encoder runs on all images, and the embedding on all
tokens. The features of the images then take the places of the embeddings of their tokens, in order, and the decoder
runs with its cache: a prompt, then token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.artifacts.files import (
    DECODER_FILE,
    EMBEDDING_FILE,
    ENCODER_FILE,
    GRAPH_FILES,
    IMAGE_TEXT_FILES,
    MERGED_FILE,
    VISION_FILE,
    WITH_PAST_FILE,
)
from lora_export.errors import RuntimeRefused
from lora_export.formats.contract import ROW_INPUTS
from lora_export.graph.cache_names import (
    DECODER_IDS,
    EMBEDS,
    ENCODER_MASK,
    FEATURES,
    GRIDS,
    HIDDEN,
    IDS,
    IMAGE_FEATURES,
    IMAGE_INPUTS,
    LAST_HIDDEN,
    LOGITS,
    MASK,
    PAST,
    POSITION_IDS,
    PRESENT,
    TOKEN_TYPE_INPUTS,
    TOKEN_TYPES,
    ImageTokens,
    image_tokens_of,
    past_of,
)
from lora_export.runtime.kv_cache import DECODE_STEPS, CacheRunner, turns, with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays
from lora_export.runtime.several_graphs import SeveralGraphs

ENCODER_OUTPUT = "encoder_last_hidden_state"  # of the model in PyTorch
DECODER_TURN = 4  # tokens of a turn; a text of more than two is run in turns, too


class EncoderDecoderRunner(SeveralGraphs):
    """The graphs of an encoder-decoder, run as one model: its inputs, and the tokens of the decoder so far."""

    FILES = GRAPH_FILES
    OUTPUTS = (LOGITS, ENCODER_OUTPUT)

    @property
    def encoder(self) -> OnnxRunner:
        return self.graphs[0]

    @property
    def decoder(self) -> OnnxRunner:
        """Of the first tokens."""
        return self.graphs[1]

    @property
    def with_past(self) -> OnnxRunner:
        """The decoder of the tokens behind a cache."""
        return self.graphs[2]

    def lacking(self) -> list[str]:
        present = set(map(past_of, self.outputs_of(self.decoder)))
        past = {name for name in self.with_past.axes if name.startswith(f"{PAST}.")}
        return [
            *([] if LAST_HIDDEN in self.outputs_of(self.encoder) else [f"{ENCODER_FILE} has no output {LAST_HIDDEN}"]),
            *([] if {IDS, HIDDEN} <= set(self.decoder.axes) else [f"{DECODER_FILE} does not take {IDS} and {HIDDEN}"]),
            *([] if LOGITS in self.outputs_of(self.decoder) else [f"{DECODER_FILE} has no output {LOGITS}"]),
            *([] if LOGITS in self.outputs_of(self.with_past) else [f"{WITH_PAST_FILE} has no output {LOGITS}"]),
            *([] if past else [f"{WITH_PAST_FILE} takes no {PAST}"]),
            *(
                f"{WITH_PAST_FILE} takes {name}, which {DECODER_FILE} does not return"
                for name in sorted(past - present)
            ),
        ]

    @property
    def axes(self) -> Mapping[str, tuple[int | None, ...]]:
        """The sizes of the encoder's inputs and of the decoder's tokens."""
        own = {name: sizes for name, sizes in self.encoder.axes.items() if name not in ROW_INPUTS}
        return {**own, DECODER_IDS: self.decoder.axes[IDS]}

    @property
    def notes(self) -> list[str]:
        in_turns = f". Longer texts were run in turns, too: {DECODER_TURN - 1} tokens or more after a cache, then one"
        return [
            f"run with its cache: encoder, first tokens, then {DECODE_STEPS} tokens one by one"
            f"{in_turns if self.with_past.axes[IDS][1] is None else ''}",
            "no token of padding among the decoder's: with a cache it counts as a position, without one it may not",
        ]

    @staticmethod
    def without_padding(inputs: Arrays, padding: int | None) -> Arrays:
        """The inputs with another token in place of the decoder's padding."""
        if padding is None or DECODER_IDS not in inputs:
            return inputs
        ids = inputs[DECODER_IDS]
        return {**inputs, DECODER_IDS: np.where(ids == padding, padding - 1 if padding else 1, ids)}

    def run(self, inputs: Arrays) -> Arrays:
        """The logits of every token of the decoder, and what the encoder returned.

        Where the text is run in turns, too, the logits at every second position, from the second on, are those.
        Raises RuntimeRefused for inputs that the graphs do not take.
        """
        if DECODER_IDS not in inputs:
            raise RuntimeRefused(f"the graphs take {DECODER_IDS}; the model takes {', '.join(inputs)}")
        ids = inputs[DECODER_IDS]
        hidden = self.encoder.run({name: value for name, value in inputs.items() if name != DECODER_IDS})[LAST_HIDDEN]
        given = {HIDDEN: hidden, **({ENCODER_MASK: inputs[MASK]} if MASK in inputs else {})}
        logits = self._logits(ids, given, _steps(ids.shape[1]))
        if self._takes_turns(ids.shape[1]):
            logits[:, 1::2] = self._logits(ids, given, turns(ids.shape[1], DECODER_TURN))[:, 1::2]
        return {LOGITS: logits, ENCODER_OUTPUT: hidden}

    def _takes_turns(self, length: int) -> bool:
        """Whether the decoder takes several tokens after a cache, and the text has that many turns."""
        return self.with_past.axes[IDS][1] is None and length > 2 * DECODER_TURN

    def _logits(self, ids: NDArray[Any], given: Arrays, steps: Iterable[tuple[int, int]]) -> NDArray[Any]:
        logits: list[NDArray[Any]] = []
        cache: Arrays = {}
        for start, stop in steps:
            graph = self.with_past if start else self.decoder
            feeds = {IDS: ids[:, start:stop], **given, **cache}
            outputs = graph.run({name: value for name, value in feeds.items() if name in graph.axes})
            logits.append(outputs[LOGITS])
            present = {name: value for name, value in outputs.items() if name.startswith(f"{PRESENT}.")}
            cache |= {past_of(name): value for name, value in present.items()}
        return np.concatenate(logits, axis=1)

    def outputs_by_graph(self, length: int) -> dict[str, tuple[str, slice]]:
        """The file of each graph -> the output that it makes in a run over `length` tokens, and at which positions."""
        (_, first), *_ = _steps(length)
        every = 2 if self._takes_turns(length) else 1  # position from the first on
        return {
            ENCODER_FILE: (ENCODER_OUTPUT, slice(None)),
            DECODER_FILE: (LOGITS, slice(0, first, every)),
            WITH_PAST_FILE: (LOGITS, slice(1 if every > 1 else first, length)),
        }


def _steps(length: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of a decoder."""
    first = max(1, length - DECODE_STEPS)
    yield 0, first
    for start in range(first, length):
        yield start, start + 1


# --- a language model that reads images among its tokens ---


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
        return replace(runner, two_way=self.tokens.two_way)

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
        if self.tokens.two_way is not None:
            given[TOKEN_TYPES] = inputs.get(TOKEN_TYPES, self.token_types(ids))
        return {**self._cached.run(given), IMAGE_FEATURES: features}

    def features(self, inputs: Arrays) -> NDArray[Any]:
        """What the vision encoder makes of images, (tokens, features)."""
        return self.encoded(inputs)[FEATURES]

    def encoded(self, inputs: Arrays) -> Arrays:
        """The outputs of the vision encoder for images."""
        return self.vision.run({name: inputs[name] for name in self.image_inputs})

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

    def token_types(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The types of a prompt's tokens (batch, tokens): where images are marked, 1 for theirs, and else 0."""
        return (ids == self.tokens.token).astype(np.int64) if self.tokens.two_way else np.zeros_like(ids)

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


SEVERAL_RUNNERS: tuple[type[SeveralGraphs], ...] = (EncoderDecoderRunner, ImageTextRunner)


def runner_of(files: tuple[str, ...]) -> type[SeveralGraphs]:
    """The class of the runner of graphs in these files."""
    return next(runner for runner in SEVERAL_RUNNERS if files == runner.FILES)
