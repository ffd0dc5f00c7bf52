"""The three graphs of an encoder-decoder, run as the model without a cache: the first tokens, then token by token.

The encoder runs once. The decoder takes what it returned and the first tokens, and the decoder with a past each token
after them, with the cache so far. The outputs at every position must equal those of a model without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.artifacts.files import (
    DECODER_FILE,
    ENCODER_FILE,
    GRAPH_FILES,
    WITH_PAST_FILE,
    adapter_of_file,
    file_for_graph,
)
from lora_export.errors import InputRefused, RuntimeRefused, one_line
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import ADAPTER_IDS, ROW_INPUTS, AdapterArrays
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
from lora_export.options.spelling import named
from lora_export.runtime.kv_cache import DECODE_STEPS, turns
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import TIMEOUT, Arrays, Placement

ENCODER_OUTPUT = "encoder_last_hidden_state"  # of the model in PyTorch
DECODER_TURN = 4  # tokens of a turn; a text of more than two is run in turns, too
OUTPUTS = (LOGITS, ENCODER_OUTPUT)  # of the three graphs as one model


@dataclass(frozen=True, eq=False)
class EncoderDecoderRunner:
    """The graphs of an encoder-decoder, run as one model: its inputs, and the tokens of the decoder so far."""

    path: Path  # the folder
    encoder: OnnxRunner
    decoder: OnnxRunner
    with_past: OnnxRunner
    names_known: bool = True
    cannot_give: Sequence[str] = ()

    @classmethod
    def open(cls, folder: Path, provider: str = "cpu", *, timeout: float = TIMEOUT) -> EncoderDecoderRunner:
        """The graphs in a folder. Raises InputRefused where one lacks what the others need, and as `OnnxRunner`."""
        return cls.of(folder, [OnnxRunner(folder / name, provider, timeout=timeout) for name in GRAPH_FILES])

    @classmethod
    def of(cls, folder: Path, graphs: Sequence[OnnxRunner]) -> EncoderDecoderRunner:
        """The runner of the three graphs, in the order of GRAPH_FILES. Raises InputRefused as `open`."""
        encoder, decoder, with_past = graphs
        runner = cls(folder, encoder, decoder, with_past)
        runner._check()
        return runner

    def _check(self) -> None:
        present = set(map(past_of, self._outputs(self.decoder)))
        past = {name for name in self.with_past.axes if name.startswith(f"{PAST}.")}
        lacking = [
            *([] if LAST_HIDDEN in self._outputs(self.encoder) else [f"{ENCODER_FILE} has no output {LAST_HIDDEN}"]),
            *([] if {IDS, HIDDEN} <= set(self.decoder.axes) else [f"{DECODER_FILE} does not take {IDS} and {HIDDEN}"]),
            *([] if LOGITS in self._outputs(self.decoder) else [f"{DECODER_FILE} has no output {LOGITS}"]),
            *([] if LOGITS in self._outputs(self.with_past) else [f"{WITH_PAST_FILE} has no output {LOGITS}"]),
            *([] if past else [f"{WITH_PAST_FILE} takes no {PAST}"]),
            *(
                f"{WITH_PAST_FILE} takes {name}, which {DECODER_FILE} does not return"
                for name in sorted(past - present)
            ),
        ]
        if lacking:
            raise InputRefused(f"{self.path}: {'; '.join(lacking)}")

    @staticmethod
    def _outputs(graph: OnnxRunner) -> list[str]:
        return [output.name for output in graph.session.get_outputs()]

    @property
    def graphs(self) -> tuple[OnnxRunner, OnnxRunner, OnnxRunner]:
        """The encoder, the decoder, and the decoder with a past."""
        return self.encoder, self.decoder, self.with_past

    @property
    def longest(self) -> dict[str, int]:
        """The sizes up to which the graphs were made (see `OnnxRunner.longest`): of each symbol the least."""
        found = sorted((each for graph in self.graphs for each in graph.longest.items()), key=lambda each: -each[1])
        return dict(found)

    @property
    def axes(self) -> Mapping[str, tuple[int | None, ...]]:
        """The sizes of the encoder's inputs and of the decoder's tokens."""
        own = {name: sizes for name, sizes in self.encoder.axes.items() if name not in ROW_INPUTS}
        return {**own, DECODER_IDS: self.decoder.axes[IDS]}

    @property
    def placement(self) -> Placement:
        own = [graph.placement for graph in self.graphs]
        by_provider: dict[str, tuple[tuple[str, str], ...]] = {}
        for placement in own:
            for provider, nodes in placement.by_provider.items():
                by_provider[provider] = (*by_provider.get(provider, ()), *nodes)
        return Placement(own[0].requested_provider, by_provider, own[0].options, own[0].version)

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

    @property
    def adapters_by_row(self) -> list[str] | None:
        """The names of the adapters that rows may choose from, from id 1 on. Raises InputRefused for unequal lists."""
        names = [own for graph in self.graphs if (own := graph.adapters_by_row) is not None]
        if any(own != names[0] for own in names):
            raise InputRefused(f"{self.path}: the graphs do not have the same adapters")
        return names[0] if names else None

    def close(self) -> None:
        for graph in self.graphs:
            graph.close()

    @property
    def adapters_per_row(self) -> int:
        return max(graph.adapters_per_row for graph in self.graphs)

    def with_rows(
        self, ids: Sequence[int] | Sequence[Sequence[int]], scales: Sequence[Sequence[float]] | None = None
    ) -> EncoderDecoderRunner:
        """The same sessions with these adapter ids for the rows of every batch (see `OnnxRunner.with_rows`).

        A graph that no adapter changes has none. Raises InputRefused where this is so for all.
        """
        if self.adapters_by_row is None:
            raise InputRefused(
                f"{self.path}: no graph has an input {ADAPTER_IDS}: they were not made with {named('lora', 'rows')}"
            )
        return self._each(lambda graph: graph if graph.adapters_by_row is None else graph.with_rows(ids, scales))

    @property
    def has_slots(self) -> bool:
        """Whether adapters are put into slots of the graphs."""
        return any(graph.has_slots for graph in self.graphs)

    def with_slots(self, values: Callable[[OnnxRunner], Mapping[str, AdapterArrays]]) -> EncoderDecoderRunner:
        """The same sessions with these adapters in the slots of each graph (see `OnnxRunner.with_slots`)."""
        return self._each(lambda graph: graph.with_slots(values(graph)) if graph.has_slots else graph)

    def with_slot_files(self, names: Iterable[str]) -> EncoderDecoderRunner:
        """The same sessions with the files of these adapters in their slots (see `OnnxRunner.with_slot_files`)."""
        found = list(names)

        def filled(graph: OnnxRunner) -> OnnxRunner:
            return graph.with_slot_files({name: self.adapter_file(name, graph) for name in found})

        return self._each(lambda graph: filled(graph) if graph.has_slots else graph)

    def with_moved_adapters(self) -> tuple[EncoderDecoderRunner, list[int]] | None:
        """The same sessions after another adapter took the place of that of each slot (`OnnxRunner`'s)."""
        moved = {graph: found for graph in self.graphs if (found := graph.with_moved_adapters()) is not None}
        if not moved:
            return None
        now = min((slots for _, slots in moved.values()), key=len)  # those that all graphs have
        return self._each(lambda graph: moved[graph][0] if graph in moved else graph), now

    def with_adapter(self, name: str) -> EncoderDecoderRunner:
        """The same sessions with an adapter's files in every run (see `OnnxRunner.with_adapter`).

        Raises InputRefused where no graph takes an adapter, and where a graph that does lacks its file.
        """
        if not any(graph.lacks_adapter for graph in self.graphs):
            raise InputRefused(
                f"{self.path}: no graph takes an adapter: they were not made with {named('lora', 'inputs')}"
            )
        return self._each(
            lambda graph: graph.with_adapter(self.adapter_file(name, graph)) if graph.lacks_adapter else graph
        )

    def adapter_file(self, name: str, graph: OnnxRunner) -> Path:
        """The path of an adapter's file for a graph. Raises InputRefused where there is none."""
        path = self.path / file_for_graph(name, graph.path.name)
        if not path.is_file():
            others = {adapter_of_file(other) for other in self.path.glob(f"*{onnx_adapter.SUFFIX}")} - {"", name}
            known = f"; the adapters there: {', '.join(sorted(others))}" if others else ""
            raise InputRefused(f"there is no {one_line(path.name)} in {self.path}{known}")
        return path

    def with_provider_defaults(self) -> EncoderDecoderRunner:
        return self._each(OnnxRunner.with_provider_defaults)

    def _each(self, change: Callable[[OnnxRunner], OnnxRunner]) -> EncoderDecoderRunner:
        return EncoderDecoderRunner.of(self.path, [change(graph) for graph in self.graphs])

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

    @property
    def takes_rows(self) -> bool:
        return any(graph.takes_rows for graph in self.graphs)


def _steps(length: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of a decoder."""
    first = max(1, length - DECODE_STEPS)
    yield 0, first
    for start in range(first, length):
        yield start, start + 1
