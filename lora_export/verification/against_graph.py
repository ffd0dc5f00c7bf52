"""The graph that a candidate was made from as its measure: two ways of computing one thing.

Without a PyTorch model there is no other truth than the base graph's own. The reference is that graph with the
adapters in it by another way than the candidate's (`references.graph_with_adapter`), computed in fp64
(`references.graph_fp64`) with onnxruntime's optimisations off; the same graph as it is, in its own types and optimised,
says how exactly float arithmetic can be here. What both ways share is where a weight lies in the graph, and what the
adapter holds.

A proof takes several times the weights' memory: the candidate's session, the other graph's, and one weight at a time
in fp64. Measured of 12 fp32 layers of 64 MiB: 3.3 GiB merged, 4.0 GiB with nodes, 0.75 GiB of each the graph's own
file; of as many in 4 bits, whose float stand-ins are made whole, 3.2 GiB. `test_against_graph_memory.py` measures.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir

from lora_export import plan
from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.onnx_file.reading import open_graph
from lora_export.graph.onnx_file.writing import in_memory
from lora_export.lora import Adapter
from lora_export.plan import Plan
from lora_export.runtime import onnx_runner
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.ort_session import InMemoryGraph
from lora_export.runtime.runner import Arrays, Runner
from lora_export.storage.hashes import file_sha256
from lora_export.verification import parity
from lora_export.verification.against_origin import AGAINST, UNCHANGED
from lora_export.verification.candidate_outputs import CandidateOutputs, Step, sensitivity_of
from lora_export.verification.compare_outputs import bits_that_differ
from lora_export.verification.inputs import Inputs, graph_inputs
from lora_export.verification.references import Diagnosed, MergedPeer, ReferenceOutputs
from lora_export.verification.references.graph_fp64 import compute_weights_late, widen
from lora_export.verification.references.graph_with_adapter import (
    at_strength,
    branches_at_quantised_weights,
    branches_where_possible,
    sum_at_weights,
)
from lora_export.weights.checkpoint import Checkpoint

PEER = "the other graph"
MERGED = "its own error is that of W + ΔW at each weight, where that is the larger one: ΔW is large beside W"
GRAPHS = "graph against graph, no PyTorch model was given (--model): the reference is the base graph"
LOW = {"bfloat16": ir.DataType.BFLOAT16, "float16": ir.DataType.FLOAT16}
UNDEFINED = ir.DataType.UNDEFINED
TYPES = {"tensor(float)": ir.DataType.FLOAT, "tensor(float16)": ir.DataType.FLOAT16} | {
    "tensor(bfloat16)": ir.DataType.BFLOAT16
}

STEPS = {
    "reference": "the reference",
    "scaled": "the reference with scale × 1.1",
    "attached": "the reference with unrounded weights",
    "base": "the base in fp64",
}

Outputs = dict[str, Arrays]  # by case


class Fp64Outputs(NamedTuple):
    """The outputs of a graph in fp64, and the operators that have no kernel in fp64."""

    by_case: Outputs
    narrow: frozenset[str]


@dataclass(frozen=True, eq=False)
class BaseGraph:
    """The graph that candidates were made from, whose model is read and never changed.

    Inputs are made from what the graph declares of its own; the user's (.npz) are one more case, and the only one
    where none can be made. Inputs and outputs are made once, for all adapters.
    """

    path: Path
    model: ir.Model
    checkpoint: Checkpoint | None = None  # that names weights by content
    provider: str = "cpu"
    user_inputs: Path | None = None
    seed: int = 0

    @property
    def dtype(self) -> str:
        """The coarsest in which the graph stores its weights."""
        kinds = {value.dtype for value in self.model.graph.initializers.values()}
        return next((name for name, kind in LOW.items() if kind in kinds), "float32")

    @cached_property
    def sha256(self) -> str:
        """Of the graph's file, without the weights beside it."""
        return file_sha256(self.path)

    @cached_property
    def inputs(self) -> Inputs:
        """Three cases that the graph takes, and the user's. Raises InputRefused where there is none."""
        user = None if self.user_inputs is None else graph_inputs.read(self.user_inputs, self.model)
        own = {} if self.user_inputs is None or user is None else {self.user_inputs.name: user}
        try:
            made = self._made_inputs()
        except InputRefused as refusal:
            if not own:
                raise
            note = f"no inputs were tried but {self.user_inputs}: {str(refusal).partition('. Give')[0]}"
            return Inputs(own, notes=(note,))
        return replace(made, cases={**made.cases, **own})

    def _made_inputs(self) -> Inputs:
        generator = graph_inputs.InputGenerator(self.model, str(self.path))
        runner = session_of(self.model, "the base graph", self.provider)
        cases, sizes, arrays = {}, graph_inputs.CASES[-1], Arrays()
        for number, wanted in enumerate(graph_inputs.CASES):
            sizes, arrays = self._accepted(generator, runner, wanted, self.seed + number + 1)
            cases[generator.label(sizes)] = arrays
        draws = generator.redraw(sizes, arrays, seed=self.seed + 1000)
        perturbed = {name: {**arrays, name: fresh} for name, fresh in draws.items()}
        return Inputs(cases, arrays, {name: other for name, other in perturbed.items() if _takes(runner, other)})

    def _accepted(
        self, generator: graph_inputs.InputGenerator, runner: OnnxRunner, wanted: graph_inputs.Sizes, seed: int
    ) -> tuple[graph_inputs.Sizes, Arrays]:
        """The first of the sizes to try whose inputs the graph takes, and these inputs."""
        refusal, arrays = None, Arrays()
        for sizes in generator.alternatives(wanted):
            arrays = generator.make(sizes, seed=seed)
            try:
                runner.run(arrays)
            except RuntimeRefused as error:
                refusal = refusal or error
                continue
            return sizes, arrays
        raise InputRefused(
            f"the inputs that I make for {self.path} are none that it takes ({refusal}). Give some: --inputs "
            f"FILE.npz, with an array for each of {', '.join(arrays)}"
        ) from refusal

    @cached_property
    def fp64(self) -> Fp64Outputs:
        """The graph's outputs in fp64."""
        return in_fp64(self.model.clone(), self.inputs.cases)


