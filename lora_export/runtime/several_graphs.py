"""The graphs of one model, run as one: where they ran, and the adapters in all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from lora_export.artifacts.files import adapter_of_file, file_for_graph
from lora_export.errors import InputRefused, one_line
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import ADAPTER_IDS, AdapterArrays
from lora_export.options.spelling import named
from lora_export.runtime.kv_cache import graph_of
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import TIMEOUT, Arrays, Placement, Runner


@dataclass(frozen=True, eq=False)
class SeveralGraphs(ABC):
    """Graphs that are run one after the other. A subclass states their files, and how they are run."""

    FILES: ClassVar[tuple[str, ...]]  # in the order of `graphs`
    OUTPUTS: ClassVar[tuple[str, ...]]  # of the graphs as one model

    path: Path  # the folder
    graphs: tuple[OnnxRunner, ...]
    names_known: bool = True
    cannot_give: Sequence[str] = ()

    @classmethod
    def open(cls, folder: Path, provider: str = "cpu", *, timeout: float = TIMEOUT) -> Self:
        """The graphs in a folder. Raises InputRefused where one lacks what the others need, and as `OnnxRunner`."""
        return cls.of(folder, [OnnxRunner(folder / name, provider, timeout=timeout) for name in cls.FILES])

    @classmethod
    def of(cls, folder: Path, graphs: Sequence[OnnxRunner]) -> Self:
        """The runner of graphs, in the order of FILES. Raises InputRefused as `open`."""
        runner = cls(folder, tuple(graphs))
        if lacking := runner.lacking():
            raise InputRefused(f"{folder}: {'; '.join(lacking)}")
        return runner

    @abstractmethod
    def lacking(self) -> list[str]:
        """What graphs lack that others need, each in a phrase."""

    @staticmethod
    def outputs_of(graph: OnnxRunner) -> list[str]:
        """The names of a graph's outputs."""
        return [output.name for output in graph.session.get_outputs()]

    @property
    @abstractmethod
    def axes(self) -> Mapping[str, tuple[int | None, ...]]:
        """The sizes of the inputs of the graphs as one model; None where they vary."""

    @property
    @abstractmethod
    def notes(self) -> Sequence[str]:
        """How the graphs were run, and what was not tried."""

    @abstractmethod
    def run(self, inputs: Arrays) -> Arrays:
        """OUTPUTS, from the inputs of the model. Raises RuntimeRefused for inputs that the graphs do not take."""

    @property
    def longest(self) -> dict[str, int]:
        """The sizes up to which the graphs were made (see `OnnxRunner.longest`): of each symbol the least."""
        found = sorted((each for graph in self.graphs for each in graph.longest.items()), key=lambda each: -each[1])
        return dict(found)

    @property
    def placement(self) -> Placement:
        own = [graph.placement for graph in self.graphs]
        by_provider: dict[str, tuple[tuple[str, str], ...]] = {}
        for placement in own:
            for provider, nodes in placement.by_provider.items():
                by_provider[provider] = (*by_provider.get(provider, ()), *nodes)
        return Placement(own[0].requested_provider, by_provider, own[0].options, own[0].version)

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

    @property
    def takes_rows(self) -> bool:
        return any(graph.takes_rows for graph in self.graphs)

    def with_rows(
        self, ids: Sequence[int] | Sequence[Sequence[int]], scales: Sequence[Sequence[float]] | None = None
    ) -> Self:
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

    def with_slots(self, values: Callable[[OnnxRunner], Mapping[str, AdapterArrays]]) -> Self:
        """The same sessions with these adapters in the slots of each graph (see `OnnxRunner.with_slots`)."""
        return self._each(lambda graph: graph.with_slots(values(graph)) if graph.has_slots else graph)

    def with_slot_files(self, names: Iterable[str]) -> Self:
        """The same sessions with the files of these adapters in their slots (see `OnnxRunner.with_slot_files`)."""
        found = list(names)

        def filled(graph: OnnxRunner) -> OnnxRunner:
            return graph.with_slot_files({name: self.adapter_file(name, graph) for name in found})

        return self._each(lambda graph: filled(graph) if graph.has_slots else graph)

    def with_moved_adapters(self) -> tuple[Self, list[int]] | None:
        """The same sessions after another adapter took the place of that of each slot (`OnnxRunner`'s)."""
        moved = {graph: found for graph in self.graphs if (found := graph.with_moved_adapters()) is not None}
        if not moved:
            return None
        now = min((slots for _, slots in moved.values()), key=len)  # those that all graphs have
        return self._each(lambda graph: moved[graph][0] if graph in moved else graph), now

    def with_adapter(self, name: str) -> Self:
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

    def with_provider_defaults(self) -> Self:
        return self._each(OnnxRunner.with_provider_defaults)

    def _each(self, change: Callable[[OnnxRunner], OnnxRunner]) -> Self:
        return self.of(self.path, [change(graph) for graph in self.graphs])

    @abstractmethod
    def outputs_by_graph(self, length: int) -> dict[str, tuple[str, Any]]:
        """The file of each graph -> the output that it makes in a run over `length` tokens, and which part of it."""


def graphs_of(candidate: Runner) -> Sequence[OnnxRunner]:
    """The graphs that a candidate is, also behind a cache; none for any other candidate."""
    own = graph_of(candidate)
    return candidate.graphs if isinstance(candidate, SeveralGraphs) else () if own is None else (own,)
