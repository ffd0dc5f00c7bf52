"""The graphs of an encoder-decoder, run step by step. The cache stays where onnxruntime made it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.onnx_adapter import array_of_ort_value
from lora_export.formats.row_adapters import row_inputs
from lora_export.graph.cache_names import (
    DECODER_IDS,
    ENCODER_MASK,
    HIDDEN,
    IDS,
    LAST_HIDDEN,
    LOGITS,
    MASK,
    PRESENT,
    past_of,
)
from lora_export.options.spelling import named
from lora_export.runtime.encoder_decoder import EncoderDecoderRunner
from lora_export.runtime.ort_session import raising_refusals
from lora_export.runtime.runner import Arrays
from lora_export.runtime.session import Session


class EncoderDecoder:
    """The folder of an encoder-decoder that `export_onnx` made with `with_cache`, or one with the same graphs.

    `provider` is `cpu` or `cuda`; on `cuda` the cache stays on the GPU. Raises InputRefused for graphs that do not
    belong together, EnvironmentLacking where the provider does not run, and RuntimeRefused where onnxruntime refuses
    a graph.
    """

    def __init__(self, folder: Path, provider: str = "cpu"):
        self.path, self.provider = folder, provider
        self.graphs = EncoderDecoderRunner.open(folder, provider)
        self.rows: list[str] = self.graphs.adapters_by_row or []
        inputs = self.graphs.axes.items()
        # The sizes of what the encoder reads: token ids, sounds or pixels. None where they vary
        self.takes = {name: sizes for name, sizes in inputs if name not in (MASK, DECODER_IDS)}
        self.takes_mask = MASK in self.graphs.encoder.axes
        # Graph -> the session that binds adapters, of graphs that take one
        self.sessions = {
            graph: Session(graph.path, provider=provider, session=graph.session)
            for graph in self.graphs.graphs
            if graph.lacks_adapter
        }

    def load(self, name: str) -> None:
        """Load an adapter's files in the folder. Raises InputRefused where they are missing or do not fit."""
        if not self.sessions:
            raise InputRefused(f"{self.path} takes no adapter: it was not made with {named('lora', 'inputs')} or rows")
        for graph, session in self.sessions.items():
            session.load(name, self.graphs.adapter_file(name, graph))

    def start(
        self, inputs: Arrays, adapter: str | None = None, adapter_ids: Sequence[int] | None = None
    ) -> EncoderDecoderRun:
        """Run the encoder, with a loaded adapter, or with the adapter of each row by its id."""
        return EncoderDecoderRun(self, inputs, adapter, adapter_ids)


class EncoderDecoderRun:
    """The state of one batch: what the encoder returned, and the cache of the decoder."""

    def __init__(self, model: EncoderDecoder, inputs: Arrays, adapter: str | None, adapter_ids: Sequence[int] | None):
        self.model, self.adapter = model, adapter
        batch = len(next(iter(inputs.values())))
        self.ids = np.array(adapter_ids or [0] * batch, np.int64)
        encoder = model.graphs.encoder
        given = {name: value for name, value in inputs.items() if name in encoder.axes}
        (hidden,) = self._run(encoder, given, {}, [LAST_HIDDEN])
        self.given: dict[str, Any] = {HIDDEN: hidden}
        if MASK in inputs:
            self.given[ENCODER_MASK] = inputs[MASK]
        self.cache: dict[str, Any] = {}  # names of the past -> values of onnxruntime

    def of_rows(self, rows: Sequence[int]) -> EncoderDecoderRun:
        """A run of these rows alone, before their first token. The encoder is not run again."""
        made, chosen = copy.copy(self), list(rows)
        made.ids, made.cache = self.ids[chosen], {}
        made.given = {
            name: (value if isinstance(value, np.ndarray) else array_of_ort_value(value))[chosen]
            for name, value in self.given.items()
        }
        return made

    def restart(self) -> None:
        """Forget all tokens of the texts."""
        self.cache = {}

    def step(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],  # noqa: ARG002
        positions: NDArray[np.int64],  # noqa: ARG002
    ) -> NDArray[np.floating]:
        """Run the next tokens [batch, tokens]; return the logits of the last one, [batch, vocabulary].

        The texts start with as many tokens each, so that there is no padding: mask and positions are not needed.
        """
        graphs = self.model.graphs
        graph = graphs.with_past if self.cache else graphs.decoder
        feeds = {IDS: ids, **{name: value for name, value in self.given.items() if isinstance(value, np.ndarray)}}
        kept = {**self.cache, **{name: value for name, value in self.given.items() if name not in feeds}}
        present = [output.name for output in graph.session.get_outputs() if output.name.startswith(f"{PRESENT}.")]
        logits, *values = self._run(graph, feeds, kept, [LOGITS, *present])
        self.cache |= dict(zip(map(past_of, present), values, strict=True))
        last: NDArray[np.floating] = array_of_ort_value(logits)[:, -1]
        return last

    def _run(self, graph: Any, feeds: Arrays, kept: dict[str, Any], outputs: list[str]) -> list[Any]:
        """The values of outputs, given arrays and values of onnxruntime. What a graph does not take is left out."""
        binding = graph.session.io_binding()
        if graph in self.model.sessions:
            self.model.sessions[graph].bind(binding, adapter=self.adapter)
        if graph.takes_rows:
            feeds = {**feeds, **row_inputs(self.ids, None, graph.adapters_per_row)}
        for name, value in feeds.items():
            if name in graph.axes:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, value in kept.items():
            if name in graph.axes:
                binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cpu" if name == LOGITS else self.model.provider, 0)
        with raising_refusals(self.model.path):
            graph.session.run_with_iobinding(binding)
        found: list[Any] = binding.get_outputs()
        return found