@dataclass(frozen=True, eq=False)
class GraphReferences:
    """The base graph with adapters in it by another way than the candidates', as the references of a proof.

    `mode` is how the candidates hold their adapters: merged, nodes, inputs or rows. Without an adapter the base graph
    is the reference as it is.
    """

    base: BaseGraph
    mode: str
    adapters: Sequence[Adapter] = ()
    strengths: Sequence[float] | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        mode: str,
        adapters: Sequence[Adapter] = (),
        strengths: Sequence[float] | None = None,
        *,
        checkpoint: Checkpoint | None = None,
        provider: str = "cpu",
        user_inputs: Path | None = None,
        seed: int = 0,
    ) -> GraphReferences:
        """The references of a graph's file. Large weights stay in their files until a proof reads them."""
        base = BaseGraph(path, open_graph(path).model, checkpoint, provider, user_inputs, seed)
        return cls(base, mode, adapters, strengths)

    @property
    def seed(self) -> int:
        return self.base.seed

    @property
    def origin(self) -> None:
        """None: these references are the graph that the candidate was made from."""

    def with_adapters(self, adapters: Sequence[Adapter], strengths: Sequence[float] | None = None) -> GraphReferences:
        """The same references with other adapters; the base graph's inputs and outputs are shared."""
        return replace(self, adapters=adapters, strengths=strengths)

    def check(self) -> None:
        """Make the inputs. Raises InputRefused where none can be made, RuntimeRefused where the base does not run."""
        _ = self.base.inputs

    def as_run(self, runner: OnnxRunner) -> OnnxRunner:
        """The graph as it is: the inputs are all that it takes, a cache included."""
        return runner

    def inputs(self, candidate: Runner) -> Inputs:  # noqa: ARG002 - they come from the base graph
        """The base graph's inputs."""
        return self.base.inputs

    def prepare(self, candidate: Runner, inputs: Inputs) -> PreparedGraph:  # noqa: ARG002
        """Prepare nothing but what `run` needs."""
        return PreparedGraph(self, inputs)

    def explain(self, refusal: str) -> str:
        """The refusal as it is."""
        return refusal

    def about(self) -> dict[str, Any]:
        """Versions, and the graph's path and hash."""
        model = {"source": str(self.base.path), "sha256": self.base.sha256}
        return {**onnx_runner.describe_environment(), "model": model, "against": AGAINST}

    @property
    def rounds(self) -> bool:
        """Whether a candidate's sums are stored in half precision."""
        return self.mode == "merged" and self.base.dtype in LOW


