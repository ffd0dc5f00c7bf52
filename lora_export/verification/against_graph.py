"""The graph that a candidate was made from as the measure of the candidate.

Without a PyTorch model the base graph's own computation is the truth. The reference is the base graph with the adapters
in another form than the candidate's (`references/graph_with_adapter.py`), computed in fp64
(`references/graph_fp64.py`) without onnxruntime's optimisations. The peer is the same graph in its own types,
optimised: its error is the error of float arithmetic here. Reference and candidate share where a weight is in the
graph, and what the adapter contains.

A proof takes several times the weights' memory: the candidate's session, the peer's, and one weight at a time in fp64.
Measured with 12 fp32 layers of 64 MiB: 3.3 GiB merged and 4.0 GiB with nodes, of which the graph's own file is 0.75
GiB; with as many layers in 4 bits, which are dequantised whole, 3.2 GiB. `test_against_graph_memory.py` measures it.

A candidate that lacks one pair of the adapters must be detected. For this control the base graph computes W + ΔW at
each weight, in fp64. The tensors of the pairs are inputs of this graph, so that one session runs with and without each
pair. What is judged then is in pair_controls.py and parity/judging.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from lora_export import plan
from lora_export.graph.find_sites import Sites, find_sites
from lora_export.graph.onnx_file.reading import load_graph, open_graph
from lora_export.graph.site import Site
from lora_export.graph.tied_tables import with_rows_of_equal_tables
from lora_export.graph.values import drop_tensors
from lora_export.lora import Adapter
from lora_export.options.proof import Running
from lora_export.options.spelling import named
from lora_export.plan import Layout, Plan, Step, Term
from lora_export.runtime import onnx_runner
from lora_export.runtime.kv_cache import graph_of
from lora_export.runtime.runner import TIMEOUT, Arrays, Runner
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import CandidateOutputs, OnProofStep, OutputsByCase, sensitivity_of
from lora_export.verification.compare_outputs import same_bits
from lora_export.verification.inputs import Inputs
from lora_export.verification.pair_controls import (
    JudgeWithout,
    PairControls,
    grouped,
    switch_off,
    too_many,
    with_difference,
)
from lora_export.verification.parity import Wide
from lora_export.verification.proof import AGAINST, UNCHANGED
from lora_export.verification.references import (
    STEPS,
    FurtherPeer,
    PreparedReferences,
    ReferenceOutputs,
    References,
    note_on_fp64,
)
from lora_export.verification.references.base_graph import (
    ONNX_HALVES,
    BaseGraph,
    open_graph_session,
    open_in_fp64,
    run_in_fp64,
)
from lora_export.verification.references.compare_pairs import compare_pairs
from lora_export.verification.references.compare_tensors import compare_initializers, tensors_of_graph
from lora_export.verification.references.graph_with_adapter import (
    RecordedConstant,
    at_strength,
    branches_at_quantised_weights,
    branches_where_possible,
    refuse_parts,
    sum_at_weights,
)
from lora_export.verification.references.requantised_graph import RequantisedGraph
from lora_export.weights.checkpoint import Checkpoint

Form = Callable[[ir.Model, Sites, Plan], list[str]]  # puts adapters into a graph, in memory; returns notes

PEER = "the other graph"
_ROUNDED_SUMS: Form = functools.partial(sum_at_weights, rounded=True)
MERGED_GRAPH = (
    "the other graph was measured with W + ΔW at each weight, too; the larger error counts: ΔW is large beside W"
)


@dataclass(frozen=True, eq=False)
class GraphReferences(References):
    """The base graph with the adapters in another form than the candidates', as the references of a proof.

    `mode` is the form in the candidates: merged, nodes, inputs or rows. Without an adapter the base graph itself is
    the reference.
    """

    base: BaseGraph
    mode: str
    adapters: Sequence[Adapter] = ()
    strengths: Sequence[float] | None = None
    requantised: bool = False  # whether adapters are merged into quantised weights, which stay so or are promoted

    @classmethod
    def open(
        cls,
        path: Path,
        mode: str,
        adapters: Sequence[Adapter] = (),
        strengths: Sequence[float] | None = None,
        *,
        checkpoint: Checkpoint | None = None,
        provider: str = Running.provider,
        user_inputs: Path | None = None,
        seed: int = 0,
    ) -> GraphReferences:
        """The references of a graph's file. Reads no large weight.

        `checkpoint` names weights by content; `user_inputs` (.npz) are one more case. Raises InputRefused for a file
        that is no ONNX graph.
        """
        base = BaseGraph(path, open_graph(path).model, checkpoint, provider, user_inputs, seed)
        return cls(base, mode, adapters, strengths)

    @property
    def seed(self) -> int:
        return self.base.seed

    @property
    def remedy(self) -> str:
        return f"the PyTorch model that the graph was exported from ({named('model', 'MODEL')})"

    def with_adapters(self, adapters: Sequence[Adapter], strengths: Sequence[float] | None = None) -> GraphReferences:
        return replace(self, adapters=adapters, strengths=strengths)

    def check(self) -> None:
        """Make the inputs. Raises InputRefused where none can be made, RuntimeRefused where the base does not run."""
        _ = self.base.inputs

    def inputs(self, candidate: Runner) -> Inputs:  # noqa: ARG002 - they come from the base graph
        return self.base.inputs

    def prepare(self, candidate: Runner, inputs: Inputs) -> PreparedGraphReferences:
        graph = graph_of(candidate)
        merged = graph.source if self.requantised and graph is not None and isinstance(graph.source, Path) else None
        return PreparedGraphReferences(self, inputs, self._compared(candidate), merged)

    def planned(self) -> tuple[ir.Model, Sites, Plan]:
        """A copy of the base graph, and where the adapters are in it."""
        model = self.base.model.clone()
        sites = find_sites(model, self.base.checkpoint)
        steps = plan.make(self.adapters, sites.specs, strengths=self.strengths)
        steps = with_rows_of_equal_tables(steps, sites, self.base.checkpoint)
        refuse_parts(steps)
        return model, sites, steps

    def _compared(self, candidate: Runner) -> parity.Findings:
        """The candidate's weights, and its A and B, beside those that it should have."""
        graph = graph_of(candidate)
        if graph is None or not isinstance(graph.source, Path):
            return parity.Findings()
        model = self.base.model.clone()
        model, sites, steps = self.planned() if self.adapters else (model, find_sites(model), None)
        written = load_graph(graph.source)
        try:
            tensors_in, dtype = (lambda _: tensors_of_graph(written)), self.base.dtype
            pairs = compare_pairs(candidate, tensors_in, sites.specs, steps, dtype)
            if self.requantised and steps is not None:
                pairs += parity.Findings(faults=tuple(RequantisedGraph(written).faults(sites, steps)))
            found = compare_initializers(written, model, sites, steps, merged=self.mode == "merged")
        finally:
            drop_tensors(written)  # they hold its files open, and elsewhere than on Linux such a file cannot be moved
        return found + pairs

    def about(self) -> dict[str, Any]:
        model = {"source": str(self.base.path), "sha256": self.base.sha256}
        return {**onnx_runner.describe_ort_environment(), "model": model, "against": AGAINST}

    @property
    def rounds_sums(self) -> bool:
        """Whether the candidates store W + ΔW in half precision, or quantised."""
        return self.mode == "merged" and (self.requantised or self.base.dtype in ONNX_HALVES)


