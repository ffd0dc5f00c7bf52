"""Decoder graphs, also those of an encoder-decoder, run step by step. The cache stays where onnxruntime made it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lora_export.artifacts.files import MERGED_FILE
from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import ADAPTER_IDS, ROW_INPUTS, row_inputs
from lora_export.formats.onnx_adapter import ONNX_TYPES, array_of_ort_value, import_onnxruntime, ort_value_of_array
from lora_export.graph.cache_names import (
    BRANCH,
    CACHE_POSITION,
    DECODER_IDS,
    EMBEDS,
    ENCODER_MASK,
    FEATURES,
    GRIDS,
    HIDDEN,
    IDS,
    IMAGE_SIZES,
    LAST_HIDDEN,
    LOGITS,
    MASK,
    POSITION_IDS,
    PRESENT,
    TOKEN_COUNTS,
    TOKEN_TYPES,
    past_of,
)
from lora_export.options.spelling import command, named
from lora_export.provenance import CONTRACT_KEY
from lora_export.runtime.kv_cache import CacheRunner, with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.ort_session import raising_refusals
from lora_export.runtime.runner import Arrays
from lora_export.runtime.session import Session
from lora_export.runtime.three_graphs import EncoderDecoderRunner, ImageTextRunner


class Decoder:
    """A graph that `export_onnx` made with `with_cache`, or another one with the same inputs and outputs.

    `provider` is `cpu` or `cuda`; on `cuda` the cache stays on the GPU. `tokens` is the input of token ids, or of their
    embeddings. `opened` is a runner of the graph, where there is one. Raises InputRefused for a graph without a cache,
    EnvironmentLacking where the provider does not run, and RuntimeRefused where onnxruntime refuses the graph.
    """

    def __init__(self, graph: Path, provider: str = "cpu", tokens: str = IDS, opened: OnnxRunner | None = None):
        runner = with_cache(opened or OnnxRunner(graph, provider), tokens)
        if not isinstance(runner, CacheRunner):
            raise InputRefused(
                f"{graph} has no key/value cache as inputs and outputs. "
                f"`{command('onnx', with_cache=True)}` makes such a graph of a decoder"
            )
        self.graph, self.provider, self.tokens, self.cache = graph, provider, tokens, runner.cache
        self.takes = frozenset(runner.inner.axes)
        unknown = self.takes - {tokens, MASK, POSITION_IDS, CACHE_POSITION, BRANCH, *ROW_INPUTS}
        unknown -= {tensor.past for tensor in self.cache} | ({TOKEN_TYPES} if tokens == EMBEDS else set())
        self.takes_padding = runner.takes_padding
        self.tokens_at_once = runner.tokens_at_once
        self.inner, self.has_slots = runner.inner, runner.inner.has_slots
        self.longest = runner.inner.longest
        self.adapters_per_row = runner.inner.adapters_per_row
        self.session = _session_of(runner.inner)
        self.adapters: Session | None = None
        if CONTRACT_KEY in self.session.get_modelmeta().custom_metadata_map:
            self.adapters = Session(graph, provider=provider, session=self.session)
            unknown -= {name for place in self.adapters.contract.places for name in place.input_shapes}
        outputs = [output.name for output in self.session.get_outputs()]
        if unknown or LOGITS not in outputs:
            lacking = f"also takes {', '.join(sorted(unknown))}" if unknown else f"has no output {LOGITS}"
            raise InputRefused(f"{graph} {lacking}: it is no decoder of texts alone")

    @property
    def rows(self) -> list[str]:
        """The adapters that rows may choose from, from id 1 on: those in the graph, or in its slots."""
        return self.inner.adapters_by_row or []

    def load(self, name: str) -> None:
        """Load the adapter NAME.onnx_adapter beside the graph. Raises InputRefused where there is none that fits."""
        if self.adapters is None:
            raise InputRefused(f"{self.graph} takes no adapter: it was not made with {named('lora', 'inputs')} or rows")
        self.adapters.load(name, self._file(name))

    def fill(self, names: Iterable[str]) -> None:
        """Put the adapters NAME.onnx_adapter beside the graph into its slots. Raises InputRefused as `load` does."""
        self.inner = self.inner.with_slot_files({name: self._file(name) for name in names})

    def _file(self, name: str) -> Path:
        found = {path.stem: path for path in self.graph.parent.glob(f"*{onnx_adapter.SUFFIX}")}
        if name not in found:
            others = ", ".join(sorted(found)) or "none"
            raise InputRefused(
                f"there is no {name}{onnx_adapter.SUFFIX} beside {self.graph}; the adapters there: {others}"
            )
        return found[name]

    def start(self, batch: int, adapter: str | None = None, adapter_ids: Sequence[int] | None = None) -> DecoderRun:
        """A new run with an empty cache: of a loaded adapter, or with the adapter of each row by its id."""
        return DecoderRun(self, batch, adapter, adapter_ids)


class DecoderRun:
    """The state of one batch: its cache, and how many positions it has."""

    def __init__(self, decoder: Decoder, batch: int, adapter: str | None, adapter_ids: Sequence[int] | None):
        self.decoder, self.batch = decoder, batch
        self.binding = decoder.session.io_binding()
        if decoder.adapters is not None:
            decoder.adapters.bind(self.binding, adapter=adapter)
        for name, value in _slot_inputs(decoder.inner).items():
            self.binding.bind_ortvalue_input(name, value)
        if ADAPTER_IDS in decoder.takes:
            ids = np.array(adapter_ids or [0] * batch, np.int64)
            for name, value in row_inputs(ids, None, decoder.adapters_per_row).items():
                self.binding.bind_cpu_input(name, value)
        self.restart()

    def restart(self) -> None:
        """Forget all tokens of the texts: empty the cache."""
        ort = import_onnxruntime()
        for tensor in self.decoder.cache:
            sizes = tensor.empty_sizes(self.batch)
            if tensor.grows:
                kind = ONNX_TYPES[np.dtype(tensor.dtype).name]  # which onnxruntime knows bfloat16 by
                empty = ort.OrtValue.ortvalue_from_shape_and_type(sizes, kind, self.decoder.provider, 0)
            else:  # whose numbers are read
                empty = ort_value_of_array(ort, np.zeros(sizes, tensor.dtype))
            self.binding.bind_ortvalue_input(tensor.past, empty)

    def step(
        self,
        ids: NDArray[Any],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        types: NDArray[np.int64] | None = None,
    ) -> NDArray[np.floating]:
        """Run the next tokens; return the logits of the last one, [batch, vocabulary].

        `ids` and `positions` are [batch, tokens], `mask` and `types` [batch, all positions so far]. Embeddings in place
        of ids are [batch, tokens, features], and positions may be [axes, batch, tokens]. A graph that takes so many
        tokens at once runs as often as needed.
        """
        count, past = ids.shape[1], mask.shape[1] - ids.shape[1]
        most = self.decoder.tokens_at_once or count
        for start in range(0, count, most):
            now = slice(start, start + most)
            so_far = slice(past + start + most)
            own = None if types is None else types[:, so_far]
            last = self._run(ids[:, now], mask[:, so_far], positions[..., now], own)
        return last

    def _run(
        self, ids: NDArray[Any], mask: NDArray[np.int64], positions: NDArray[np.int64], types: NDArray[np.int64] | None
    ) -> NDArray[np.floating]:
        decoder, binding = self.decoder, self.binding
        has_past = np.array([mask.shape[1] > ids.shape[1]])
        feeds = {
            decoder.tokens: ids,
            MASK: mask,
            POSITION_IDS: positions,
            CACHE_POSITION: np.arange(mask.shape[1] - ids.shape[1], mask.shape[1]),  # padding has one, too
            BRANCH: has_past,
            **({} if types is None else {TOKEN_TYPES: types}),
        }
        for name, value in feeds.items():
            if name in decoder.takes:
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
        binding.clear_binding_outputs()
        binding.bind_output(LOGITS, "cpu")
        for tensor in decoder.cache:
            binding.bind_output(tensor.present, decoder.provider, 0)
        with raising_refusals(decoder.graph):
            decoder.session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        for tensor, value in zip(decoder.cache, present, strict=True):
            binding.bind_ortvalue_input(tensor.past, value)
        last: NDArray[np.floating] = array_of_ort_value(logits)[:, -1]
        return last


def _session_of(graph: OnnxRunner) -> Any:
    """onnxruntime's session. Raises RuntimeRefused for a graph that only ONNX's reference evaluator runs."""
    if not graph.is_onnxruntimes:
        raise RuntimeRefused(
            f"{graph.path} is in bfloat16, in which onnxruntime does not compute on the CPU. Generate on a GPU "
            f"({named('provider', 'cuda')}), or export the model in float16 ({named('dtype', 'float16')})"
        )
    return graph.session


def _slot_inputs(graph: OnnxRunner) -> dict[str, Any]:
    """The inputs that have the adapters of all slots, as values of onnxruntime on the graph's device."""
    ort = import_onnxruntime()
    return {
        name: ort_value_of_array(ort, array)
        if graph.provider == "cpu" or array.dtype == ml_dtypes.bfloat16
        else ort.OrtValue.ortvalue_from_numpy(array, graph.provider, 0)
        for name, array in graph.slot_values.items()
    }