@dataclass(frozen=True, eq=False)
class PreparedGraph:
    """The references for one candidate. Graphs are made, run and released one after the other."""

    references: GraphReferences
    inputs: Inputs

    def run(self, outputs: CandidateOutputs, step: Step) -> ReferenceOutputs:
        """Run the other graph in its own types, then the references in fp64."""
        step("the other graph")
        deployed, sensitivity, notes = self._run_peer(outputs)
        if not self.references.adapters and not outputs.refusals and _are_same(outputs.by_case, deployed):
            # Nothing is nearer to the base than its own bits; a quantised one lies far from what it is in fp64.
            by_role = {"reference": deployed}
            notes.append(UNCHANGED)
        else:
            by_role, narrow = self._in_fp64(step)
            without = f", but for: {', '.join(sorted(narrow))}" if narrow else " throughout"
            notes.append(f"the reference ran in fp64{without}")
        return ReferenceOutputs(
            deployed,
            by_role,
            sensitivity,
            dtype=self.references.base.dtype,
            peer=PEER,
            notes=(*notes, *outputs.refusals, *outputs.notes, *self.inputs.notes),
        )

    def run_merged(self, step: Step) -> MergedPeer | None:
        """Run the graph with W + ΔW at each weight; None where ΔW is not beside the weights in the other graph."""
        if not self.references.adapters or self.references.mode != "merged" or self.references.rounds:
            return None
        step("the other graph, merged")
        model, _ = self._made(_at_the_weights)
        peer = session_of(model, PEER, self.references.base.provider)
        del model
        return MergedPeer({name: peer.run(arrays) for name, arrays in self.inputs.cases.items()}, MERGED)

    def diagnose(self, case: parity.Case, *, every: bool, step: Step) -> Diagnosed:  # noqa: ARG002
        """Nothing: two graphs are not compared module by module."""
        return None, []

    def _run_peer(self, outputs: CandidateOutputs) -> tuple[Outputs, tuple[parity.Sensitivity, ...], list[str]]:
        """The base graph with adapters by another way, as exactly as a graph in its types computes it."""
        references = self.references
        if not references.adapters:
            notes, model = ["graph against graph, without an adapter"], references.base.model.clone()
        else:
            how, way = self._way_as_deployed()
            model, more = self._made(way)
            notes = [f"{GRAPHS}, in which {how}", *more]
        peer = session_of(model, PEER, references.base.provider)
        del model  # its weights are the session's now
        deployed = {name: peer.run(arrays) for name, arrays in self.inputs.cases.items()}
        return deployed, sensitivity_of(outputs, peer, self.inputs), notes

    def _way_as_deployed(self) -> tuple[str, Way]:
        """Another way than the candidate's, in words too."""
        if self.references.mode != "merged":
            return "W + ΔW is computed at each weight when it runs", _beside_quantised
        if self.references.rounds:
            return "W + ΔW is computed and rounded at each weight when it runs", _rounded_at_the_weights
        return "ΔW stands beside its weights", _beside

    def _in_fp64(self, step: Step) -> tuple[dict[str, Outputs], set[str]]:
        """Role -> case -> outputs, and the operators without a kernel in fp64."""
        by_role: dict[str, Outputs] = {}
        narrow: set[str] = set()
        for role, way, factor in self._roles():
            step(STEPS[role])
            model, _ = self._made(way, factor)
            by_role[role], without_kernel = in_fp64(model, self.inputs.cases)
            del model
            narrow |= without_kernel
        role = "base" if self.references.adapters else "reference"
        if role not in by_role:
            step("the base in fp64")
            by_role[role], without_kernel = self.references.base.fp64
            narrow |= without_kernel
        return by_role, narrow

    def _roles(self) -> Iterator[tuple[str, Way, float]]:
        """Role, way and factor on every scale of the graphs that have adapters in them."""
        adapters, rounds = self.references.adapters, self.references.rounds
        if not adapters:
            return
        merged_in_floats = self.references.mode == "merged" and not rounds
        way = _beside if merged_in_floats else _rounded_at_the_weights if rounds else _at_the_weights
        yield "reference", way, 1.0
        yield "scaled", way, parity.CONTROL_SCALE
        if rounds:
            yield "attached", _at_the_weights, 1.0
        if any(adapter.pairs for adapter in adapters) and any(adapter.replaced for adapter in adapters):
            yield "base", _at_the_weights, 0.0  # a head that came whole stays: the pairs' effect

    def _made(self, way: Way, factor: float = 1.0) -> tuple[ir.Model, list[str]]:
        """A copy of the base graph with adapters in it, and notes."""
        model = self.references.base.model.clone()
        sites = find_sites(model, self.references.base.checkpoint)
        steps = plan.make(self.references.adapters, sites.specs, strengths=self.references.strengths)
        return model, way(model, sites, at_strength(steps, factor))


