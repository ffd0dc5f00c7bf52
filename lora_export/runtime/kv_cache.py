"""A decoder's graph with a key/value cache, run as a model without one: a prompt, then token by token.

Each run gets the cache that the previous run returned. The outputs at every position of a sequence must equal those of
a model without a cache, so they also prove what the graph stores between its runs. A longer sequence is run in turns,
too, as a chat is continued: several tokens, one token, several tokens after a cache, and so on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import RuntimeRefused
from lora_export.graph.cache_names import BRANCH, CACHE_POSITION, IDS, MASK, POSITION_IDS, TOKEN_TYPES, present_by_past
from lora_export.graph.onnx_file.reading import load_graph
from lora_export.graph.operators import cache_heads
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.ort_session import InMemoryGraph
from lora_export.runtime.registered.runner import RegisteredRunner
from lora_export.runtime.runner import Arrays, Placement, Runner

DECODE_STEPS = 4  # tokens of a sequence that are decoded one by one, after the prompt
TURN, MOST_TURNS = 16, 6  # tokens of a turn, an even number of which the last is alone, and how many turns at most
# Without a bias it reads as many positions of the cache as the mask has ones, wherever the ones are. It reads several
# tokens after a cache where the batch has one row alone.
GROUP_QUERY, BIAS = "GroupQueryAttention", 10  # the operator, and the place of its bias among its inputs
CACHE_DTYPES: Mapping[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
}


_Port = tuple[str, Sequence[Any]]  # the type of an input or output as onnxruntime names it, and its sizes
_TYPES: Mapping[ir.DataType | None, str] = {
    ir.DataType.FLOAT: "tensor(float)",
    ir.DataType.FLOAT16: "tensor(float16)",
    ir.DataType.BFLOAT16: "tensor(bfloat16)",
}


class CacheTensor(NamedTuple):
    """One tensor of the cache, by its names as an input and as an output."""

    past: str
    present: str
    sizes: tuple[int | None, ...]  # [batch, heads, length, features] and the like; None where they vary
    dtype: Any
    has_fixed_batch: bool = False  # of the tokens: one dimension that varies is then the length

    @property
    def grows(self) -> bool:
        """Whether it has an entry for each position; a state of a convolution or of linear attention has not."""
        return self.sizes.count(None) > (0 if self.has_fixed_batch else 1)

    def empty_sizes(self, batch: int) -> list[int]:
        """The shape without a position: the first varying dimension is the batch, the other ones are 0."""
        varying = [axis for axis, size in enumerate(self.sizes) if size is None]
        of_batch = None if self.has_fixed_batch and len(varying) == 1 else next(iter(varying), None)
        return [size if size is not None else batch if axis == of_batch else 0 for axis, size in enumerate(self.sizes)]


@dataclass(frozen=True, eq=False)
class CacheRunner:
    """A graph with a cache, run as if it had none. Takes token ids [batch, sequence], and a mask of them.

    Or their embeddings [batch, sequence, features]. Positions may be [axes, batch, sequence].
    """

    inner: OnnxRunner
    cache: tuple[CacheTensor, ...]
    counts_mask: bool = False  # an operator reads the number of ones in the mask, and not their places
    tokens: str = IDS  # the input of ids or embeddings
    two_way: int | None = None  # the type of the tokens that attend to each other: one run takes all of them
    names_known: bool = True
    cannot_give: Sequence[str] = ()

    @property
    def axes(self) -> Mapping[str, tuple[int | None, ...]]:
        """The sizes of ids and mask. Any sequence length is taken, also by a graph that takes one token at a time."""
        batch = self.inner.axes[self.tokens][0]
        return dict.fromkeys((self.tokens, MASK), (batch, None))

    def close(self) -> None:
        self.inner.close()

    @property
    def placement(self) -> Placement | None:
        return self.inner.placement

    @property
    def has_group_query(self) -> bool:
        """Whether GroupQueryAttention reads the cache, also where onnxruntime put it into the graph."""
        return GROUP_QUERY in self.inner.placement.operators

    @property
    def takes_padding(self) -> bool:
        """Whether positions of a sequence may be masked out."""
        return MASK in self.inner.axes and not self.counts_mask and not self.has_unmasked_state

    @property
    def has_unmasked_state(self) -> bool:
        """Whether each token changes a state: of one token at once, transformers' models mask none."""
        return self.tokens_at_once == 1 and not all(tensor.grows for tensor in self.cache)

    @property
    def notes(self) -> list[str]:
        notes = [f"run with its cache: a prompt, then {DECODE_STEPS} tokens one by one"]
        if self.tokens_at_once == 1:
            notes = ["run with its cache: token by token"]
        elif self._takes_turns(2):
            notes.append(f"longer texts were run in turns, too: {TURN - 1} tokens after a cache, then one")
        elif self._takes_turns(1):
            notes.append(f"its {GROUP_QUERY} takes several tokens after a cache in one row alone: no more were tried")
        if self.two_way is not None:
            notes.append("tokens that attend to each other in both directions were in one run")
        if self.has_unmasked_state:
            notes.append("every token changes the state of the graph, padding too: none was tried")
        elif MASK not in self.inner.axes:
            notes.append(f"the graph has no {MASK}: no padding was tried")
        elif not self.takes_padding:
            notes.append(f"its {GROUP_QUERY} takes no padding within a sequence: none was tried")
        return notes

    @property
    def path(self) -> Path:
        return self.inner.path

    @property
    def adapters_with_strength(self) -> Sequence[str]:
        return self.inner.adapters_with_strength

    def with_strengths(self, strengths: Sequence[float]) -> CacheRunner:
        return replace(self, inner=self.inner.with_strengths(strengths))

    def with_provider_defaults(self) -> CacheRunner:
        return replace(self, inner=self.inner.with_provider_defaults())

    def without_padding(self, inputs: Arrays) -> Arrays:
        """The inputs with a mask of ones."""
        return {name: np.ones_like(value) if name == MASK else value for name, value in inputs.items()}

    def run(self, inputs: Arrays) -> Arrays:
        """The outputs at every position of the sequence, concatenated over the runs; without the cache.

        Where the sequence is run in turns, too, the outputs at every second position, from the second on, are those.
        Raises RuntimeRefused where the model has no token ids, or the graph returns outputs for fewer positions than
        it was given.
        """
        if self.tokens not in inputs:
            raise RuntimeRefused(f"the graph takes {self.tokens}; the model takes {', '.join(inputs)}")
        rows, length = inputs[self.tokens].shape[:2]
        outputs = self._run(inputs, self._steps(length))
        if length > TURN and self._takes_turns(rows):
            for name, value in self._run(inputs, turns(length)).items():
                outputs[name][:, 1::2] = value[:, 1::2]
        return outputs

    def _takes_turns(self, rows: int) -> bool:
        """Whether a run of so many rows takes several tokens after a cache."""
        return self.tokens_at_once is None and (rows == 1 or not self.has_group_query)

    def _run(self, inputs: Arrays, steps: Iterable[tuple[int, int]]) -> Arrays:
        cache = self._empty_cache(len(inputs[self.tokens]))
        if self.two_way is not None:
            steps = undivided(steps, inputs[TOKEN_TYPES] == self.two_way)
        parts: dict[str, list[NDArray[Any]]] = {}
        for start, stop in steps:
            outputs = self.inner.run({**self._step_inputs(inputs, start, stop), **cache})
            if lacking := [tensor.present for tensor in self.cache if tensor.present not in outputs]:
                raise RuntimeRefused(f"a run returned no {lacking[0]}, which the next run of the cache needs")
            cache = {tensor.past: outputs.pop(tensor.present) for tensor in self.cache}
            for name, value in outputs.items():
                if value.ndim < 2 or value.shape[1] != stop - start:
                    raise RuntimeRefused(
                        f"the graph returns {name} {list(value.shape)} for {stop - start} tokens: it has no output for "
                        "each of them"
                    )
                parts.setdefault(name, []).append(value)
        return {name: np.concatenate(values, axis=1) for name, values in parts.items()}

    def prompt(self, inputs: Arrays) -> Arrays:
        """The positions of the first run, and only the rows whose first position is a token."""
        _, stop = next(self._steps(inputs[self.tokens].shape[1]))
        mask = inputs.get(MASK, np.ones_like(inputs[self.tokens]))
        return {name: value[mask[:, 0] == 1, :stop] for name, value in inputs.items()}

    def prompt_feeds(self, inputs: Arrays) -> Arrays:
        """The graph's own inputs for a prompt: the prompt's, and an empty cache."""
        length = inputs[self.tokens].shape[1]
        return {**self._step_inputs(inputs, 0, length), **self._empty_cache(len(inputs[self.tokens]))}

    def run_prompt(self, inputs: Arrays) -> Arrays:
        """The outputs for a prompt, without the cache."""
        outputs = self.inner.run(self.prompt_feeds(inputs))
        present = {tensor.present for tensor in self.cache}
        return {name: value for name, value in outputs.items() if name not in present}

    @property
    def tokens_at_once(self) -> int | None:
        """How many tokens of each row a run takes; None for any number."""
        return self.inner.axes[self.tokens][1]

    def _steps(self, length: int) -> Iterator[tuple[int, int]]:
        """[start, stop) of each run."""
        most = self.tokens_at_once
        prompt = most if most is not None else max(1, length - DECODE_STEPS)
        yield 0, prompt
        for start in range(prompt, length, most or 1):
            yield start, start + (most or 1)

    def _step_inputs(self, inputs: Arrays, start: int, stop: int) -> Arrays:
        tokens = inputs[self.tokens]
        shape = tokens.shape[:2]
        mask = inputs.get(MASK, np.ones(shape, np.int64))
        positions = inputs.get(POSITION_IDS, np.broadcast_to(np.arange(shape[1]), shape))
        derived = {
            self.tokens: tokens[:, start:stop],
            MASK: mask[:, :stop],
            POSITION_IDS: positions[..., start:stop],
            CACHE_POSITION: np.arange(start, stop),
            BRANCH: np.array([start > 0]),
        }
        if self.two_way is not None:
            derived[TOKEN_TYPES] = inputs[TOKEN_TYPES][:, :stop]
        others = {name: value for name, value in inputs.items() if name not in derived}
        return others | {name: value for name, value in derived.items() if name in self.inner.axes}

    def _empty_cache(self, batch: int) -> Arrays:
        return {tensor.past: np.zeros(tensor.empty_sizes(batch), tensor.dtype) for tensor in self.cache}


