"""The graph that candidates were made from: its inputs, its outputs in fp64; sessions of graphs in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import onnx_ir as ir

from lora_export.errors import RuntimeRefused
from lora_export.graph.onnx_file.writing import in_memory
from lora_export.graph.values import drop_tensors
from lora_export.options.proof import Running
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.ort_session import InMemoryGraph
from lora_export.runtime.runner import TIMEOUT, Arrays, TooSlow
from lora_export.storage.hashes import file_sha256
from lora_export.verification.candidate_outputs import INPUTS_NOT_CHANGED
from lora_export.verification.inputs import NOT_VARIED, Inputs, graph_inputs
from lora_export.verification.inputs.graph_inputs import NO_CONFIG, GraphSizes, InputGenerator, NoGeneratedInputs
from lora_export.verification.parity import Findings
from lora_export.verification.references.graph_fp64 import compute_weights_late, widen
from lora_export.weights.checkpoint import Checkpoint

ONNX_HALVES = {"bfloat16": ir.DataType.BFLOAT16, "float16": ir.DataType.FLOAT16}


@dataclass(frozen=True, eq=False)
class BaseGraph:
    """The graph that candidates were made from. What its model computes never changes, but the sequence of nodes may.

    `checkpoint` names the graph's weights by content, where their names are lost. `user_inputs` (.npz) are one more
    case; where the graph does not determine its inputs, they are the only one. Inputs and outputs are computed once,
    when they are first needed.
    """

    path: Path
    model: ir.Model
    checkpoint: Checkpoint | None = None
    provider: str = Running.provider
    user_inputs: Path | None = None
    seed: int = 0
    timeout: float = TIMEOUT  # seconds for one run

    @property
    def dtype(self) -> str:
        """The coarsest float type of the stored weights."""
        kinds = {value.dtype for value in self.model.graph.initializers.values()}
        return next((name for name, kind in ONNX_HALVES.items() if kind in kinds), "float32")

    @cached_property
    def sha256(self) -> str:
        """The hash of the graph's file; external weights are not part of it."""
        return file_sha256(self.path)

    @cached_property
    def fp64(self) -> Fp64Outputs:
        return run_in_fp64(self.model.clone(), self.inputs.cases, timeout=self.timeout)

    @cached_property
    def inputs(self) -> Inputs:
        """Generated cases that the graph accepts, and the user's own.

        Raises InputRefused where there is no case, or the user's inputs are not those of the graph.
        """
        users: dict[str, Arrays] = {}
        if self.user_inputs is not None:
            users[self.user_inputs.name] = graph_inputs.read(self.user_inputs, self.model)
        try:
            generated = self._generated_inputs()
        except NoGeneratedInputs as refusal:
            if not users:
                raise
            note = f"{self.user_inputs} is the only case: {refusal.problem}"
            return Inputs(users, findings=Findings(notes=(note, f"{INPUTS_NOT_CHANGED} was not tested")))
        return replace(generated, cases={**generated.cases, **users})

    def _generated_inputs(self) -> Inputs:
        config = NO_CONFIG if self.checkpoint is None else self.checkpoint.config
        generator = InputGenerator(self.model, str(self.path), config)
        runner = open_graph_session(self.model, "the base graph", self.provider, timeout=self.timeout)
        cases: dict[str, Arrays] = {}
        for number, wanted in enumerate(graph_inputs.CASES):
            sizes, arrays = self._accepted(generator, runner, wanted, self.seed + number + 1)
            cases[generator.label(sizes)] = arrays
        if generator.takes_tokens:
            with contextlib.suppress(NoGeneratedInputs):
                one, tokens = self._accepted(generator, runner, graph_inputs.SINGLE_TOKENS, self.seed)
                cases[generator.label(one)] = tokens
        redrawn = generator.redraw(sizes, arrays, seed=self.seed + 1000)
        perturbed = {name: {**arrays, name: values} for name, values in redrawn.items()}
        accepted = {name: others for name, others in perturbed.items() if _accepts(runner, others)}
        notes = tuple(NOT_VARIED.format(name) for name in arrays if name not in accepted)
        return Inputs(cases, varied=arrays, perturbed=accepted, findings=Findings(notes))

    def _accepted(
        self, generator: InputGenerator, runner: OnnxRunner, wanted: GraphSizes, seed: int
    ) -> tuple[GraphSizes, Arrays]:
        """The first alternative to these sizes whose inputs the graph accepts, and the inputs."""
        refusal = None
        for sizes in generator.alternatives(wanted):
            arrays = generator.make(sizes, seed=seed)
            try:
                runner.run(arrays)
            except TooSlow:  # other sizes would be, too
                raise
            except RuntimeRefused as error:
                refusal = refusal or error
                continue
            return sizes, arrays
        problem = f"{self.path} refuses the inputs that are generated for it ({refusal})"
        raise NoGeneratedInputs(problem, arrays) from refusal


def _accepts(runner: OnnxRunner, arrays: Arrays) -> bool:
    try:
        runner.run(arrays)
    except RuntimeRefused:
        return False
    return True


# --- sessions of graphs in memory ---

FLOAT_OUTPUTS = {
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(float16)": ir.DataType.FLOAT16,
    "tensor(bfloat16)": ir.DataType.BFLOAT16,
}


class Fp64Outputs(NamedTuple):
    """The outputs of a graph in fp64, by case, and the operators that have no kernel in fp64."""

    by_case: Mapping[str, Arrays]
    narrow_operators: frozenset[str]


def open_graph_session(model: ir.Model, name: str, provider: str, *, timeout: float = TIMEOUT) -> OnnxRunner:
    """Open a session of a graph, optimised. It gives memory back as soon as it is free."""
    compute_weights_late(model)
    return OnnxRunner(InMemoryGraph(name, *in_memory(model)), provider, low_memory=True, timeout=timeout)


def run_in_fp64(model: ir.Model, cases: Mapping[str, Arrays], *, timeout: float = TIMEOUT) -> Fp64Outputs:
    """Run a graph in fp64 on the CPU, without optimisations. The graph is changed and of no further use."""
    runner, narrow_operators = open_in_fp64(model, timeout=timeout)
    return Fp64Outputs({name: runner.run(arrays) for name, arrays in cases.items()}, narrow_operators)


def open_in_fp64(
    model: ir.Model, *, parts: Collection[ir.Value] = (), timeout: float = TIMEOUT
) -> tuple[OnnxRunner, frozenset[str]]:
    """A session of a graph in fp64 on the CPU, without optimisations, and the operators without a kernel in fp64.

    `parts` are inputs that weights are computed from. The graph is changed and of no further use.
    """
    narrow_operators = frozenset(widen(model, inferred_types))
    compute_weights_late(model, parts)
    graph = InMemoryGraph("the graph in fp64", *in_memory(model))
    drop_tensors(model)  # graphs are cyclic: with them, the weights made for this one would stay in memory
    return OnnxRunner(graph, optimise=False, low_memory=True, timeout=timeout), narrow_operators


def inferred_types(model: ir.Model) -> dict[str, ir.DataType]:
    """The float types that onnxruntime infers for values whose type the graph does not state."""
    exposed = model.clone()
    produced = (value for node in exposed.graph for value in node.outputs if value.name)
    unknown = [value for value in produced if value.dtype in (None, ir.DataType.UNDEFINED)]
    exposed.graph.outputs.extend(value for value in unknown if not value.is_graph_output())
    session = OnnxRunner(InMemoryGraph("the graph", *in_memory(exposed)), optimise=False).session
    return {value.name: FLOAT_OUTPUTS[value.type] for value in session.get_outputs() if value.type in FLOAT_OUTPUTS}
