"""The request of an ONNX export, and its result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export import plan
from lora_export.api.publish import ExportResult
from lora_export.api.shared_head import BaseTensor, without_shared_head
from lora_export.artifacts.files import file_for_graph
from lora_export.callbacks import Progress
from lora_export.errors import InputRefused, count
from lora_export.formats import onnx_adapter
from lora_export.formats.onnx_adapter import SUFFIX
from lora_export.graph.onnx_file.shared_weights import SharedWeights, sharing
from lora_export.graph.refusals import beside_the_weight
from lora_export.lora import Adapter
from lora_export.options.common import layer_endings
from lora_export.options.export import SWAPPED, TEXT_GENERATION, OnnxOptions
from lora_export.options.spelling import command, named
from lora_export.plan import Plan
from lora_export.plan.own_heads import head_names, without_own_head
from lora_export.storage import atomic_output

SLOT_RANK = 16  # of a graph of slots, where no other is stated

if TYPE_CHECKING:
    from lora_export.graph.interface import WeightPrecision
    from lora_export.verification.proof_session import ProofSession
    from lora_export.weights.merge_report import MergeReport


@dataclass(frozen=True, eq=False, kw_only=True)
class OnnxRequest(OnnxOptions):
    """The options of `export_onnx`, with everything found and loaded that they name."""

    output: Path = field(kw_only=False)
    adapters: Sequence[Adapter] = ()
    sources: Sequence[Path] = ()  # the paths of the adapters
    checkpoint: Path | None = None
    inputs: Path | None = None
    session: ProofSession | None = None
    share_with: Path | None = None
    shared: SharedWeights | None = None  # of that graph

    @property
    def strengths(self) -> Sequence[float]:
        """One factor for each adapter."""
        return self.weights or (1.0,) * len(self.adapters)

    @property
    def targets(self) -> str | list[str] | None:
        """ "all-linear", endings of layer names, or None where no layer was named."""
        return None if self.target is None else layer_endings(self.target)

    @property
    def has_parts(self) -> bool:
        """Whether the model becomes three graphs: of an encoder-decoder, or with images."""
        return self.task is not None and self.task != TEXT_GENERATION

    @property
    def is_swapped(self) -> bool:
        """Whether a call of the graph chooses its adapter."""
        return self.lora in SWAPPED

    @property
    def by_row(self) -> bool:
        """Whether each row of a batch chooses its adapter."""
        return self.lora in ("rows", "slots")

    @property
    def rank(self) -> int:
        """The rank to which those of adapters are padded; 0: each has its own."""
        return self.max_rank or (SLOT_RANK if self.lora == "slots" else 0)

    @property
    def form_settings(self) -> dict[str, Any]:
        """How adapters are in the graph, for the record of provenance: what is not the default."""
        chosen = {
            "max_rank": self.rank,
            "slots": self.slots if self.lora == "slots" else 0,
            "per_row": self.per_row if self.per_row > 1 else 0,
            "strength_input": self.strength_input,
        }
        return {"lora": self.lora, **{name: value for name, value in chosen.items() if value}}

    def without_head(self, specs: Iterable[plan.TensorSpec], stored: BaseTensor) -> OnnxRequest:
        """The same options, without the head that all adapters share with the base (`ignore_head`).

        Raises InputRefused where they do not share it.
        """
        if not self.ignore_head:
            return self
        return replace(self, adapters=without_shared_head(self.adapters, specs, stored))

    @property
    def has_own_heads(self) -> bool:
        """Whether each row of a batch has the head that its adapter saves whole."""
        is_taken = self.by_row and not self.ignore_head and not self.has_parts
        return is_taken and any(map(head_names, self.adapters))

    @property
    def without_own_heads(self) -> list[Adapter]:
        """The adapters, without the heads that rows choose from."""
        return [without_own_head(adapter) if self.has_own_heads else adapter for adapter in self.adapters]

    def plan(self, specs: Iterable[plan.TensorSpec]) -> Plan:
        """The weights on which the adapters land. Adapters that are swapped are never active together."""
        return plan.make(self.without_own_heads, specs, strengths=self.weights, one_at_a_time=self.is_swapped)

    def stage(self, name: str) -> None:
        """Report the start of a stage."""
        self.on_progress(Progress(name))

    def staged(self, inputs: Iterable[Path]) -> AbstractContextManager[Path]:
        """A folder whose files are published together when the block succeeds."""
        paths = [*inputs, *self.sources, *([self.share_with] if self.share_with else [])]
        return atomic_output.staged(self, self.output, paths, is_file=True, sign=self.sign, streamed=False)

    @contextlib.contextmanager
    def sharing(self, stage: Path) -> Iterator[OnnxRequest]:
        """The same options, with the weights that the output may share. Raises InputRefused as `shared_weights`."""
        if self.share_with is not None:
            self.stage("reading the weights to share")
        with sharing(self.share_with, self.output, stage, self.on_message, sign=self.sign is not None) as shared:
            yield replace(self, shared=shared)


@dataclass(frozen=True, eq=False)
class OnnxResult(ExportResult):
    """What was published, and its proofs."""

    plan: Plan | None  # None: no adapter
    precision: WeightPrecision | None = None  # of its weights; None: no linear layer
    merge: MergeReport | None = None  # of a merge into quantised weights


def adapter_file(adapter: Adapter, options: OnnxRequest) -> str:
    """The name of an adapter's file beside the output; each of three graphs has its own.

    Raises InputRefused where it would be no file's name.
    """
    name = name_of_file(adapter)
    return file_for_graph(name, options.output.name) if options.has_parts else name + SUFFIX


def name_of_file(adapter: Adapter) -> str:
    """The name of an adapter, for a file. Raises InputRefused where it would be no file's name."""
    if adapter.name.startswith(".") or "/" in adapter.name:
        raise InputRefused(
            f"the name {adapter.name!r} of an adapter cannot be the name of a file. Name the adapter: "
            f"{named('adapters', 'NAME=ADAPTER')}"
        )
    return adapter.name


def check_adapters(options: OnnxRequest) -> None:
    """Raise InputRefused for adapters that a graph of this mode cannot take."""
    if options.lora != "merged":  # before the model is exported; the plan has those whose kind shows there
        for adapter in options.adapters:
            for module in adapter.beyond_pairs["transforms"]:
                if adapter.pairs[module].scaling() is None:
                    raise beside_the_weight(adapter.name, module, adapter.pairs[module].kind)
    if options.is_swapped:
        others = options.without_own_heads
        if options.ignore_head:  # its tensors are compared with the base's when those are known
            others = [replace(adapter, replaced={}) for adapter in options.adapters]
        onnx_adapter.refuse_beyond_low_rank(others)
    if options.lora in ("inputs", "slots"):
        for adapter in options.adapters:
            adapter_file(adapter, options)
    if options.lora == "slots" and options.verify and len(options.adapters) > options.slots:
        raise InputRefused(
            f"{count(len(options.adapters), 'adapter')} for {count(options.slots, 'slot')}: the proof gives each one a "
            f"slot. Use {named('slots', len(options.adapters))}, or export with fewer adapters, and then make the "
            f"files of the others with "
            f"`{command('convert', 'ADAPTER', output='OTHER.onnx_adapter', graph=options.output.name)}`"
        )
