"""PyTorch as the measure of a candidate: the model with its adapters attached, as deployed and in fp64.

All runs share one set of weights (`proof_weights`). PyTorch runs as deployed first (`deployed_module`). Then the
references run in fp64, one after the other (`fp64_outputs`): the weights of a small model are widened in place, those
of a large one where they are used.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_export import layers
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.models.traced_lengths import with_traced_lengths
from lora_export.runtime import torch_runners
from lora_export.runtime.kv_cache import with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Runner
from lora_export.verification.inputs import Inputs
from lora_export.verification.inputs.coverage import seeds_that_reach
from lora_export.verification.inputs.model_inputs import case_inputs, further_draw, inputs_of_proof
from lora_export.verification.module_copies import shared_copy
from lora_export.verification.prepared_pytorch import PreparedPyTorch, PyTorchSettings
from lora_export.verification.references import References
from lora_export.verification.references.attached_module import attach_adapters, with_labels
from lora_export.verification.references.half_precision import explain_half
from lora_export.verification.references.proof_weights import proof_weights

FURTHER_SEEDS = 2000  # above the proof's own seed: from where inputs that reach more pairs are looked for


@dataclass(frozen=True, eq=False)
class PyTorchReferences(PyTorchSettings, References):
    """A model with its adapters attached as branches, as the references of a proof.

    The adapters may have the names of the loaded model or the original ones (see `plan.spelling`). The references merge
    no adapter, so that they share no arithmetic with what they judge. `strengths` has one factor
    for each adapter; None is 1 for all. `user_inputs` (.npz) are one more case beside three seeded ones. `device` is
    where PyTorch runs as deployed; the references in fp64 run on the CPU. `cache` is a folder for the outputs of the
    references; `say` receives a message where it cannot be used.

    `fixed` are the sizes of axes that the candidate was made for on purpose, by the axis' name; None: all that it has.
    Where it takes one size of another axis that the model has free, nothing is decided. With a size of the batch,
    `model` is what `in_stated_batch` returns. `further_seeds` are those of further generated inputs.

    With `has_own_heads`, each adapter has a head of its own in the candidate, with labels of its own: where these are
    not as many as the model's, the model gets as many.

    `origin` is the quantised graph that an ONNX candidate was made from. Adapters may have been merged into its
    weights. Its bits decide about a candidate without an adapter where fp64 cannot.

    `session` has what earlier proofs of the same base computed.
    """

    model: Model
    adapters: Sequence[Adapter] = ()
    strengths: Sequence[float] | None = None
    user_inputs: Path | None = None
    origin: Path | None = None
    further_seeds: Sequence[int] = ()
    has_own_heads: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", layers.respelled_for(self.model.module, self.adapters))
        object.__setattr__(self, "model", with_traced_lengths(self.model))

    def with_adapters(self, adapters: Sequence[Adapter], strengths: Sequence[float] | None = None) -> PyTorchReferences:
        own = replace(self, adapters=adapters, strengths=strengths)
        return replace(own, model=with_labels(self.model, own.adapters)) if self.has_own_heads else own

    def as_run(self, runner: Runner) -> Runner:
        """The graph; a decoder with a key/value cache is given whole sequences, as the model is."""
        return with_cache(runner) if isinstance(runner, OnnxRunner) else runner

    def inputs(self, candidate: Runner) -> Inputs:
        seed, own = self.seed, self.user_inputs
        made = case_inputs(
            self.model, candidate, seed=seed, user_inputs=own, adapters=self.adapters, further_seeds=self.further_seeds
        )
        return inputs_of_proof(self.model, candidate, made, seed, own)

    def reaching(self, candidate: Runner, unreached: Collection[str]) -> PyTorchReferences | None:
        if self.further_seeds:
            return None
        module = attach_adapters(shared_copy(self.model.module), self.adapters, self.strengths)
        make_inputs = functools.partial(further_draw, self.model, candidate)
        seeds = seeds_that_reach(module, unreached, make_inputs, self.seed + FURTHER_SEEDS)
        return replace(self, further_seeds=seeds) if seeds else None

    def prepare(self, candidate: Runner, inputs: Inputs) -> PreparedPyTorch:
        """Compare the weights of both, and attach the adapters. Raises as `proof_weights`."""
        weights = proof_weights(
            candidate,
            self.model,
            self.adapters,
            self.strengths,
            inputs.cases,
            self.origin,
            has_own_heads=self.has_own_heads,
        )
        return PreparedPyTorch(weights, inputs, self)

    def explain(self, refusal: str) -> str:
        return explain_half(refusal)

    def about(self) -> dict[str, Any]:
        sha256 = self.model.fingerprint() if self.session is None else self.session.fingerprint(self.model)
        model = {"source": self.model.source, "sha256": sha256}
        return {**torch_runners.describe_environment(), "model": model}
