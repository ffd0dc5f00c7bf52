"""One case of a proof, and everything that ran it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from lora_export import layers
from lora_export.layers import MatrixWeight
from lora_export.plan import Plan
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner
from lora_export.verification import parity
from lora_export.verification.diagnose.module_calls import CallValues, ModuleCall, matrix_weights, record_calls
from lora_export.verification.parity import Array


@dataclass(frozen=True, eq=False)
class DiagnosisCase:
    """One case of a proof, with the candidate, the references and PyTorch."""

    candidate: Runner
    reference: Fp64Runner
    attached: Fp64Runner  # with the adapters unrounded; the reference itself where nothing is rounded
    deployed: ModuleRunner
    base: nn.Module  # without adapters
    plan: Plan | None
    inputs: Arrays
    outputs: parity.Case  # of all of them
    keep_replaced: bool = False  # the base without adapters keeps the tensors that an adapter replaces whole

    @cached_property
    def base_weights(self) -> dict[str, MatrixWeight]:
        """The weights of the base, by name."""
        return matrix_weights(self.base)

    @cached_property
    def attached_weights(self) -> dict[str, MatrixWeight]:
        """The weights of the module with the adapters attached."""
        return matrix_weights(self.attached.module)

    @cached_property
    def rounded_weights(self) -> dict[str, MatrixWeight]:
        """The weights of the reference, where it rounds some; else an empty dict."""
        return {} if self.reference is self.attached else matrix_weights(self.reference.module)

    def reference_values(self, calls: Collection[ModuleCall], **inputs: Array) -> dict[ModuleCall, CallValues]:
        """The values of calls in the reference, with some inputs changed."""
        return record_calls(self.reference.module, lambda: self.reference.run({**self.inputs, **inputs}), calls)

    def deployed_values(self, calls: Collection[ModuleCall], **inputs: Array) -> dict[ModuleCall, CallValues]:
        """The values of calls in PyTorch as deployed, with some inputs changed."""
        return record_calls(self.deployed.module, lambda: self.deployed.run({**self.inputs, **inputs}), calls)

    def base_values(self, calls: Collection[ModuleCall]) -> dict[ModuleCall, CallValues]:
        """The values of calls without adapters; an empty dict where there are none."""
        if self.plan is None:
            return {}
        with layers.scale_adapters(self.attached.module, 0.0, keep_replaced=self.keep_replaced, in_fp64=True):
            return record_calls(self.attached.module, lambda: self.attached.run(self.inputs), calls)

    def aligned(self, outputs: Arrays) -> Arrays:
        """The candidate's outputs under the names that the case gives them."""
        return outputs_renamed(outputs, self.outputs.candidate)


def outputs_renamed(outputs: Arrays, others: Mapping[str, Array]) -> Arrays:
    """Outputs under the names of others, by order; unchanged where their numbers differ."""
    if outputs.keys() == others.keys() or len(outputs) != len(others):
        return outputs
    return dict(zip(others, outputs.values(), strict=True))