# --- the graphs of an encoder-decoder ---


class EncoderDecoder:
    """The folder of an encoder-decoder that `export_onnx` made with `with_cache`, or one with the same graphs.

    `provider` is `cpu` or `cuda`; on `cuda` the cache stays on the GPU. Raises InputRefused for graphs that do not
    belong together, EnvironmentLacking where the provider does not run, and RuntimeRefused where onnxruntime refuses
    a graph.
    """

    def __init__(self, folder: Path, provider: str = "cpu"):
        self.path, self.provider = folder, provider
        self.graphs = EncoderDecoderRunner.open(folder, provider)
        self.has_slots = self.graphs.has_slots
        # Graph -> its inputs that have the adapters of all slots
        self.slots = {graph: _slot_inputs(graph) for graph in self.graphs.graphs}
        self.longest = self.graphs.longest
        inputs = self.graphs.axes.items()
        # The sizes of what the encoder reads: token ids, sounds or pixels. None where they vary
        self.takes = {name: sizes for name, sizes in inputs if name not in (MASK, DECODER_IDS)}
        self.takes_mask = MASK in self.graphs.encoder.axes
        # Graph -> the session that binds adapters, of graphs that take one
        self.sessions = {
            graph: Session(graph.path, provider=provider, session=session)
            for graph, session in zip(self.graphs.graphs, map(_session_of, self.graphs.graphs), strict=True)
            if graph.lacks_adapter
        }

    @property
    def rows(self) -> list[str]:
        """The adapters that rows may choose from, from id 1 on: those in the graphs, or in their slots."""
        return self.graphs.adapters_by_row or []

    def fill(self, names: Iterable[str]) -> None:
        """Put the files of these adapters into slots. Raises InputRefused as `load` does."""
        self.graphs = self.graphs.with_slot_files(names)
        self.slots = {graph: _slot_inputs(graph) for graph in self.graphs.graphs}

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
        for name, value in self.model.slots[graph].items():
            binding.bind_ortvalue_input(name, value)
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


