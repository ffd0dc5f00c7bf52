"""A graph with adapters, proven against the graph that it was made from: two ways of computing one thing.

Without a PyTorch model there is no other truth than the base graph's own. The reference is that graph with the
adapters in it by another way than the candidate's (`graph.reference`), computed in fp64 (`graph.wide`) with
onnxruntime's optimisations off; the same graph as it is, in its own types and optimised, says how exactly
float arithmetic can be here. What both ways share is where a weight lies in the graph, and what the adapter holds.

A proof takes several times the weights' memory: the candidate's session, the other graph's, and one weight at a time
in fp64. Measured of 12 fp32 layers of 64 MiB: 3.3 GiB merged, 4.0 GiB with nodes, 0.75 GiB of each the graph's own
file; of as many in 4 bits, whose float stand-ins are made whole, 3.2 GiB. `test_against_graph_memory.py` measures.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from lora_export import plan
from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.graph.onnx_file import in_memory
from lora_export.graph.sites import Sites, find
from lora_export.lora import Adapter
from lora_export.plan import Plan
from lora_export.provenance import adapter_records
from lora_export.runtime import onnx_runner
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.ort_session import InMemoryGraph
from lora_export.runtime.runner import Arrays
from lora_export.storage.hashes import file_sha256
from lora_export.verification import parity
from lora_export.verification.compare_outputs import (
    bits_that_differ,
    by_the_farther,
    differ,
    differs_in_precision_alone,
)
from lora_export.verification.derived_proofs import AGAINST, UNCHANGED
from lora_export.verification.inputs import graph_inputs
from lora_export.verification.proof import Proof
from lora_export.verification.references import graph
from lora_export.verification.references.graph_fp64 import late_weights, widen
from lora_export.weights.checkpoint import Checkpoint

CONTROL_SCALE = 1.1  # the control's factor on every scale
PEER = "the other graph"
MERGED = "its own error is that of W + ΔW at each weight, where that is the larger one: ΔW is large beside W"
GRAPHS = "graph against graph, no PyTorch model was given (--model): the reference is the base graph"
LOW = {"bfloat16": ir.DataType.BFLOAT16, "float16": ir.DataType.FLOAT16}
UNDEFINED = ir.DataType.UNDEFINED
TYPES = {"tensor(float)": ir.DataType.FLOAT, "tensor(float16)": ir.DataType.FLOAT16} | {
    "tensor(bfloat16)": ir.DataType.BFLOAT16
}

Note = Callable[[str], None]


@dataclass
class GraphJudge:
    """Judges candidates against the graph that they were made from, whose model is read and never changed.

    `mode` is how the candidates hold their adapters. Inputs are made from what the graph says of its own; the
    user's (.npz) are one more case, and the only one where none can be made.
    """

    source: Path
    base: ir.Model
    mode: str
    checkpoint: Checkpoint | None = None  # that names weights by content
    provider: str = "cpu"
    user_inputs: Path | None = None
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    _inputs: dict[str, Arrays] = field(default_factory=dict)
    _feeds: graph_inputs.InputGenerator | None = None
    _last: graph_inputs.Sizes = graph_inputs.CASES[-1]
    _base_answers: dict[str, Arrays] = field(default_factory=dict)  # in fp64
    _stayed: set[str] = field(default_factory=set)  # operators without fp64

    def inputs(self) -> dict[str, Arrays]:
        """What everybody is given, by case. Raises InputRefused where nothing can be made and nothing was given."""
        if not self._inputs:
            self._inputs = dict(self._make_inputs())
        return self._inputs

    def answers(self) -> dict[str, Arrays]:
        """What the base graph answers in each case, as it is."""
        runner = self._runner(self.base, "the base graph")
        return {name: runner.run(arrays) for name, arrays in self.inputs().items()}

    def prove(
        self,
        candidate: OnnxRunner,
        adapters: Sequence[Adapter],
        strengths: Sequence[float] | None = None,
        *,
        step: Note = lambda _: None,
    ) -> Proof:
        """Judge a candidate with these adapters in it; without any, against the base graph as it is.

        Raises EnvironmentLacking where the asked provider did not do the work, RuntimeRefused where the candidate
        runs on nothing, and MatchError where the adapters do not fit.
        """
        candidate.placement.require_provider()
        inputs = self.inputs()
        step("the other way")
        ways = _Ways(self, adapters, strengths)
        peer = self._runner(ways.deployed(), PEER)
        deployed = {name: peer.run(arrays) for name, arrays in inputs.items()}
        answers, refusals = _answers(candidate, inputs, step)
        sides = {who: self._in_fp64(model, inputs) for who, model in ways.references(step)}
        if not adapters and not refusals and not bits_that_differ(answers, deployed):
            # Nothing is nearer to the base than its own bits; a quantised one lies far from what it is in fp64.
            sides["reference"] = deployed
            ways.told.append(UNCHANGED)
        elif not self._base_answers:
            step("the base in fp64")
            self._base_answers = self._in_fp64(self.base.clone(), inputs)
        cases = [
            parity.Case(
                name=name,
                inputs_summary=", ".join(f"{key} {value.dtype} {list(value.shape)}" for key, value in arrays.items()),
                deployed=deployed[name],
                candidate=answers[name],
                reference=sides["reference"][name] if "reference" in sides else self._base_answers[name],
                base=(sides.get("base") or self._base_answers)[name] if adapters else None,
                scaled=sides["scaled"][name] if adapters else None,
                attached=sides["attached"][name] if "attached" in sides else None,
                peer=PEER,
            )
            for name, arrays in inputs.items()
        ]
        step("inputs, one by one")
        sensitivity = [] if refusals else list(self._sensitivity(candidate, peer))
        about_fp64 = [self._about_reference()] if self._base_answers else []
        notes = [*ways.told, *about_fp64, *refusals, *self.notes]
        about = {
            **onnx_runner.describe_environment(),
            "model": {"source": str(self.source), "sha256": self._sha256},
            "against": AGAINST,
            "adapters": adapter_records(adapters, strengths or (1.0,) * len(adapters)),
            "seed": self.seed,
            "tolerance": None,
            "inputs": {name: {key: value.shape for key, value in arrays.items()} for name, arrays in inputs.items()},
        }

        def judge(cases: Sequence[parity.Case], *more: str) -> parity.Verdict:
            return parity.judge(cases, dtype=self.dtype, sensitivity=sensitivity, notes=[*notes, *more])

        verdict = judge(cases)
        if ways.has_merged_peer and differs_in_precision_alone(verdict):
            step("the other way, merged")
            del peer  # its weights make room for the next one's
            gc.collect()
            peer = self._runner(ways.merged(), PEER)
            others = [replace(case, deployed=peer.run(inputs[case.name])) for case in cases]
            measured = by_the_farther(cases, others)
            second = judge(measured, MERGED)
            if second.outcome is not parity.Outcome.DIFFERENT:
                verdict, cases = second, measured
        return Proof(verdict, candidate.placement, about, inputs, tuple(cases))

    @cached_property
    def _sha256(self) -> str:
        """Of the graph's file; weights beside it are not of it."""
        return file_sha256(self.source)

    @property
    def dtype(self) -> str:
        """The coarsest in which the graph keeps its weights."""
        kinds = {value.dtype for value in self.base.graph.initializers.values()}
        return next((name for name, kind in LOW.items() if kind in kinds), "float32")

    # --- inputs ---

    def _make_inputs(self) -> Iterator[tuple[str, Arrays]]:
        given = None if self.user_inputs is None else graph_inputs.read(self.user_inputs, self.base)
        runner = self._runner(self.base, "the base graph")
        try:
            self._feeds = graph_inputs.InputGenerator(self.base, str(self.source))
            yield from self._made_inputs(self._feeds, runner)
        except InputRefused as refusal:
            if given is None:
                raise
            self._feeds = None
            self.notes.append(f"no inputs were tried but {self.user_inputs}: {str(refusal).partition('. Give')[0]}")
        if self.user_inputs is not None and given is not None:
            yield self.user_inputs.name, given

    def _made_inputs(self, maker: graph_inputs.InputGenerator, runner: OnnxRunner) -> Iterator[tuple[str, Arrays]]:
        """Three cases that the base graph takes."""
        for number, wanted in enumerate(graph_inputs.CASES):
            refusal = None
            for sizes in maker.alternatives(wanted):
                arrays = maker.make(sizes, seed=self.seed + number + 1)
                try:
                    runner.run(arrays)
                except RuntimeRefused as error:
                    refusal = refusal or error
                    continue
                self._last = sizes
                yield maker.label(sizes), arrays
                break
            else:
                raise InputRefused(
                    f"the inputs that I make for {self.source} are none that it takes ({refusal}). Give some: --inputs "
                    f"FILE.npz, with an array for each of {', '.join(arrays)}"
                ) from refusal

    def _sensitivity(self, candidate: OnnxRunner, peer: OnnxRunner) -> Iterator[parity.Sensitivity]:
        """For each input: does another draw of it, the others held, change the other graph, and the candidate?"""
        if self._feeds is None:
            return
        before = self.inputs()[self._feeds.label(self._last)]
        expected, answered = peer.run(before), candidate.run(before)
        for name, fresh in self._feeds.redraw(self._last, before, seed=self.seed + 1000).items():
            perturbed = {**before, name: fresh}
            if not _takes(peer, perturbed):
                continue
            yield parity.Sensitivity(
                name, differ(expected, peer.run(perturbed)), differ(answered, candidate.run(perturbed))
            )

    # --- graphs ---

    def _runner(self, model: ir.Model, what: str) -> OnnxRunner:
        late_weights(model)
        return OnnxRunner(InMemoryGraph(what, *in_memory(model)), self.provider, low_memory=True)

    def _in_fp64(self, model: ir.Model, inputs: Mapping[str, Arrays]) -> dict[str, Arrays]:
        """What a graph, used up, answers in fp64."""
        gc.collect()  # a graph is a ring: the one before it, with weights made for it, would stay
        self._stayed |= set(widen(model, _types))
        late_weights(model)
        runner = OnnxRunner(InMemoryGraph("the graph in fp64", *in_memory(model)), optimise=False, low_memory=True)
        return {name: runner.run(arrays) for name, arrays in inputs.items()}

    def _about_reference(self) -> str:
        stayed = f", but for: {', '.join(sorted(self._stayed))}" if self._stayed else " throughout"
        return f"the reference ran in fp64{stayed}"


