"""The graph that candidates were made from: its inputs, and its outputs in fp64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from lora_export.errors import RuntimeRefused
from lora_export.options.common import Running
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import TIMEOUT, Arrays, TooSlow
from lora_export.storage.hashes import file_sha256
from lora_export.verification.inputs import Inputs, graph_inputs
from lora_export.verification.inputs.graph_inputs import GraphSizes, InputGenerator, NoGeneratedInputs
from lora_export.verification.references.graph_sessions import Fp64Outputs, open_graph_session, run_in_fp64
from lora_export.weights.checkpoint import Checkpoint

ONNX_HALVES = {"bfloat16": ir.DataType.BFLOAT16, "float16": ir.DataType.FLOAT16}


@dataclass(frozen=True, eq=False)
class BaseGraph:
    """The graph that candidates were made from. Its model is read and never changed.

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
        """The graph's outputs in fp64."""
        return run_in_fp64(self.model.clone(), self.inputs.cases, timeout=self.timeout)

    @cached_property
    def inputs(self) -> Inputs:
        """Three generated cases that the graph accepts, and the user's own.

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
            return Inputs(users, notes=(f"{self.user_inputs} is the only case: {refusal.problem}",))
        return replace(generated, cases={**generated.cases, **users})

    def _generated_inputs(self) -> Inputs:
        generator = InputGenerator(self.model, str(self.path))
        runner = open_graph_session(self.model, "the base graph", self.provider, timeout=self.timeout)
        cases: dict[str, Arrays] = {}
        for number, wanted in enumerate(graph_inputs.CASES):
            sizes, arrays = self._accepted(generator, runner, wanted, self.seed + number + 1)
            cases[generator.label(sizes)] = arrays
        redrawn = generator.redraw(sizes, arrays, seed=self.seed + 1000)
        perturbed = {name: {**arrays, name: values} for name, values in redrawn.items()}
        accepted = {name: others for name, others in perturbed.items() if _accepts(runner, others)}
        return Inputs(cases, varied=arrays, perturbed=accepted)

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
