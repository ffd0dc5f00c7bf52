"""A decoder's graph with a key/value cache, run as a model without one: a prompt, then token by token.

Each run is given the cache that the run before it returned, so that the answer at every place of a whole
sequence, which a model without a cache gives at once, also proves what the graph keeps between its runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from lora_export.errors import RuntimeRefused
from lora_export.graph.onnx_file import load
from lora_export.graph.ort_operators import head_size
from lora_export.runtime.onnx_runner import Held, OnnxRunner
from lora_export.runtime.runner import Arrays, Placement

STEPS = 4  # tokens of a sequence that are decoded one by one, after the prompt
IDS, MASK = "input_ids", "attention_mask"
POSITIONS = ("position_ids", "cache_position")  # [batch, tokens] and [tokens]
BRANCH = "use_cache_branch"  # of optimum's graphs that hold a prompt's graph and a step's
# Reads the cache at as many places as the mask has ones, wherever they stand.
COUNTS_THE_MASK = "GroupQueryAttention"
TYPES: Mapping[str, Any] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Slot(NamedTuple):
    """One tensor of the cache: what it is called when it goes in and when it comes out."""

    past: str
    present: str
    sizes: tuple[int | None, ...]  # [batch, heads, length, features] and the like; None where they vary
    dtype: Any


@dataclass(frozen=True, eq=False)
class CacheRunner:
    """A graph whose cache is kept for it. Takes token ids [batch, sequence], and a mask of them."""

    inner: OnnxRunner
    slots: tuple[Slot, ...]
    names_known: bool = True

    @property
    def axes(self) -> Mapping[str, tuple[int | None, ...]]:
        """What a caller gives; any sequence will do, also where the graph takes one token at a time."""
        batch = self.inner.axes[IDS][0]
        return dict.fromkeys((IDS, MASK), (batch, None))

    @property
    def placement(self) -> Placement:
        return self.inner.placement

    @property
    def takes_padding(self) -> bool:
        """Whether a sequence may have places that are masked out."""
        return MASK in self.inner.axes and COUNTS_THE_MASK not in self.inner.placement.operators

    @property
    def notes(self) -> list[str]:
        """What a proof with this runner did not see, or saw in its own way."""
        told = [f"run with its cache: a prompt, then {STEPS} tokens one by one"]
        if self._tokens_at_once == 1:
            told = ["run with its cache: token by token"]
        if MASK not in self.inner.axes:
            told.append(f"the graph has no {MASK}: no padding was tried")
        elif not self.takes_padding:
            told.append(f"its {COUNTS_THE_MASK} takes no padding within a sequence: none was tried")
        return told

    def as_shipped(self) -> CacheRunner:
        """The same, where the provider has its own settings."""
        return replace(self, inner=self.inner.as_shipped())

    def without_padding(self, inputs: Arrays) -> Arrays:
        """A model's inputs with all of every sequence in them."""
        return {name: np.ones_like(value) if name == MASK else value for name, value in inputs.items()}

    def run(self, inputs: Arrays) -> Arrays:
        """One answer for each place of the sequence, the runs' answers side by side; the cache is left out.

        Raises RuntimeRefused where the graph takes something that a prompt does not tell, or answers for fewer
        places than it was asked about.
        """
        if IDS not in inputs:
            raise RuntimeRefused(f"the graph decodes {IDS}; the model takes {', '.join(inputs)}")
        cache = self._empty(len(inputs[IDS]))
        parts: dict[str, list[NDArray[Any]]] = {}
        for start, stop in self._turns(inputs[IDS].shape[1]):
            answer = self.inner.run({**self._turn(inputs, start, stop), **cache})
            cache = {slot.past: answer.pop(slot.present) for slot in self.slots}
            for name, value in answer.items():
                if value.ndim < 2 or value.shape[1] != stop - start:
                    raise RuntimeRefused(
                        f"the graph answers {name} {list(value.shape)} to {stop - start} tokens: it has no answer for "
                        "each of them"
                    )
                parts.setdefault(name, []).append(value)
        return {name: np.concatenate(values, axis=1) for name, values in parts.items()}

    def prompt(self, inputs: Arrays) -> Arrays:
        """Of a model's inputs what the first run is given, and of that the rows whose first place holds a token."""
        _, stop = next(self._turns(inputs[IDS].shape[1]))
        mask = inputs.get(MASK, np.ones_like(inputs[IDS]))
        return {name: value[mask[:, 0] == 1, :stop] for name, value in inputs.items()}

    def first_turn(self, inputs: Arrays) -> Arrays:
        """What the graph itself is given with a prompt: it, and a cache in which nothing is."""
        length = inputs[IDS].shape[1]
        return {**self._turn(inputs, 0, length), **self._empty(len(inputs[IDS]))}

    def answers(self, inputs: Arrays) -> Arrays:
        """To a prompt, without the cache."""
        made = self.inner.run(self.first_turn(inputs))
        kept = {slot.present for slot in self.slots}
        return {name: value for name, value in made.items() if name not in kept}

    @property
    def _tokens_at_once(self) -> int | None:
        return self.inner.axes[IDS][1]

    def _turns(self, length: int) -> Iterator[tuple[int, int]]:
        """[start, stop) of what each run is given."""
        most = self._tokens_at_once
        prompt = most if most is not None else max(1, length - STEPS)
        yield 0, prompt
        for start in range(prompt, length, most or 1):
            yield start, start + (most or 1)

    def _turn(self, inputs: Arrays, start: int, stop: int) -> Arrays:
        ids = inputs[IDS]
        places = np.arange(start, stop)
        given = {
            IDS: ids[:, start:stop],
            MASK: inputs.get(MASK, np.ones_like(ids))[:, :stop],
            POSITIONS[0]: np.broadcast_to(places, (len(ids), len(places))),
            POSITIONS[1]: places,
            BRANCH: np.array([start > 0]),
        }
        surplus = {name: value for name, value in inputs.items() if name not in given}
        return surplus | {name: value for name, value in given.items() if name in self.inner.axes}

    def _empty(self, batch: int) -> Arrays:
        return {slot.past: np.zeros(_sizes_at_start(slot, batch), slot.dtype) for slot in self.slots}