@dataclass(frozen=True, eq=False)
class RegisteredCacheRunner(CacheRunner):
    """The same for a graph in a runner by name, which reports no operators: those of the file count."""

    inner: RegisteredRunner  # type: ignore[assignment]
    operators: frozenset[str] = frozenset()

    @property
    def placement(self) -> None:
        return None

    @property
    def has_group_query(self) -> bool:
        return GROUP_QUERY in self.operators

    @property
    def notes(self) -> list[str]:
        return [*self.inner.notes, *super().notes]


def turns(length: int, least: int = TURN) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of a text: a turn's last token, which has an odd position, is run alone.

    `least` is the number of tokens of a turn at least, an even number.
    """
    size = max(least, length // MOST_TURNS // 2 * 2)
    ends = {end for last in range(size - 1, length, size) for end in (last, last + 1)}
    return itertools.pairwise(sorted(ends | {0, length}))


def undivided(steps: Iterable[tuple[int, int]], is_two_way: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """The runs, each with those behind it that begin between two such tokens (batch, sequence) of any row."""
    divides: NDArray[np.bool_] = np.logical_or.reduce(is_two_way[:, 1:] & is_two_way[:, :-1], axis=0)
    starts = [start for start, _ in steps if start == 0 or not divides[start - 1]]
    return itertools.pairwise([*starts, is_two_way.shape[1]])


def with_cache(runner: OnnxRunner, tokens: str = IDS) -> OnnxRunner | CacheRunner:
    """The graph as a model without a cache, where it has one; else the runner itself.

    `tokens` is the input that has an entry for each token.

    A cache tensor is an input and an output with the same name but for its first part: `past_key_values.0.key` and
    `present.0.key`.
    """
    inputs, outputs = (
        {value.name: (value.type, value.shape) for value in values}
        for values in (runner.session.get_inputs(), runner.session.get_outputs())
    )
    cache = _cache_tensors(inputs, outputs, tokens)
    if not cache or len(runner.axes.get(tokens, ())) != (2 if tokens == IDS else 3):
        return runner
    counts_mask = False
    if any(tensor.sizes[-1] is None for tensor in cache) or GROUP_QUERY in runner.placement.operators:
        cache, counts_mask = _as_operators_read(_graph_of(runner.source), cache)
    return CacheRunner(runner, cache, counts_mask, tokens)


def with_registered_cache(runner: RegisteredRunner) -> RegisteredRunner | CacheRunner:
    """The same for the graph in a runner by name. The runner itself where it fills the cache: it states `axes` without
    the cache, or states none and does not read the cache that it is given.
    """
    graph = _graph_of(runner.path)
    inputs, outputs = (
        {str(value.name): (_TYPES.get(value.dtype, ""), tuple(value.shape or ())) for value in values}
        for values in (graph.inputs, graph.outputs)
    )
    cache = _cache_tensors(inputs, outputs, IDS)
    ids = inputs.get(IDS)
    fills_cache = bool(runner.axes) and not runner.axes.keys() >= {tensor.past for tensor in cache}
    if not cache or ids is None or len(ids[1]) != 2 or fills_cache:
        return runner
    cache, counts_mask = _as_operators_read(graph, cache)
    required = [value for value in graph.inputs if value.name not in graph.initializers]
    operators = frozenset(node.op_type for node in graph)
    inner = runner.with_axes({str(value.name): tuple(map(_size, value.shape or ())) for value in required})
    found = RegisteredCacheRunner(inner, cache, counts_mask, cannot_give=runner.cannot_give, operators=operators)
    return found if runner.axes or _reads_cache(found, required) else runner


def _reads_cache(runner: RegisteredCacheRunner, inputs: Iterable[ir.Value]) -> bool:
    """Whether the second of two runs returns a cache that is longer than the first run's, which it was given.

    `inputs` are those of the graph.
    """
    axes = runner.inner.axes
    batch, length = (size or 1 for size in axes[IDS])
    feeds = {
        name: np.zeros([size or 1 for size in axes[name]], value.dtype.numpy() if value.dtype else np.float32)
        for value in inputs
        if (name := str(value.name)) in axes and name not in (MASK, POSITION_IDS)
    }
    feeds[IDS] = np.zeros((batch, 2 * length), np.int64)
    cache = runner._empty_cache(batch)
    try:
        for start in (0, length):
            outputs = runner.inner.run({**runner._step_inputs(feeds, start, start + length), **cache})
            cache = {tensor.past: outputs[tensor.present] for tensor in runner.cache}
    except (RuntimeRefused, KeyError):
        return False
    return all(2 * length in cache[tensor.past].shape for tensor in runner.cache if tensor.grows)


def _cache_tensors(inputs: Mapping[str, _Port], outputs: Mapping[str, _Port], tokens: str) -> tuple[CacheTensor, ...]:
    """The tensors of a graph's cache, by the names of its inputs and outputs; `tokens` is the input of the batch."""
    has_fixed_batch = tokens in inputs and any(map(_size, inputs[tokens][1][:1]))
    fitting = {name: port for name, port in inputs.items() if port[0] in CACHE_DTYPES and len(port[1]) > 2}
    cache = []
    for past, present in present_by_past(fitting, outputs).items():
        kind, shape = fitting[past]
        sizes = tuple(_size(size) or _size(other) for size, other in zip(shape, outputs[present][1], strict=False))
        cache.append(CacheTensor(past, present, sizes, CACHE_DTYPES[kind], has_fixed_batch))
    return tuple(cache)