# --- the graphs of a model that reads images ---


class ImageText:
    """The folder of a model with images that `export_onnx` made with `with_cache`.

    `provider` is `cpu` or `cuda`; on `cuda` the cache stays on the GPU. Raises InputRefused for graphs that do not
    belong together, EnvironmentLacking where the provider does not run, and RuntimeRefused where onnxruntime refuses a
    graph.
    """

    rows = ()  # no row of a batch chooses its adapter

    def __init__(self, folder: Path, provider: str = "cpu"):
        self.graphs = ImageTextRunner.open(folder, provider)
        self.decoder = Decoder(folder / MERGED_FILE, provider, EMBEDS, self.graphs.decoder)
        self.longest = self.graphs.longest
        self.token = self.graphs.tokens.token  # of an image
        self.pixels = self.graphs.tokens.pixels  # of a token along each side, where images are rows of tokens; else 0
        self.image_inputs = {name: self.graphs.vision.axes[name] for name in self.graphs.image_inputs}

    def load(self, name: str) -> None:
        """Load an adapter's files in the folder. Raises InputRefused where they are missing or do not fit."""
        file = self.graphs.adapter_file(name, self.graphs.decoder) if self.graphs.decoder.lacks_adapter else None
        self.graphs = self.graphs.with_adapter(name)
        if file is not None and self.decoder.adapters is not None:
            self.decoder.adapters.load(name, file)

    def start(self, images: Arrays, adapter: str | None = None, tiles: Sequence[int] = ()) -> ImageTextRun:
        """Run the vision encoder on images, its inputs, with a loaded adapter. Without images there are none.

        `tiles` has how many of its inputs each image is, where they have no grids.
        """
        return ImageTextRun(self, images, adapter, tiles)


