"""PyTorch as the measure of a candidate: the model with its adapters attached, as deployed and in fp64.

All runs share one set of weights. PyTorch runs as deployed first. Then the references run in fp64, one after the other:
the weights of a small model are widened in place, those of a large one where they are used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_export import layers, plan
from lora_export.callbacks import ignore
from lora_export.lora import Adapter
from lora_export.models.image_text import return_image_features
from lora_export.models.model import Model
from lora_export.models.traced_lengths import with_traced_lengths
from lora_export.plan import Plan
from lora_export.runtime import torch_runners
from lora_export.runtime.kv_cache import graph_of, with_cache
from lora_export.runtime.memory import release_memory
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.several_graphs import SeveralGraphs
from lora_export.runtime.three_graphs import ImageTextRunner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import CandidateOutputs, OnProofStep, sensitivity_of
from lora_export.verification.compare_outputs import (
    UnjudgedPositions,
    notes_on_padding,
    outputs_beyond_rounding,
    padding_beyond_rounding,
)
from lora_export.verification.diagnose.localize import diagnose_module
from lora_export.verification.inputs import Inputs
from lora_export.verification.inputs.coverage import coverage_of_pairs, seeds_that_reach
from lora_export.verification.inputs.model_inputs import doubts_on_sizes, further_draw, inputs_of_proof, notes_on_sizes
from lora_export.verification.module_copies import is_large, limit_outputs, shared_copy, widened
from lora_export.verification.pair_controls import PairControls
from lora_export.verification.proof_session import ProofSession
from lora_export.verification.references import (
    STEPS,
    Diagnosed,
    FurtherPeer,
    PreparedReferences,
    ReferenceOutputs,
    References,
    note_on_fp64,
    quantised_weights,
)
from lora_export.verification.references.attached_module import (
    AttachedModule,
    RoleOutputs,
    attach_adapters,
    with_labels,
)
from lora_export.verification.references.cached_outputs import CachedOutputs, CacheEntry, cache_key
from lora_export.verification.references.candidate_weights import (
    candidate_tensors,
    compare_weights,
    explain_half,
    is_half_inside,
    note_on_half,
    quantised_weights_of,
    returns_halves,
    rounding_of,
)
from lora_export.verification.references.compare_pairs import compare_pairs
from lora_export.verification.references.compare_tensors import ComparedWeights
from lora_export.verification.references.deployed_module import (
    MERGED_MODULE,
    coarser_dtype,
    deployed_module,
    dtype_name,
    in_candidate_dtype,
    merged_module,
    on_device,
    run_observed,
)
from lora_export.verification.references.moved_numbers import (
    DRAWS_OF_ROUNDING,
    FARTHEST_MOVED,
    MOVED_FUNCTIONS,
    MOVED_WEIGHTS,
    MovedFunctions,
    moved_module,
)
from lora_export.verification.references.single_pairs import control_pairs

FURTHER_SEEDS = 2000  # above the proof's own seed: from where inputs that reach more pairs are looked for


@dataclass(frozen=True, eq=False)
class PyTorchReferences(References):
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
    seed: int = 0
    user_inputs: Path | None = None
    device: str = "cpu"
    cache: Path | None = None
    origin: Path | None = None
    fixed: Mapping[str, int] | None = None
    further_seeds: Sequence[int] = ()
    has_own_heads: bool = False
    say: Callable[[str], None] = ignore
    session: ProofSession | None = None

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
        return inputs_of_proof(
            self.model,
            candidate,
            seed=self.seed,
            user_inputs=self.user_inputs,
            adapters=self.adapters,
            further_seeds=self.further_seeds,
        )

    def reaching(self, candidate: Runner, unreached: Collection[str]) -> PyTorchReferences | None:
        if self.further_seeds:
            return None
        module = attach_adapters(shared_copy(self.model.module), self.adapters, self.strengths)
        make_inputs = functools.partial(further_draw, self.model, candidate)
        seeds = seeds_that_reach(module, unreached, make_inputs, self.seed + FURTHER_SEEDS)
        return replace(self, further_seeds=seeds) if seeds else None

    def prepare(self, candidate: Runner, inputs: Inputs) -> PreparedPyTorch:
        """Compare the weights of both, attach the adapters, and find what the candidate rounds or quantises.

        Raises MatchError where the adapters do not fit, Different where a quantised weight is no rounding of the
        model's weight, and Undecided where it contains an adapter and its original is unknown.
        """
        model, adapters = self.model, self.adapters
        changes = plan.make(adapters, layers.specs(model.module), strengths=self.strengths) if adapters else None
        quantised = quantised_weights_of(
            candidate, model, changes, self.origin, inputs.cases, has_own_heads=self.has_own_heads
        )
        promoted = [name for name, weight in quantised.items() if weight.wrong is not None]
        weights = compare_weights(candidate, model, changes, quantised, promoted)
        dtype = dtype_name(coarser_dtype(candidate, model.module))
        faults, notes = compare_pairs(candidate, candidate_tensors, layers.specs(model.module), changes, dtype)
        weights = replace(weights, faults=[*weights.faults, *faults], notes=[*weights.notes, *notes])
        judged = quantised_weights.with_dequantised_weights(model, quantised)
        module = attach_adapters(shared_copy(judged.module), adapters, self.strengths)
        if isinstance(candidate, ImageTextRunner):
            return_image_features(module)
        elif isinstance(candidate, SeveralGraphs):
            limit_outputs(module, candidate.OUTPUTS)  # T5Gemma returns its decoder's last hidden states, too
        rounding, preferred = rounding_of(candidate, module, quantised) if adapters else ({}, {})
        has_pairs = any(adapter.pairs for adapter in adapters)
        attached = AttachedModule(module, rounding, preferred, has_pairs=has_pairs)
        return PreparedPyTorch(self, candidate, inputs, changes, weights, judged, quantised, attached)

    def explain(self, refusal: str) -> str:
        return explain_half(refusal)

    def about(self) -> dict[str, Any]:
        sha256 = self.model.fingerprint() if self.session is None else self.session.fingerprint(self.model)
        model = {"source": self.model.source, "sha256": sha256}
        return {**torch_runners.describe_environment(), "model": model}


@dataclass(eq=False)
class PreparedPyTorch(PreparedReferences):
    """The model with adapters attached, for one candidate."""

    references: PyTorchReferences
    candidate: Runner
    inputs: Inputs
    changes: Plan | None
    weights: ComparedWeights  # the candidate's beside the model's
    judged: Model  # the model, with the quantised weights of the candidate in place of its own
    quantised: Mapping[str, quantised_weights.DequantisedWeight]
    attached: AttachedModule
    _cache: CacheEntry | None = field(default=None, init=False)  # of the outputs in fp64, once PyTorch ran

    @property
    def dtype(self) -> torch.dtype:
        """The coarser of the candidate's dtype and the model's."""
        return coarser_dtype(self.candidate, self.references.model.module)

    @cached_property
    def deployed(self) -> ModuleRunner:
        """PyTorch as it would be deployed."""
        device = self.references.device
        module = deployed_module(self.attached, self.quantised, device)
        module = in_candidate_dtype(module, self.candidate, self.references.model)
        is_half = self.dtype is not torch.float32
        return ModuleRunner(module, device, has_fp32_outputs=is_half and self.is_half_inside)

    @cached_property
    def is_half_inside(self) -> bool:
        """Whether the candidate computes in half precision and returns fp32."""
        return is_half_inside(self.candidate)

    def run(self, outputs: CandidateOutputs, step: OnProofStep) -> ReferenceOutputs:
        is_large_model = is_large(self.attached.module)
        graph = self.candidate if isinstance(self.candidate, SeveralGraphs) else graph_of(self.candidate)
        if is_large_model and graph is not None:
            _ = self.is_half_inside  # reads the session
            graph.close()
            release_memory()
        step("PyTorch")
        model, cases = self.references.model, self.inputs.cases
        found = run_observed(self.deployed, cases, model, self.references.adapters, self.quantised)
        own = found.outputs
        sizes = doubts_on_sizes(self.candidate, model, self.references.fixed)
        sensitivity = sensitivity_of(outputs, self.deployed, self.inputs, own)
        names_known = self.candidate.names_known and self.deployed.names_known
        self._cache = self._cache_entry(own)
        if is_large_model:  # its weights are made again where they are needed
            del self.deployed
        by_role, narrow_operators, _ = self._in_fp64(step, self._cache)
        self.attached.ready = None
        pairs = coverage_of_pairs(self.attached.module, cases, found.computed or self.attached.computed)
        doubts = [*found.doubts, *pairs.doubts, *self.weights.doubts, *sizes, *self.inputs.doubts]
        doubts += found.quantisation.doubts
        unjudged: UnjudgedPositions = {}
        if not self.quantised:  # there PyTorch rounds to int8 as the graph does
            reference, dtype = by_role["reference"], dtype_name(self.dtype)
            if model.is_huggingface:
                unjudged = padding_beyond_rounding(own, reference, cases, dtype)
            doubts = [*doubts, *outputs_beyond_rounding(own, reference, unjudged, dtype)]
        is_half = self.is_half_inside or returns_halves(outputs.by_case, own, names_known=names_known)
        notes = [
            note_on_fp64(narrow_operators),
            *model.notes,
            *notes_on_sizes(self.candidate, model),
            *getattr(self.candidate, "notes", ()),
            *(f"the candidate gives no {what}" for what in getattr(self.candidate, "cannot_give", ())),
            *([] if outputs.refusals else self.inputs.notes),
            *outputs.notes,
            *([note_on_half()] if is_half and self.dtype is torch.float32 else []),
            *notes_on_padding(unjudged),
            *quantised_weights.notes_on(self.quantised),
            *self.weights.notes,
        ]
        return ReferenceOutputs(
            own,
            by_role,
            sensitivity,
            dtype=dtype_name(self.dtype),
            names_known=names_known,
            is_quantised=bool(self.quantised),
            notes=tuple(notes),
            not_judged=(*outputs.not_judged, *model.not_judged, *found.not_judged, *found.quantisation.not_judged),
            unreached=pairs.unreached,
            doubts=tuple(doubts),
            faults=(*self.weights.faults, *quantised_weights.merge_faults(self.quantised), *found.quantisation.faults),
            unjudged=unjudged,
        )

    def _in_fp64(self, step: OnProofStep, cache: CacheEntry) -> CachedOutputs:
        """The outputs of the references in fp64: read from the cache, or run now and written to it."""
        if cached := cache.read():
            return cached
        found: dict[str, RoleOutputs] = {}
        with widened(self.attached.module):
            for roles in self.attached.groups if self.references.adapters else (("reference",),):
                for role in roles:
                    step(STEPS[role])
                found |= self._run(roles)
                if self.attached.rounding and is_large(self.attached.module):
                    release_memory()  # of rounded weights
        by_role = {role: own.by_case for role, own in found.items()}
        outputs = CachedOutputs(by_role, frozenset().union(*(own.narrow_operators for own in found.values())))
        cache.write(outputs)
        return outputs

    def _run(self, roles: Sequence[str]) -> dict[str, RoleOutputs]:
        """The outputs in these roles; those of the base without adapters are the session's, where it has them."""
        session, rounding, cases = self.references.session, self.attached.rounding, self.inputs.cases
        if session is None or "base" not in roles or any(map(callable, rounding.values())):
            return self.attached.run(roles, cases)
        settings = {
            "rounding": dict(rounding),
            "has_pairs": self.attached.has_pairs,
            "candidate": type(self.candidate).__name__,  # the outputs of three graphs are limited
        }
        result = session.without_adapters(self.attached.module, settings, cases)
        found = self.attached.run([role for role in roles if role != "base" or result.value is None], cases)
        result.value = found.get("base", result.value)
        assert result.value is not None
        return {**found, "base": result.value}

    def _cache_entry(self, deployed: Mapping[str, Arrays]) -> CacheEntry:
        """The entry for all that the references depend on; without a key where they cannot be cached."""
        given, rounding = self.references, self.attached.rounding
        dtypes = {name: kind for name, kind in rounding.items() if isinstance(kind, str)}
        key = None
        if given.cache is not None and len(dtypes) == len(rounding):  # none is rounded to those of a quantised weight
            module, cases = self.deployed.module, self.inputs.cases
            key = cache_key(self.judged, given.adapters, given.strengths, cases, deployed, dtypes, module)
        return CacheEntry(given.cache, key, given.say)

    def further_peers(self, step: OnProofStep) -> Iterator[FurtherPeer]:
        """Run PyTorch in fp32 with its adapters merged, with moved weights, and with moved results of functions, too.

        The error of one run is one draw of what rounding does: see `moved_numbers`. There are no such runs in other
        precisions, and none where a graph rounds what enters its layers to int8: weights do not decide its error then.
        """
        attached, device = self.attached, self.references.device
        rounds_inputs = any(weight.activation_block for weight in self.quantised.values())
        if rounds_inputs or self.dtype is not torch.float32:
            return
        is_merged = self.changes is not None and attached.has_pairs and not self.quantised and not attached.rounding
        if is_merged and not self._acts_on_some_tokens:
            step("PyTorch, the adapters merged")
            assert self.changes is not None
            yield self._peer(on_device(merged_module(attached.module, self.changes), device), MERGED_MODULE)
        if is_large(attached.module):
            return
        seeds = [self.references.seed + number for number in range(DRAWS_OF_ROUNDING)]
        for seed in seeds:
            step("PyTorch, its weights moved by a rounding")
            yield self._peer(moved_module(self.deployed.module, seed), MOVED_WEIGHTS)
        for seed in seeds:
            step("PyTorch, its weights and functions moved by a rounding")
            with MovedFunctions(seed) as moved:
                peer = self._peer(moved_module(self.deployed.module, seed), MOVED_FUNCTIONS)
            if not moved.count:
                return
            yield peer._replace(farthest=FARTHEST_MOVED)

    @property
    def _acts_on_some_tokens(self) -> bool:
        return any(adapter.invocation_tokens for adapter in self.references.adapters)

    def _peer(self, module: nn.Module, note: str) -> FurtherPeer:
        peer = ModuleRunner(module, self.references.device)
        return FurtherPeer({name: peer.run(arrays) for name, arrays in self.inputs.cases.items()}, note)

    def control_pairs(self, cases: Sequence[parity.Case], expected: ReferenceOutputs) -> PairControls:
        judge = functools.partial(parity.judge_missing_part, cases, dtype=expected.dtype)
        is_as_cached = all(case.deployed is expected.deployed[case.name] for case in cases)
        cache = self._cache if is_as_cached else None
        cached = cache.read() if cache else None
        detected = cached.detected if cached else frozenset()
        with widened(self.attached.module):
            controls = control_pairs(
                self.attached.module, self.inputs.cases, cases, judge, skip=expected.unreached, detected=detected
            )
        if cache and cached and controls.detected - detected:
            cache.write(cached._replace(detected=controls.detected))
        return controls

    def diagnose(self, case: parity.Case, *, every: bool, step: OnProofStep) -> Diagnosed:
        if self._acts_on_some_tokens:
            return None, ["modules were not compared: what a layer should give depends on its token"]
        step("comparing modules")
        return diagnose_module(
            self.candidate,
            self.attached,
            lambda: self.deployed,
            self.judged.module,
            self.changes,
            case,
            self.inputs.cases[case.name],
            every=every,
        )