# --- ways to put adapters into a graph, with notes ------------------------------------------------

Way = Callable[[ir.Model, Sites, Plan], list[str]]


def _at_the_weights(model: ir.Model, sites: Sites, steps: Plan) -> list[str]:
    sum_at_weights(model, sites, steps)
    return []


def _rounded_at_the_weights(model: ir.Model, sites: Sites, steps: Plan) -> list[str]:
    sum_at_weights(model, sites, steps, rounded=True)
    return []


def _beside_quantised(model: ir.Model, sites: Sites, steps: Plan) -> list[str]:
    branches_at_quantised_weights(model, sites, steps)
    return []


def _beside(model: ir.Model, sites: Sites, steps: Plan) -> list[str]:
    elsewhere = branches_where_possible(model, sites, steps)
    if not elsewhere:
        return []
    return [f"of {elsewhere} weights, beside which nothing can stand, W + ΔW is computed where they are read"]


# --- sessions ------------------------------------------------------------------------------------


def session_of(model: ir.Model, what: str, provider: str) -> OnnxRunner:
    """A session of a graph in memory, which gives memory back as soon as it is free."""
    compute_weights_late(model)
    return OnnxRunner(InMemoryGraph(what, *in_memory(model)), provider, low_memory=True)


def in_fp64(model: ir.Model, cases: Mapping[str, Arrays]) -> Fp64Outputs:
    """Run a graph in fp64, without optimisations. The graph is changed and of no further use."""
    gc.collect()  # a graph is a ring: the one before it, with weights made for it, would stay
    narrow = frozenset(widen(model, _types))
    compute_weights_late(model)
    runner = OnnxRunner(InMemoryGraph("the graph in fp64", *in_memory(model)), optimise=False, low_memory=True)
    return Fp64Outputs({name: runner.run(arrays) for name, arrays in cases.items()}, narrow)


def _are_same(outputs: Mapping[str, Arrays], others: Mapping[str, Arrays]) -> bool:
    """Whether two runs of all cases return the same outputs, bit for bit."""
    names = all(own.keys() == others[case].keys() for case, own in outputs.items())
    return names and not bits_that_differ(outputs, others)


def _takes(runner: OnnxRunner, arrays: Arrays) -> bool:
    try:
        runner.run(arrays)
    except RuntimeRefused:
        return False
    return True


def _types(model: ir.Model) -> dict[str, ir.DataType]:
    """The types that onnxruntime infers for values of which the graph tells none."""
    asked = model.clone()
    unknown = [
        output for node in asked.graph for output in node.outputs if output.name and output.dtype in (None, UNDEFINED)
    ]
    asked.graph.outputs.extend(value for value in unknown if not value.is_graph_output())
    session = OnnxRunner(InMemoryGraph("the graph", *in_memory(asked)), optimise=False).session
    return {value.name: TYPES[value.type] for value in session.get_outputs() if value.type in TYPES}
