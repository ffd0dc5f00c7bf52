"""The three graphs of an encoder-decoder, run as the model without a cache: the first tokens, then token by token.

The encoder runs once. The decoder takes what it returned and the first tokens, and the decoder with a past each token
after them, with the cache so far. The outputs at every position must equal those of a model without a cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.artifacts.files import (
    DECODER_FILE,
    ENCODER_FILE,
    GRAPH_FILES,
    WITH_PAST_FILE,
)
from lora_export.errors import RuntimeRefused
from lora_export.formats.contract import ROW_INPUTS
from lora_export.graph.cache_names import (
    DECODER_IDS,
    ENCODER_MASK,
    HIDDEN,
    IDS,
    LAST_HIDDEN,
    LOGITS,
    MASK,
    PAST,
    PRESENT,
    past_of,
)
from lora_export.runtime.kv_cache import DECODE_STEPS, turns
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
