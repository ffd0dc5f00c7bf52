"""The contract of everything that runs a model, the record of where its nodes ran, and the limits of a run."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import EnvironmentLacking, InputRefused, RuntimeRefused, count
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import (
    ADAPTER_IDS,
    ADAPTER_STRENGTHS,
    ROW_INPUTS,
    AdapterArrays,
    Contract,
    RowAdapters,
    read_contract,
    read_row_adapters,
    read_strengths,
    row_inputs,
)
from lora_export.graph.cache_names import IDS, PAST, POSITION_IDS
from lora_export.isolation.bounds import bounded_memory, is_out_of_memory
from lora_export.isolation.limits import TIMEOUT as TIMEOUT
from lora_export.isolation.process import Arrays as Arrays
from lora_export.isolation.process import ProcessEnded
from lora_export.options.spelling import named
from lora_export.provenance import CONTRACT_KEY, SLOTS_KEY
from lora_export.runtime.environment_probes import CPU

# Operators that must run on the requested provider, also under the names of quantised and fused ones. onnxruntime puts
# shape arithmetic on the CPU on purpose.
COMPUTE_OPERATORS = re.compile(
    "MatMul|Gemm|Conv|Einsum|Attention|MoE|Norm(alization)?$|Softmax|Gelu|RotaryEmbedding|LSTM|GRU|RNN"
)


class Runner(Protocol):
    """Something that computes outputs from inputs, both by name: what the judge needs of any runner."""

    @property
    def axes(self) -> Mapping[str, tuple[int | None, ...]]: ...  # input -> sizes, None where they vary; {} if unknown
    @property
    def names_known(self) -> bool: ...  # whether the outputs' names identify them, or only their order does

    def run(self, inputs: Arrays) -> Arrays: ...


class CandidateRunner(Runner, Protocol):
    """A runner of an artifact, which also reports where and how it ran, and what it cannot give."""

    @property
    def placement(self) -> Placement | None: ...  # where its nodes ran; None where nothing places nodes
    @property
    def notes(self) -> Sequence[str]: ...  # how it ran, and what was not tried
    @property
    def cannot_give(self) -> Sequence[str]: ...  # such as "scores of all tokens: log-probabilities of the best alone"

    def close(self) -> None: ...  # gives memory or processes back


@runtime_checkable
class RunsTogether(Protocol):
    """A runner that may compute several inputs at once, with the bits of single runs."""

    def run_together(self, cases: Sequence[Arrays], kept: Callable[[Arrays], Arrays]) -> list[Arrays] | None: ...


@runtime_checkable
class RowsRunner(CandidateRunner, Protocol):
    """A runner of graphs in which each row of a batch may choose its adapter."""

    @property
    def path(self) -> Path: ...
    @property
    def takes_rows(self) -> bool: ...  # and the ids are not set
    @property
    def adapters_by_row(self) -> list[str] | None: ...  # names, from id 1 on; None where they are unknown
    @property
    def adapters_per_row(self) -> int: ...

    def with_rows(
        self, ids: Sequence[int] | Sequence[Sequence[int]], scales: Sequence[Sequence[float]] | None = None
    ) -> RowsRunner: ...  # the adapters of the rows of every batch, and their factors


@runtime_checkable
class StrengthsRunner(CandidateRunner, Protocol):
    """A runner of graphs whose runs may choose the strengths of adapters."""

    @property
    def path(self) -> Path: ...
    @property
    def adapters_with_strength(self) -> Sequence[str]: ...  # their names; none where it has no such input

    def with_strengths(self, strengths: Sequence[float]) -> StrengthsRunner: ...  # of these adapters, in every run


class PlainRunner:
    """What a runner reports where it has nothing to report."""

    placement: Placement | None = None
    notes: Sequence[str] = ()
    cannot_give: Sequence[str] = ()

    def close(self) -> None:
        """Nothing is held beyond the object."""


def no_ids(path: Path) -> InputRefused:
    """The refusal of adapter ids for a graph without the input `adapter_ids`."""
    return InputRefused(f"{path} has no input {ADAPTER_IDS}: it was not made with {named('lora', 'rows')} or slots")


def no_adapter(path: Path) -> InputRefused:
    """The refusal of an adapter's file for a graph without inputs for it."""
    return InputRefused(f"{path} takes no adapter from a file: leave {named('onnx_adapter')} out")