@dataclass(frozen=True, eq=False)
class PreparedGraphReferences(PreparedReferences):
    """The references for one candidate. The graphs are made, run and released one after the other."""

    references: GraphReferences
    inputs: Inputs
    weights: parity.Findings  # on those that the candidate stores
    merged: Path | None = None  # the candidate's file, where adapters were merged into its quantised weights

    def run(self, outputs: CandidateOutputs, step: OnProofStep) -> ReferenceOutputs:
        step("the other graph")
        deployed, sensitivity, notes = self._run_peer(outputs)
        is_alone = not self.references.adapters and not outputs.refusals
        if is_alone and all(same_bits(own, deployed[case]) for case, own in outputs.by_case.items()):
            # Nothing is nearer to the base than its own bits. A quantised base is far from its own fp64.
            by_role: dict[str, OutputsByCase] = {"reference": deployed}
            notes.append(UNCHANGED)
        else:
            by_role, narrow_operators = self._in_fp64(step)
            notes.append(note_on_fp64(narrow_operators))
        return ReferenceOutputs(
            deployed,
            by_role,
            sensitivity,
            dtype=self.references.base.dtype,
            peer=PEER,
            findings=parity.Findings(tuple(notes)) + outputs.findings + self.inputs.findings + self.weights,
        )

    def further_peers(self, step: OnProofStep, cases: Sequence[str]) -> Iterator[FurtherPeer]:
        """Run the peer with W + ΔW at each weight; none where the peer has no branches."""
        if not self.references.adapters or self.references.mode != "merged" or self.references.rounds_sums:
            return
        step("the other graph, merged")
        model, _ = self._with_adapters(sum_at_weights)
        peer = open_graph_session(model, PEER, self.references.base.provider, timeout=self.references.base.timeout)
        del model
        yield FurtherPeer({name: peer.run(self.inputs.cases[name]) for name in cases}, MERGED_GRAPH)

    def control_pairs(self, cases: Sequence[parity.Case], expected: ReferenceOutputs) -> parity.Findings:
        """Run the base graph with W + ΔW in fp64, without single pairs, and judge what it returns."""
        base = self.references.base
        model, sites, steps = self.references.planned()
        judge = functools.partial(parity.judge_missing_part, cases, dtype=expected.dtype)
        own = self.inputs.cases
        return control_graph_pairs(model, sites, steps, own, cases, judge, timeout=base.timeout).findings

    def _run_peer(self, outputs: CandidateOutputs) -> tuple[OutputsByCase, tuple[parity.Sensitivity, ...], list[str]]:
        """Run the base graph with the adapters in another form, in its own types. Returns notes, too."""
        references = self.references
        if not references.adapters:
            notes, model = ["graph against graph, without an adapter"], references.base.model.clone()
        else:
            form, description = self._form_of_peer()
            model, more = self._with_adapters(form)
            about = (
                f"graph against graph, no PyTorch model was given ({named('model')}): the reference is the base graph"
            )
            notes = [f"{about}, in which {description}", *more]
        peer = open_graph_session(model, PEER, references.base.provider, timeout=references.base.timeout)
        del model  # the session has its weights
        deployed = {name: peer.run(arrays) for name, arrays in self.inputs.cases.items()}
        return deployed, sensitivity_of(outputs, peer, self.inputs, deployed), notes

    def _form_of_peer(self) -> tuple[Form, str]:
        """Another form than the candidate's, the most exact one in the graph's types, and its description."""
        if self.merged is not None:
            return self._with_merged_weights, "the quantised weights are the candidate's, which were judged one by one"
        if self.references.mode != "merged":
            return branches_at_quantised_weights, "W + ΔW is computed at each weight when it runs"
        if self.references.rounds_sums:
            return _ROUNDED_SUMS, "W + ΔW is computed and rounded at each weight when it runs"
        return branches_where_possible, "x·ΔW is computed in a branch beside each weight"

    def _in_fp64(self, step: OnProofStep) -> tuple[dict[str, OutputsByCase], set[str]]:
        """Role -> case -> outputs, and the operators without a kernel in fp64."""
        by_role: dict[str, OutputsByCase] = {}
        narrow_operators: set[str] = set()
        for role, form, factor in self._roles_with_adapters():
            step(STEPS[role])
            model, _ = self._with_adapters(form, factor)
            by_role[role], narrow = run_in_fp64(model, self.inputs.cases, timeout=self.references.base.timeout)
            del model
            narrow_operators |= narrow
        role = "base" if self.references.adapters else "reference"
        if role not in by_role:
            step(STEPS["base"])
            by_role[role], narrow = self.references.base.fp64
            narrow_operators |= narrow
        return by_role, narrow_operators

    def _roles_with_adapters(self) -> Iterator[tuple[str, Form, float]]:
        """The role, form and factor on every scale of each graph that has adapters."""
        adapters, rounds = self.references.adapters, self.references.rounds_sums
        if not adapters:
            return
        by_mode: Form = branches_where_possible if self.references.mode == "merged" else sum_at_weights
        form = self._with_merged_weights if self.merged is not None else _ROUNDED_SUMS if rounds else by_mode
        yield "reference", form, 1.0
        yield "scaled", sum_at_weights if self.merged is not None else form, parity.CONTROL_SCALE
        if rounds:
            yield "attached", sum_at_weights, 1.0
        if any(adapter.pairs for adapter in adapters) and any(adapter.replaced for adapter in adapters):
            yield "base", sum_at_weights, 0.0  # with the replaced tensors: the control is about the effect of the pairs

    def _with_merged_weights(self, model: ir.Model, sites: Sites, steps: Plan) -> list[str]:
        assert self.merged is not None
        return RequantisedGraph(load_graph(self.merged)).insert(model, sites, steps)

    def _with_adapters(self, form: Form, factor: float = 1.0) -> tuple[ir.Model, list[str]]:
        """A copy of the base graph with the adapters in a form, and notes."""
        model, sites, steps = self.references.planned()
        return model, form(model, sites, at_strength(steps, factor))


