"""What `onnx` does with adapters, mode by mode: put them into the graph, write what goes beside it, prove it all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import click
import onnx_ir as ir

from lora_export import plan
from lora_export.cli import proving
from lora_export.cli.arguments import say
from lora_export.errors import InputRefused
from lora_export.formats import onnx_adapter
from lora_export.graph.insert.inputs import factors_of, open_inputs
from lora_export.graph.insert.nodes import branch
from lora_export.graph.insert.rows import choose_by_row
from lora_export.graph.onnx_file import in_memory, save
from lora_export.graph.sites import Sites, find
from lora_export.lora import Adapter
from lora_export.plan import Plan
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.ort_session import InMemoryGraph
from lora_export.runtime.runner import Arrays
from lora_export.verification.compare_outputs import bits_that_differ
from lora_export.verification.parity import Outcome
from lora_export.verification.proof import BASE, MIXED, Proof, prove, prove_by_origin, prove_mixed
from lora_export.verification.references import References
from lora_export.weights.checkpoint import Checkpoint

Say = Callable[[str], None]
SWAPPED = ("inputs", "rows")  # modes whose graph is the base until it is told otherwise


@dataclass(frozen=True, eq=False)
class Order:
    """What was asked for."""

    mode: str
    adapters: Sequence[Adapter]
    weights: Sequence[float]
    target: str | None = None  # where adapters to come may stand
    names: str = "olive"
    dora: bool = False  # whether adapters to come may have it everywhere

    @property
    def strengths(self) -> Sequence[float]:
        return self.weights or (1.0,) * len(self.adapters)

    def planned(self, specs: Iterable[plan.TensorSpec]) -> Plan:
        """Where its adapters land; those that are swapped are never there at once."""
        return plan.make(self.adapters, specs, strengths=self.weights, one_at_a_time=self.mode in SWAPPED)


class Source(Protocol):
    """What a graph is made of: a PyTorch model that is exported, or a graph that was made elsewhere."""

    @property
    def checkpoint(self) -> Checkpoint | None: ...  # that names the graph's weights by content
    def check(self) -> None: ...  # raises what will not fit, before any work
    def program(self, stage: Say) -> ir.Model: ...  # the base, the caller's own
    def targets(self, sites: Sites) -> list[str]: ...  # the weights that --target names
    def check_plan(self, steps: Plan) -> None: ...  # raises what only the plan tells
    def merge(self, program: ir.Model, sites: Sites, steps: Plan, folder: Path, file_name: str) -> list[str]: ...
    def record(self) -> dict[str, Any]: ...  # where the graph comes from, by hashes


def check(order: Order) -> None:
    """Raise InputRefused for adapters that no graph of this kind holds."""
    if order.mode in SWAPPED:
        onnx_adapter.refuse_beyond_low_rank(order.adapters)
    if order.mode == "inputs":
        for adapter in order.adapters:
            adapter_file(adapter)


def write(program: ir.Model, order: Order, source: Source, folder: Path, file_name: str, stage: Say) -> list[str]:
    """Write the graph with the adapters in it or beside it into the folder; returns the names of its companions."""
    if not order.adapters and order.target is None:
        return _saved(program, folder, file_name, stage)
    stage("finding its weights")
    sites = find(program, source.checkpoint)
    steps = order.planned(sites.specs) if order.adapters else None
    notes = [note for adapter in order.adapters for note in adapter.notes]
    for note in [*notes, *(steps.notes if steps else ()), *sites.notes]:
        say(f"note: {note}")
    if steps:
        source.check_plan(steps)
    if order.mode == "merged":
        assert steps is not None
        stage("folding the adapters in")
        return source.merge(program, sites, steps, folder, file_name)
    stage("weaving the adapters in")
    if order.mode != "inputs":
        assert steps is not None
        ways: dict[str, Callable[..., object]] = {"nodes": branch, "rows": choose_by_row}
        ways[order.mode](program, sites, steps)
        return _saved(program, folder, file_name, stage)
    wanted = {step.weight for step in (steps.steps if steps else ())} | set(source.targets(sites))
    dora = wanted if order.dora else {step.weight for step in (steps.steps if steps else ()) if step.has_dora}
    weights = [name for name in sites.by_name if name in wanted]
    contract = open_inputs(program, sites, weights, names=order.names, dora=dora)
    for adapter in order.adapters:
        assert steps is not None
        factors = factors_of(program, contract, steps, adapter.name)
        given = onnx_adapter.input_values(contract, steps, adapter.name, factors)
        onnx_adapter.write(folder / adapter_file(adapter), given, contract, sha256=adapter.sha256)
    return [*(adapter_file(adapter) for adapter in order.adapters), *_saved(program, folder, file_name, stage)]


def _saved(program: ir.Model, folder: Path, file_name: str, stage: Say) -> list[str]:
    """Write the graph; returns what lies beside it."""
    stage("writing")
    *beside, _ = save(program, folder, file_name)
    return [path.name for path in beside]


def adapter_file(adapter: Adapter) -> str:
    """What an adapter's file beside the graph is called."""
    if adapter.name.startswith(".") or "/" in adapter.name:
        raise InputRefused(f"no file can be called after the adapter {adapter.name!r}: give it a name, -a NAME=ADAPTER")
    return adapter.name + onnx_adapter.SUFFIX


