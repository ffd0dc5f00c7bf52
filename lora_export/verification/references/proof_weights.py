"""The weights with which all runs of a proof compute, and what they show before anything is run.

They are the model's. Where a candidate stores quantised weights, they are the candidate's, and where it stores weights
in half precision, they are rounded as it should round them: what that costs is no fault of its file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_export import layers, plan
from lora_export.layers.module_tensors import dtype_name
from lora_export.lora import Adapter
from lora_export.models.image_text import return_image_features
from lora_export.models.model import Model
from lora_export.plan import Plan
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.several_graphs import SeveralGraphs, graphs_of
from lora_export.runtime.three_graphs import ImageTextRunner
from lora_export.verification.module_copies import is_large, limit_outputs, shared_copy
from lora_export.verification.parity import Findings
from lora_export.verification.references import quantised_weights
from lora_export.verification.references.attached_module import AttachedModule, attach_adapters
from lora_export.verification.references.candidate_tensors import candidate_tensors, compare_tensors
from lora_export.verification.references.candidate_weights import quantised_weights_of, rounding_of
from lora_export.verification.references.compare_pairs import compare_pairs
from lora_export.verification.references.compare_tensors import CandidateTensor
from lora_export.verification.references.half_precision import coarser_dtype, is_half_inside


@dataclass(frozen=True, eq=False)
class ProofWeights:
    """The weights of a model with its adapters, as the runs for one candidate share them."""

    candidate: Runner
    model: Model  # as it was loaded
    adapters: Sequence[Adapter]
    strengths: Sequence[float] | None  # one per adapter; None: 1 each
    changes: Plan | None  # what the adapters do to the model
    quantised: Mapping[str, quantised_weights.DequantisedWeight]
    base: Model  # the model, with the quantised weights of the candidate in place of its own
    attached: AttachedModule  # the module of this base, with the adapters beside its weights
    dtype: str  # the coarser of the candidate's and the model's
    is_half_inside: bool  # whether the candidate computes in half precision and returns fp32
    findings: Findings  # on the weights that the candidate stores

    @property
    def is_large(self) -> bool:
        """Whether the weights stay in their own dtype, and are widened where they are used."""
        return is_large(self.attached.module)

    @property
    def depend_on_tokens(self) -> bool:
        """Whether an adapter acts on some tokens alone, so that no weight of a layer is the sum."""
        return any(adapter.invocation_tokens for adapter in self.adapters)


def proof_weights(
    candidate: Runner,
    model: Model,
    adapters: Sequence[Adapter],
    strengths: Sequence[float] | None,
    inputs: Mapping[str, Arrays],
    origin: Path | None,
    *,
    has_own_heads: bool,
) -> ProofWeights:
    """Compare the weights of both, attach the adapters, and find what the candidate rounds or quantises.

    `origin` is the quantised graph that the candidate was made from. Raises MatchError where the adapters do not fit,
    Different where a quantised weight is no rounding of the model's weight, and Undecided where it contains an adapter
    and its original is unknown.
    """
    specs = layers.specs(model.module)
    changes = plan.make(adapters, specs, strengths=strengths) if adapters else None
    files = [graph.file() for graph in graphs_of(candidate)]  # all below read these
    quantised = quantised_weights_of(candidate, model, changes, origin, inputs, has_own_heads=has_own_heads)
    promoted = [name for name, weight in quantised.items() if weight.wrong is not None]
    found = Findings(tuple(quantised_weights.notes_on(quantised)))
    stored = list(candidate_tensors(candidate))
    if tensors := [tensor for tensor in stored if tensor.name not in promoted]:
        found += compare_tensors(tensors, model.module, changes, quantised)
    dtype = dtype_name(coarser_dtype(candidate, model.module))

    def tensors_in(part: Runner) -> Iterable[CandidateTensor]:
        return candidate_tensors(part) if len(graphs_of(candidate)) > 1 else stored  # one graph is read once

    found += compare_pairs(candidate, tensors_in, specs, changes, dtype)
    found += Findings(faults=tuple(quantised_weights.merge_faults(quantised)))
    base = quantised_weights.with_dequantised_weights(model, quantised)
    module = attach_adapters(shared_copy(base.module), adapters, strengths)
    if isinstance(candidate, ImageTextRunner):
        return_image_features(module)
    elif isinstance(candidate, SeveralGraphs):
        limit_outputs(module, candidate.OUTPUTS)  # T5Gemma returns its decoder's last hidden states, too
    rounding, preferred = rounding_of(candidate, module, quantised) if adapters else ({}, {})
    has_pairs = any(adapter.pairs for adapter in adapters)
    attached = AttachedModule(module, rounding, preferred, has_pairs=has_pairs)
    is_half = is_half_inside(candidate)
    del files
    return ProofWeights(
        candidate, model, adapters, strengths, changes, quantised, base, attached, dtype, is_half, found
    )