class _Ways:
    """The base graph with adapters in it, in other ways than the candidate's."""

    def __init__(self, judge: GraphJudge, adapters: Sequence[Adapter], strengths: Sequence[float] | None):
        self.judge, self.adapters, self.strengths = judge, adapters, strengths
        self.rounded = judge.mode == "merged" and judge.dtype in LOW
        self.told: list[str] = []

    def deployed(self) -> ir.Model:
        """As exactly as a graph in these types computes it."""
        if not self.adapters:
            self.told.append("graph against graph, without an adapter")
            return self.judge.base.clone()
        if self.judge.mode != "merged":
            self.told.append(f"{GRAPHS}, in which W + ΔW is computed at each weight when it runs")
            return self._made(graph.beside_quantised)
        if self.rounded:
            self.told.append(f"{GRAPHS}, in which W + ΔW is computed and rounded at each weight when it runs")
            return self._made(self._at_the_weights)
        self.told.append(f"{GRAPHS}, in which ΔW stands beside its weights")
        return self._made(self._beside)

    @property
    def has_merged_peer(self) -> bool:
        """Whether the other graph has its adapters beside the weights, where they are exacter than a merge can be."""
        return bool(self.adapters) and self.judge.mode == "merged" and not self.rounded

    def merged(self) -> ir.Model:
        """As exactly as a graph in these types computes it whose adapters are merged."""
        return self._made(graph.at_the_weights)

    def references(self, step: Note) -> Iterator[tuple[str, ir.Model]]:
        """The graphs to be run in fp64, one after the other: nothing where there is no adapter."""
        if not self.adapters:
            return
        way = self._beside if self.judge.mode == "merged" and not self.rounded else self._at_the_weights
        step("the reference")
        yield "reference", self._made(way)
        step("the reference with scale × 1.1")
        yield "scaled", self._made(way, CONTROL_SCALE)
        if self.rounded:
            yield "attached", self._made(graph.at_the_weights)
        if any(adapter.pairs for adapter in self.adapters) and any(adapter.replaced for adapter in self.adapters):
            yield "base", self._made(graph.at_the_weights, 0.0)  # a head that came whole stays: the pairs' effect

    def _at_the_weights(self, model: ir.Model, sites: Sites, steps: Plan) -> None:
        graph.at_the_weights(model, sites, steps, rounded=self.rounded)

    def _beside(self, model: ir.Model, sites: Sites, steps: Plan) -> None:
        elsewhere = graph.beside_the_weights(model, sites, steps)
        if elsewhere:
            note = f"of {elsewhere} weights, beside which nothing can stand, W + ΔW is computed where they are read"
            self.told += [note] if note not in self.told else []

    def _made(self, way: Callable[[ir.Model, Sites, Plan], object], factor: float = 1.0) -> ir.Model:
        model = self.judge.base.clone()
        sites = find(model, self.judge.checkpoint)
        steps = plan.make(self.adapters, sites.specs, strengths=self.strengths)
        way(model, sites, graph.at_strength(steps, factor))
        return model


def _answers(candidate: OnnxRunner, inputs: Mapping[str, Arrays], step: Note) -> tuple[dict[str, Arrays], list[str]]:
    """What a candidate answers by case, nothing where it refuses, and its refusals. Raises where it refuses all."""
    answers: dict[str, Arrays] = {}
    refusals = []
    for name, arrays in inputs.items():
        step(f"case {name}")
        try:
            answers[name] = candidate.run(arrays)
        except RuntimeRefused as refusal:
            answers[name] = {}
            refusals.append(f"the candidate refused case {name}: {refusal}")
    if len(refusals) == len(inputs):
        raise RuntimeRefused(refusals[0])
    return answers, refusals


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