# --- the control of every pair ---


class GraphPair(NamedTuple):
    """One pair at one weight."""

    step: Step
    number: int  # of its term


def control_graph_pairs(
    model: ir.Model,
    sites: Sites,
    plan: Plan,
    inputs: Mapping[str, Arrays],
    cases: Sequence[parity.Case],
    judge: JudgeWithout,
    *,
    timeout: float = TIMEOUT,
) -> PairControls:
    """Switch off the pairs of a plan in a copy of the base graph, and `judge` the outputs.

    `inputs` are by the name of the case. `model` is changed and of no further use. A run of all cases and pairs takes
    as long as the reference in fp64, for each pair that the smallest case does not show as often as there are cases.
    """
    pairs = [
        (term.module, term.adapter, GraphPair(step, number))
        for step in plan.steps
        for number, term in enumerate(step.terms)
        if _has_effect(term)
    ]
    tensors = [value.const_value for value in model.graph.initializers.values()]
    by_layer = too_many(len(pairs), sum(tensor.size for tensor in tensors if tensor is not None))
    norms = {site: _norms(site) for step in plan.steps if step.has_dora for site in sites.by_name[step.weight]}
    constants: list[RecordedConstant] = []
    sum_at_weights(model, sites, plan, record=constants)
    for constant in constants:
        _make_input(model, constant.value)
    everything = {str(constant.value.name): np.ascontiguousarray(constant.array) for constant in constants}
    runner, _ = open_in_fp64(model, parts=[constant.value for constant in constants], timeout=timeout)

    def run_without(groups: Mapping[str, Sequence[GraphPair]], case: parity.Case) -> Iterator[tuple[str, Arrays]]:
        given = {**inputs[case.name], **everything}
        with_all = runner.run(given)
        for name, off in groups.items():
            yield name, with_difference(case, runner.run(given | _changed(off, constants, norms)), with_all)

    ordered = sorted(cases, key=lambda case: sum(array.size for array in inputs[case.name].values()))
    return switch_off(grouped(pairs, by_layer=by_layer), ordered, run_without, judge, by_layer=by_layer)