class AdaptersByInput(PlainRunner, ABC):
    """A runner of a graph whose inputs may be an adapter, or choose one for each row of a batch."""

    path: Path
    axes: Mapping[str, tuple[int | None, ...]]
    row_adapters: RowAdapters | None  # the adapters that rows may choose from
    _adapter_values: Arrays  # where adapters are given as inputs
    _adapter_ids: NDArray[np.int64] | None = None  # [rows], or [rows, adapters of a row]
    _adapter_scales: NDArray[np.float32] | None = None  # [rows, adapters of a row]

    @property
    @abstractmethod
    def metadata(self) -> Mapping[str, str]:
        """Those of the graph."""

    @property
    def takes_rows(self) -> bool:
        return ADAPTER_IDS in self.axes

    @property
    def adapters_by_row(self) -> list[str] | None:
        """The names of the adapters that rows may choose from, from id 1 on; None where the metadata has none."""
        return None if self.row_adapters is None else list(self.row_adapters.names)

    @property
    def adapters_per_row(self) -> int:
        return 1 if self.row_adapters is None else self.row_adapters.per_row

    @functools.cached_property
    def adapters_with_strength(self) -> list[str]:
        """The adapters whose strengths are an input of the graph. Raises InputRefused where the record is damaged."""
        return read_strengths(self.metadata, self.path)

    @property
    def slot_values(self) -> AdapterArrays:
        """The inputs that have the adapters of all slots, by name; nothing for a graph without slots."""
        return self._adapter_values if self.has_slots else {}

    def strength_of(self, adapter: str) -> float:
        """The strength of an adapter by its name; of the only one, whatever its name is. 1 without such an input."""
        names, values = self.adapters_with_strength, self._adapter_values.get(ADAPTER_STRENGTHS)
        if values is None or (len(names) > 1 and adapter not in names):
            return 1.0
        return float(values[names.index(adapter) if len(names) > 1 else 0])

    def with_strengths(self, strengths: Sequence[float]) -> Self:
        """The same session with these strengths of `adapters_with_strength` in every run."""
        runner = copy.copy(self)
        runner._adapter_values = {**self._adapter_values, ADAPTER_STRENGTHS: np.array(strengths, np.float32)}
        return runner

    @functools.cached_property
    def contract_of_slots(self) -> Contract | None:
        """What a slot takes; None for a graph without slots. Raises InputRefused where the record is damaged."""
        return read_contract(self.metadata, self.path) if SLOTS_KEY in self.metadata else None

    @property
    def has_slots(self) -> bool:
        """Whether adapters are put into slots of the graph."""
        return self.contract_of_slots is not None

    def with_slots(self, adapters: Mapping[str, AdapterArrays]) -> Self:
        """The same session with these adapters in its slots, from slot 1 on: the values of each by its name.

        Raises InputRefused for more adapters than slots, and for a graph without slots.
        """
        contract = self.contract_of_slots
        if contract is None or len(adapters) > contract.slots:
            has = "no slots" if contract is None else count(contract.slots, "slot")
            raise InputRefused(f"{self.path} has {has}, for {count(len(adapters), 'adapter')}")
        runner = copy.copy(self)
        runner._adapter_values = contract.stacks()
        for slot, values in enumerate(adapters.values(), 1):
            contract.fill(runner._adapter_values, slot, values)
        labels = contract.labels(list(adapters.values()))
        runner.row_adapters = RowAdapters(list(adapters), labels, contract.per_row)
        return runner

    def with_slot_files(self, files: Mapping[str, Path]) -> Self:
        """The same session with the adapters of these files in its slots, from slot 1 on, by their names.

        Raises InputRefused where a file does not fit the graph, and as `with_slots` does.
        """
        contract, values = read_contract(self.metadata, self.path), dict[str, AdapterArrays]()
        for name, path in files.items():
            onnx_adapter.refuse_misfits(onnx_adapter.read(path), contract, source=path, graph=self.path)
            values[name] = onnx_adapter.arrays_of(path)
        return self.with_slots(values)

    def with_moved_adapters(self) -> tuple[Self, list[int]] | None:
        """The same session after another adapter, or none, took the place of that of each slot.

        Returns the adapter that each slot has then, from slot 1 on, by its number; 0 where the slot was emptied. None
        for a graph without slots.
        """
        contract, adapters = self.contract_of_slots, len(self.adapters_by_row or ())
        if contract is None:
            return None
        now = [(slot + 1) % (adapters + 1) for slot in range(1, contract.slots + 1)]
        runner, before = copy.copy(self), self._adapter_values
        runner._adapter_values = {name: stack[[0, *now]] for name, stack in before.items()}
        return runner, now

    def with_rows(
        self,
        ids: Sequence[int] | Sequence[Sequence[int]] | NDArray[np.int64],
        scales: Sequence[Sequence[float]] | NDArray[np.float32] | None = None,
    ) -> Self:
        """The same session with these adapter ids for the rows of every batch, repeated as often as needed.

        `ids` have one adapter for each row. With `scales`, both are [rows, adapters of a row], for a graph whose rows
        have several. The batch is the first dimension of the first input. Raises InputRefused for a graph without the
        input `adapter_ids`.
        """
        if self.axes and not self.takes_rows and self._adapter_ids is None:
            raise no_ids(self.path)
        runner = copy.copy(self)
        runner._adapter_ids = np.array(ids, np.int64)
        runner._adapter_scales = None if scales is None else np.array(scales, np.float32)
        runner.axes = {name: sizes for name, sizes in self.axes.items() if name not in ROW_INPUTS}
        return runner

    def _with_adapters(self, inputs: Arrays) -> Arrays:
        """The inputs of a run, with those that are an adapter, or choose one for each row."""
        if self._adapter_ids is not None:
            rows = np.arange(len(next(iter(inputs.values())))) % len(self._adapter_ids)
            scales = None if self._adapter_scales is None else self._adapter_scales[rows]
            inputs = {**inputs, **row_inputs(self._adapter_ids[rows], scales, self.adapters_per_row)}
        return {**inputs, **self._adapter_values}

    def _set_adapter_inputs(self, shapes: Mapping[str, Sequence[Any]], adapter: Path | None = None) -> bool:
        """Take the inputs of the graph's metadata, which are adapters, out of `axes`; whether each run has to have
        them. `shapes` are those of the graph's inputs. Raises InputRefused where these, or a file of an adapter, do not
        fit the metadata.
        """
        is_required, values = False, {}
        self.row_adapters = read_row_adapters(self.metadata, str(self.path))
        if self.contract_of_slots is not None:
            self.contract_of_slots.refuse_other_inputs(shapes, self.path)
            values = self.contract_of_slots.stacks()
            self.row_adapters = RowAdapters([], per_row=self.contract_of_slots.per_row)
        elif CONTRACT_KEY in self.metadata:
            contract = read_contract(self.metadata, self.path)
            if is_required := contract.required:
                contract.refuse_other_inputs(shapes, self.path)
                values = contract.without_adapter()
        if is_required and self.adapters_with_strength:
            values = {**values, ADAPTER_STRENGTHS: np.ones(len(self.adapters_with_strength), np.float32)}
        from_file = {} if adapter is None else self._values_of_file(adapter)
        if from_file and shapes and shapes.keys().isdisjoint(from_file):
            raise no_adapter(self.path)
        self._adapter_values = {**values, **from_file}
        self.axes = {name: sizes for name, sizes in self.axes.items() if name not in self._adapter_values}
        return is_required

    def _values_of_file(self, file: Path) -> AdapterArrays:
        """The values of an adapter's file. Raises InputRefused where it does not fit the metadata."""
        if CONTRACT_KEY in self.metadata:
            contract = read_contract(self.metadata, self.path)
            onnx_adapter.refuse_misfits(onnx_adapter.read(file), contract, source=file, graph=self.path)
        return onnx_adapter.arrays_of(file)