# --- proof --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Proofs:
    """All that was proven of one file."""

    whole: Proof  # of the adapters that are in it; of the base, where they are swapped
    adapters: Mapping[str, Proof] = field(default_factory=dict)  # each by itself, where they are swapped
    mixed: Proof | None = None  # of batches in which each row has its own
    unlike_base: Sequence[str] | None = None  # outputs whose bits are not the base graph's; None: nobody looked


@dataclass
class Prover:
    """Proves a graph before it is published; where its adapters are swapped, each of them and the base."""

    order: Order
    references: References  # without adapters
    provider: str
    stage: Say
    given: Path | None = None  # the base's graph, where that was made elsewhere
    base_answers: dict[str, Arrays] = field(default_factory=dict)

    def look_at_base(self, program: ir.Model) -> None:
        """Remember what the graph answers before anything is put into it, where that is asked for later."""
        self.stage("making the inputs")
        self.references.check()
        if self.order.mode in SWAPPED:
            self.stage("running the base")
            self.base_answers = self._answers(OnnxRunner(InMemoryGraph("the base", *in_memory(program)), self.provider))

    def prove(self, path: Path) -> Proofs:
        """Raises what the verdict means unless it is `same`, for one and all."""
        runner = OnnxRunner(path, self.provider)
        if self.order.mode not in SWAPPED:
            return Proofs(proving.demanded(self._proof(runner, self.order.adapters, self.order.weights)))
        runners = self._by_adapter(runner)
        whole = self._prove_base(runners[0])
        unlike = bits_that_differ(self.base_answers, self._answers(runners[0]))
        if unlike:
            say(
                "note: without an adapter the graph is the base, but not to the last bit: onnxruntime computes it in "
                f"another order ({unlike[0]})"
            )
        adapters = {
            adapter.name: proving.demanded(self._proof(own, [adapter], [strength], adapter.name), adapter.name)
            for own, adapter, strength in zip(runners[1:], self.order.adapters, self.order.strengths, strict=True)
        }
        mixed = self._mixed(runner, [whole, *adapters.values()]) if self.order.mode == "rows" else None
        return Proofs(whole, adapters, mixed, unlike)

    def _prove_base(self, runner: OnnxRunner) -> Proof:
        """The graph without an adapter; where fp64 cannot decide it, by the graph that it was made from."""
        proof = self._proof(runner, (), None, BASE)
        if proof.verdict.outcome is Outcome.UNDECIDED and self.given is not None:
            self.stage("verifying the base, the graph that it was made from")
            proof = prove_by_origin(proof, runner, self.given, self.references.as_run)
        return proving.demanded(proof, BASE)

    def _proof(
        self, runner: OnnxRunner, adapters: Sequence[Adapter], strengths: Sequence[float] | None, what: str = ""
    ) -> Proof:
        """The proof, whatever its verdict."""
        references = self.references.with_adapters(adapters, strengths)
        return prove(references.as_run(runner), references, step=proving.telling(self.stage, what))

    def _by_adapter(self, runner: OnnxRunner) -> list[OnnxRunner]:
        """The graph as the base, and with each adapter."""
        adapters = self.order.adapters
        if self.order.mode == "rows":
            return [runner.with_rows([number]) for number in range(len(adapters) + 1)]
        return [runner, *(runner.with_adapter(runner.path.with_name(adapter_file(adapter))) for adapter in adapters)]

    def _mixed(self, runner: OnnxRunner, proofs: Sequence[Proof]) -> Proof:
        """All adapters and the base in one batch."""
        self.stage("verifying mixed batches")
        ids = [*range(1, len(proofs)), 0]
        mixed = prove_mixed(self.references.as_run(runner.with_rows(ids)), proofs, ids)
        return proving.demanded(mixed, MIXED)

    def _answers(self, runner: OnnxRunner) -> dict[str, Arrays]:
        as_run = self.references.as_run(runner)
        return {case: as_run.run(arrays) for case, arrays in self.references.inputs(as_run).cases.items()}


def summary(proofs: Proofs | None) -> dict[str, Any]:
    """The verdicts as they are kept in the file itself."""
    told = proving.summary(proofs.whole if proofs else None)
    if proofs and proofs.unlike_base is not None:
        told["bits_of_base"] = not proofs.unlike_base
        told["adapters"] = {name: proving.summary(proof) for name, proof in proofs.adapters.items()}
    if proofs and proofs.mixed:
        told["mixed"] = proving.summary(proofs.mixed)
    return told


def document(proofs: Proofs | None) -> dict[str, Any]:
    """The proofs as JSON."""
    told: dict[str, Any] = {"proof": proving.document(proofs.whole if proofs else None)}
    if proofs and proofs.unlike_base is not None:
        told["bits_of_base"] = not proofs.unlike_base
        told["adapters"] = {name: proving.document(proof) for name, proof in proofs.adapters.items()}
    if proofs and proofs.mixed:
        told["mixed"] = proving.document(proofs.mixed)
    return told


def show(proofs: Proofs | None) -> None:
    """The verdicts on stdout."""
    if proofs is None or proofs.unlike_base is None:
        proving.show(proofs.whole if proofs else None)
        return
    named = [(BASE, proofs.whole), *proofs.adapters.items()]
    for name, proof in [*named, *([(MIXED, proofs.mixed)] if proofs.mixed else [])]:
        click.echo(f"{name}:")
        proving.show(proof)