def _has_effect(term: Term) -> bool:
    """Whether a pair changes a weight: whether a pair of zeros is there, or a turn by nothing, makes no difference."""
    pair = term.pair
    if pair.needs_weight:
        return bool(term.scale) and not pair.is_identity
    return pair.depends_on_weight or bool(term.scale and pair.a.any() and pair.b.any())


def _make_input(model: ir.Model, value: ir.Value) -> None:
    """Turn an initializer into an input of the graph, of the same type and shape."""
    del model.graph.initializers[str(value.name)]
    assert value.const_value is not None
    value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(value.const_value.shape.numpy())
    value.const_value = None
    model.graph.inputs.append(value)


def _changed(off: Sequence[GraphPair], constants: Sequence[RecordedConstant], norms: Mapping[Site, Wide]) -> Arrays:
    """The tensors of the pairs that are off: B without their ranks, and for DoRA the length of each row of W."""
    changed: Arrays = {}
    for constant in constants:
        numbers = [pair.number for pair in off if pair.step is constant.step]
        if not numbers or constant.part == "A":
            continue
        array = np.ascontiguousarray(constant.array).copy()
        if constant.base is not None:
            array = constant.base
        elif constant.part == "magnitude":
            block = constant.site.block
            array.reshape(-1)[slice(None) if block is None else slice(block.start, block.stop)] = norms[constant.site]
        else:
            ranks = np.cumsum([0, *(term.pair.rank for term in constant.step.terms)])
            by_rank = array if constant.is_transposed else array.T  # (ranks, out)
            for number in numbers:
                by_rank[ranks[number] : ranks[number + 1]] = 0
        changed[str(constant.value.name)] = array
    return changed


def _norms(site: Site) -> Wide:
    """The length of each row of a weight (out, in * kernel), in fp64."""
    array = site.array.T if site.layout is Layout.EMBEDDING else site.array if site.is_convolution else site.matrix
    norms: Wide = np.linalg.norm(array.reshape(len(array), -1).astype(np.float64), axis=1)
    return norms