@dataclass(frozen=True)
class Placement:
    """Which provider ran which node, by onnxruntime's own record."""

    requested_provider: str  # the provider's full name
    by_provider: Mapping[str, tuple[tuple[str, str], ...]]  # provider -> (node, operator) ...
    options: Mapping[str, str]
    version: str

    @property
    def operators(self) -> frozenset[str]:
        """The operators of the graph, after the runtime's own fusions."""
        return frozenset(operator for nodes in self.by_provider.values() for _, operator in nodes)

    @property
    def _compute(self) -> list[tuple[str, str, str]]:
        return [
            (provider, node, operator)
            for provider, nodes in self.by_provider.items()
            for node, operator in nodes
            if COMPUTE_OPERATORS.search(operator)
        ]

    @property
    def compute_nodes(self) -> int:
        """The number of nodes that must run on the requested provider."""
        return len(self._compute)

    @property
    def off_provider(self) -> tuple[tuple[str, str, str], ...]:
        """(provider, node, operator) of compute nodes that ran on another provider."""
        return tuple(node for node in self._compute if node[0] != self.requested_provider)

    def require_provider(self) -> None:
        """Raise EnvironmentLacking unless the requested provider ran every compute node."""
        if self.off_provider:
            first = ", ".join(f"{node} ({operator}) on {other}" for other, node, operator in self.off_provider[:5])
            raise EnvironmentLacking(
                f"{self.requested_provider} was requested, but {len(self.off_provider)} of {self.compute_nodes} "
                f"compute nodes ran elsewhere: {first}"
            )
        if self.requested_provider != CPU and not self.by_provider.get(self.requested_provider):
            raise EnvironmentLacking(
                f"{self.requested_provider} was requested, but onnxruntime reports no node that ran on it"
            )