def _as_operators_read(graph: ir.Graph, cache: Sequence[CacheTensor]) -> tuple[tuple[CacheTensor, ...], bool]:
    """The cache with the size of a head where the graph leaves it to an operator; whether one counts the mask."""
    features = {value.name: cache_heads(value)[1] or None for value in graph.inputs}
    known = (tensor._replace(sizes=(*tensor.sizes[:-1], tensor.sizes[-1] or features[tensor.past])) for tensor in cache)
    return tuple(known), any(node.op_type == GROUP_QUERY and not _has_bias(node) for node in graph)


def graph_of(candidate: Runner) -> OnnxRunner | None:
    """The graph that a candidate is, also behind a cache; None for any other candidate."""
    runner = candidate.inner if isinstance(candidate, CacheRunner) else candidate
    return runner if isinstance(runner, OnnxRunner) else None


def _graph_of(source: Path | InMemoryGraph) -> ir.Graph:
    model = (
        load_graph(source) if isinstance(source, Path) else ir.from_proto(onnx.ModelProto.FromString(source.message))
    )
    return model.graph


def _has_bias(node: ir.Node) -> bool:
    return len(node.inputs) > BIAS and node.inputs[BIAS] is not None


def _size(declared: Any) -> int | None:
    """A dimension's constant size, also where an exporter made a symbol of the number."""
    if isinstance(declared, ir.SymbolicDim):
        declared = declared.value
    if isinstance(declared, str):
        return int(declared) if declared.isdigit() else None
    return declared if isinstance(declared, int) else None