def with_cache(runner: OnnxRunner) -> OnnxRunner | CacheRunner:
    """The graph run with its cache kept for it, where it has one.

    A cache is what goes in and comes out under the same name but for its first part: `past_key_values.0.key` and
    `present.0.key`.
    """
    returned = {_tail(value.name): value for value in runner.session.get_outputs()}
    slots = []
    for value in runner.session.get_inputs():
        back = returned.get(_tail(value.name)) if value.type in TYPES and len(value.shape) > 2 else None
        if back is not None:
            sizes = tuple(_size(size) or _size(other) for size, other in zip(value.shape, back.shape, strict=False))
            slots.append(Slot(value.name, back.name, sizes, TYPES[value.type]))
    if not slots or IDS not in runner.axes or len(runner.axes[IDS]) != 2:
        return runner
    if any(slot.sizes[-1] is None for slot in slots):
        slots = _with_features(slots, runner.source)
    return CacheRunner(runner, tuple(slots))


def _with_features(slots: Sequence[Slot], source: Path | Held) -> list[Slot]:
    """The slots with the size of a head where their graph leaves it to the operator that reads them."""
    model = load(source) if isinstance(source, Path) else ir.from_proto(onnx.ModelProto.FromString(source.message))
    features = {value.name: head_size(value) or None for value in model.graph.inputs}
    return [slot._replace(sizes=(*slot.sizes[:-1], slot.sizes[-1] or features[slot.past])) for slot in slots]


def _tail(name: str) -> str:
    """A name without its first part; all of a name that has one part."""
    return re.sub(r"^\w+[./]", "", name)


def _size(declared: int | str | None) -> int | None:
    """A dimension's constant size, also where an exporter made a symbol of the number."""
    if isinstance(declared, str):
        return int(declared) if declared.isdigit() else None
    return declared


def _sizes_at_start(slot: Slot, batch: int) -> list[int]:
    """Of a cache in which nothing is: the first dimension that varies is the batch, others have no places."""
    varying = [axis for axis, size in enumerate(slot.sizes) if size is None]
    return [size if size is not None else batch if axis == varying[0] else 0 for axis, size in enumerate(slot.sizes)]