def completed_inputs(inputs: Arrays, axes: Mapping[str, object]) -> Arrays:
    """The inputs of one run for a candidate with these inputs. Positions are 0, 1, 2, ... where there are none.

    Raises RuntimeRefused for inputs that it does not have, as where they were folded away, and for missing ones.
    """
    lacks_positions = POSITION_IDS in axes and POSITION_IDS not in inputs
    if lacks_positions and IDS in inputs and not any(name.startswith(PAST) for name in inputs):
        shape = inputs[IDS].shape
        inputs = {**inputs, POSITION_IDS: np.broadcast_to(np.arange(shape[1]), shape)}
    problems = [f"the candidate has no input {name}" for name in inputs if name not in axes]
    problems += [f"the candidate needs {name}, which the model does not take" for name in axes if name not in inputs]
    if problems:
        raise RuntimeRefused("; ".join(problems))
    return inputs


class TooSlow(RuntimeRefused):
    """A run was stopped, because it took longer than its time limit."""

    def __init__(self, path: Path, seconds: float):
        super().__init__(f"{path} did not finish within {seconds:g} seconds. Allow more with {named('timeout')}")


@contextlib.contextmanager
def refused_ends(process: str, path: Path, timeout: float, remedy: str = "") -> Iterator[None]:
    """Turn the end of a process that runs a file into RuntimeRefused. `remedy` is for one that a signal ended."""
    try:
        yield
    except ProcessEnded as ended:
        if ended.too_slow:
            raise TooSlow(path, timeout) from ended
        raise RuntimeRefused(f"{process} ended: {ended}{remedy if ended.killed else ''}") from ended


@contextlib.contextmanager
def within_memory(memory: int | None, path: Path) -> Iterator[None]:
    """Bound the memory that a file takes while it is run. Raises RuntimeRefused where it needs more. None: no bound."""
    if memory is None:
        yield
        return
    try:
        with bounded_memory(memory):
            yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RuntimeRefused(
            f"{path} needs more memory than the {memory / 2**30:.3g} GiB that it may take. Allow more with "
            f"{named('memory')}"
        ) from error