class ImageTextRun:
    """The state of one batch: its images, until the prompt has run, and the cache and the positions of the decoder."""

    def __init__(self, model: ImageText, images: Arrays, adapter: str | None, tiles: Sequence[int]):
        self.model, self.images, self.adapter, self.tiles = model, images, adapter, tiles
        self.encoded = model.graphs.encoded(images) if images else {}
        self.features = self.encoded.get(FEATURES)
        self.run: DecoderRun | None = None
        self.following: NDArray[np.int64] | None = None  # the next position of each row, where images have grids
        self.types: NDArray[np.int64] | None = None  # of all tokens so far, where the decoder takes them

    @property
    def counts(self) -> list[int]:
        """How many tokens each image takes."""
        if self.features is None:
            return []
        merge = self.model.graphs.tokens.merge
        if merge:
            return [int(patches) // merge**2 for patches in self.images[GRIDS].prod(1)]
        if TOKEN_COUNTS in self.encoded:
            return [int(count) for count in self.encoded[TOKEN_COUNTS]]
        if self.model.pixels:
            return [int(count) for count in (self.images[IMAGE_SIZES] // self.model.pixels).prod(1)]
        return [len(self.features) // sum(self.tiles) * tiles for tiles in self.tiles]

    def restart(self) -> None:
        """Forget all tokens of the texts. The images are not encoded again."""
        self.run = self.following = self.types = None

    def step(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.floating]:
        """Run the next tokens [batch, tokens]; return the logits of the last one, [batch, vocabulary].

        The first tokens have the places of the images. Raises RuntimeRefused where these are not as many as the images
        need.
        """
        graphs = self.model.graphs
        features, two_way = None, graphs.tokens.two_way
        if self.run is None:
            adapter = self.adapter if self.model.decoder.adapters is not None else None
            self.run = self.model.decoder.start(len(ids), adapter)
            features = self.features
            if found := graphs.positions({IDS: ids, MASK: mask, **self.images}):
                positions, self.following = found
            if two_way is not None:
                self.types = graphs.token_types(ids)
        elif self.following is not None:
            positions = np.broadcast_to(self.following[None, :, None], (3, len(ids), 1))
            self.following = self.following + 1
        elif self.types is not None:
            self.types = np.pad(self.types, ((0, 0), (0, 1)), constant_values=1 - (two_way or 0))
        return self.run.step(graphs.embeds(ids, features), mask, positions, self.types)
