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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lora_export import layers, plan
from lora_export.errors import LoraExportError
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.models.pt2.program import Program
from lora_export.options.spelling import named
from lora_export.plan import Plan
from lora_export.runtime import torch_runners
from lora_export.runtime.encoder_decoder import OUTPUTS, EncoderDecoderRunner
from lora_export.runtime.kv_cache import CacheRunner, with_cache
from lora_export.runtime.memory import GIB, available_memory, release_memory
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Arrays, Runner
from lora_export.runtime.torch_runners import Fp64Runner, ModuleRunner
from lora_export.verification import parity
from lora_export.verification.candidate_outputs import CandidateOutputs, OnProofStep, sensitivity_of
from lora_export.verification.compare_outputs import aligned, before_first_token
from lora_export.verification.diagnose.diagnosis_case import DiagnosisCase
from lora_export.verification.diagnose.localize import diagnose
from lora_export.verification.inputs import REDRAWS, Inputs
from lora_export.verification.inputs.model_inputs import (
    case_inputs,
    doubts_on_sizes,
    draw,
    further_draw,
    notes_on_sizes,
)
from lora_export.verification.inputs.pair_coverage import coverage_of_pairs, seeds_that_reach
from lora_export.verification.inputs.row_coverage import RowCoverage
from lora_export.verification.kept_outputs import kept
from lora_export.verification.pair_controls import PairControls
from lora_export.verification.references import (
    STEPS,
    Diagnosed,
    FurtherPeer,
    ReferenceOutputs,
    cached_outputs,
    note_on_fp64,
    quantisation_error,
    quantised_weights,
)
from lora_export.verification.references.attached_module import AttachedModule, attach_adapters
from lora_export.verification.references.beyond_rounding import (
    UnjudgedPositions,
    notes_on_padding,
    outputs_beyond_rounding,
    padding_beyond_rounding,
)
from lora_export.verification.references.cached_outputs import CachedOutputs
from lora_export.verification.references.candidate_weights import quantised_weights_of, rounding_of
from lora_export.verification.references.deployed_module import (
    coarser_dtype,
    deployed_module,
    dtype_name,
    in_candidate_dtype,
    merged_module,
    moved_module,
    on_device,
)
from lora_export.verification.references.half_graphs import as_declared, is_half_inside
from lora_export.verification.references.module_copies import (
    converted_copy,
    fp64_bytes,
    is_large,
    limit_outputs,
    shared_copy,
    to_double,
    widened,
)
from lora_export.verification.references.own_heads import with_labels
from lora_export.verification.references.single_pairs import control_pairs

MERGED_MODULE = (
    "PyTorch was measured with its adapters merged, too; the larger error counts: they are large beside the weights"
)
MOVED_WEIGHTS = (
    "PyTorch was measured with each weight moved to a neighbouring number in fp32, too; the largest error counts: the "
    "order of its sums alone was a lucky one"
)
DRAWS_OF_ROUNDING = 4  # runs with moved weights, at most
EXPECTS_HALF = "expected: (tensor(float16))"  # onnxruntime's error for an input in float32
FURTHER_SEEDS = 2000  # above the proof's own seed: from where inputs that reach more pairs are looked for
# What ends a diagnosis without one: our errors, and those of PyTorch and NumPy for an unusual model.
CANNOT_FOLLOW = (LoraExportError, RuntimeError, ValueError, MemoryError)


def _no_message(_: str) -> None:
    """Ignore a message."""


@dataclass(frozen=True, eq=False)
class PyTorchReferences:
    """A model with its adapters attached as branches, as the references of a proof.

    The adapters may have the names of the loaded model or the original ones (see `plan.spelling`). The references merge
    no adapter, so that they share no arithmetic with what they judge. `strengths` has one factor
    for each adapter; None is 1 for all. `user_inputs` (.npz) are one more case beside three seeded ones. `device` is
    where PyTorch runs as deployed; the references in fp64 run on the CPU. `cache` is a folder for the outputs of the
    references; `say` receives a message where it cannot be used.

    `fixed` are the sizes of axes that the candidate was made for on purpose, by the axis' name; None: all that it has.
    Where it takes one size of another axis that the model has free, nothing is decided. `further_seeds` are those of
    further generated inputs.

    With `has_own_heads`, each adapter has a head of its own in the candidate, with labels of its own: where these are
    not as many as the model's, the model gets as many.

    `origin` is the quantised graph that an ONNX candidate was made from. Adapters may have been merged into its
    weights. Its bits decide about a candidate without an adapter where fp64 cannot.
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
    say: Callable[[str], None] = _no_message

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", layers.respelled_for(self.model.module, self.adapters))

    def with_adapters(self, adapters: Sequence[Adapter], strengths: Sequence[float] | None = None) -> PyTorchReferences:
        """The same references with other adapters."""
        own = replace(self, adapters=adapters, strengths=strengths)
        return replace(own, model=with_labels(self.model, own.adapters)) if self.has_own_heads else own

    def check(self) -> None:
        """Do nothing: inputs can be made for every model."""

    def as_run(self, runner: Runner) -> Runner:
        """The graph; a decoder with a key/value cache is given whole sequences, as the model is."""
        return with_cache(runner) if isinstance(runner, OnnxRunner) else runner

    def inputs(self, candidate: Runner) -> Inputs:
        """Three seeded cases of different shapes that the candidate accepts, and the user's own."""
        cases = case_inputs(
            self.model,
            candidate,
            seed=self.seed,
            user_inputs=self.user_inputs,
            adapters=self.adapters,
            further_seeds=self.further_seeds,
        )
        cases = {name: as_declared(candidate, arrays) for name, arrays in cases.items()}
        seeded = list(cases.values())[min(2, len(cases) - 1)]
        varied = cases[self.user_inputs.name] if self.user_inputs else seeded
        varied = varied if varied.keys() == seeded.keys() else seeded  # the user's are texts without images
        perturbed = self._perturbed(candidate, varied)
        constant = [name for name in self.model.input_names if name not in perturbed]
        # Every value that a Hugging Face model takes can be drawn: one that never varies has a single value.
        single, unknown = (constant, []) if self.model.is_huggingface else ([], constant)
        return Inputs(
            cases,
            varied,
            perturbed,
            unjudged=_unjudged(cases) if self.model.is_huggingface else {},
            notes=tuple(f"the input {name} has a single value: its effect was not tested" for name in single),
            doubts=tuple(
                f"the input {name} is the same in every draw, so that it is not known whether the candidate reads it. "
                f"Give it other values with {named('inputs', 'FILE.npz')}, or in the example inputs of the factory"
                for name in unknown
            ),
        )

    def reaching(self, candidate: Runner, unreached: Collection[str]) -> PyTorchReferences | None:
        """The references with further inputs that reach some of these pairs; None where none is found."""
        if self.further_seeds:
            return None
        module = attach_adapters(shared_copy(self.model.module), self.adapters, self.strengths)
        make_inputs = functools.partial(further_draw, self.model, candidate)
        seeds = seeds_that_reach(module, unreached, make_inputs, self.seed + FURTHER_SEEDS)
        return replace(self, further_seeds=seeds) if seeds else None

    def _perturbed(self, candidate: Runner, before: Arrays) -> dict[str, Arrays]:
        """Input -> the arrays with another draw of it; none for an input that is the same in every draw."""
        axes = self.model.axes.items()
        sizes = {symbol: before[name].shape[axis] for name, own in axes for axis, symbol in own.items()}
        draws = [
            as_declared(candidate, draw(self.model, candidate, sizes, self.seed + 1000 + number))
            for number in range(REDRAWS)
        ]
        perturbed = {}
        for name in self.model.input_names:
            fresh = next((drawn[name] for drawn in draws if not np.array_equal(drawn[name], before[name])), None)
            if fresh is not None:
                perturbed[name] = {**before, name: fresh}
        return perturbed

    def prepare(self, candidate: Runner, inputs: Inputs) -> PreparedPyTorch:
        """Attach the adapters, and find what the candidate rounds or quantises.

        Raises MatchError where the adapters do not fit, Different where a quantised weight is no rounding of the
        model's weight, and Undecided where it contains an adapter and its original is unknown.
        """
        model, adapters = self.model, self.adapters
        changes = plan.make(adapters, layers.specs(model.module), strengths=self.strengths) if adapters else None
        quantised = quantised_weights_of(
            candidate, model, changes, self.origin, inputs.cases, has_own_heads=self.has_own_heads
        )
        judged = quantised_weights.with_dequantised_weights(model, quantised)
        module = attach_adapters(shared_copy(judged.module), adapters, self.strengths)
        if isinstance(candidate, EncoderDecoderRunner):
            limit_outputs(module, OUTPUTS)  # T5Gemma returns its decoder's last hidden states, too
        rounding, preferred = rounding_of(candidate, module, quantised) if adapters else ({}, {})
        has_pairs = any(adapter.pairs for adapter in adapters)
        attached = AttachedModule(module, rounding, preferred, has_pairs=has_pairs)
        return PreparedPyTorch(self, candidate, inputs, changes, judged, quantised, attached)

    @property
    def remedy(self) -> str:
        """Empty: there is no better reference than PyTorch."""
        return ""

    def explain(self, refusal: str) -> str:
        """The refusal, with what to do where the candidate takes float16 and the model float32."""
        if EXPECTS_HALF not in refusal:
            return refusal
        note = note_on_half()
        return f"{refusal}. {note[0].upper()}{note[1:]}"

    def about(self) -> dict[str, Any]:
        """Versions, and the model's source and hash."""
        model = {"source": self.model.source, "sha256": self.model.fingerprint()}
        return {**torch_runners.describe_environment(), "model": model}


@dataclass(eq=False)
class PreparedPyTorch:
    """The model with adapters attached, for one candidate."""

    references: PyTorchReferences
    candidate: Runner
    inputs: Inputs
    changes: Plan | None
    judged: Model  # the model, with the quantised weights of the candidate in place of its own
    quantised: Mapping[str, quantised_weights.DequantisedWeight]
    attached: AttachedModule
    _key: cached_outputs.CacheKey | None = field(default=None, init=False)  # of the outputs of the references

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
        """Run PyTorch as deployed, then the references in fp64."""
        is_large_model = is_large(self.attached.module)
        if is_large_model and isinstance(self.candidate, OnnxRunner | CacheRunner | EncoderDecoderRunner):
            _ = self.is_half_inside  # reads the session
            self.candidate.close()
            release_memory()
        step("PyTorch")
        model, cases, deployed = self.references.model, self.inputs.cases, self.deployed
        coverage = RowCoverage(deployed.module, model, self.references.adapters)
        errors = {name: weight.error for name, weight in self.quantised.items() if weight.error is not None}
        with layers.recorded_branches() as computed, quantisation_error.output_errors(deployed.module, errors) as layer:
            own = {name: kept(deployed.run(arrays)) for name, arrays in cases.items()}
        doubts, rows = coverage.doubts, coverage.not_judged  # read here: runs on other inputs would add to them
        pairs = coverage_of_pairs(self.attached.module, cases, computed)
        doubts = [
            *doubts,
            *pairs.doubts,
            *doubts_on_sizes(self.candidate, model, self.references.fixed),
            *self.inputs.doubts,
            *(findings := quantisation_error.findings_on(errors, layer)).doubts,
        ]
        sensitivity = sensitivity_of(outputs, deployed, self.inputs)
        names_known = self.candidate.names_known and deployed.names_known
        self._key = self._cache_key(own)
        if is_large_model:  # its weights are made again where they are needed
            del deployed, self.deployed
        by_role, narrow_operators, _ = self._in_fp64(step)
        self.attached.ready = None
        unjudged: UnjudgedPositions = {}
        if not self.quantised:  # there PyTorch rounds to int8 as the graph does
            reference, dtype = by_role["reference"], dtype_name(self.dtype)
            if model.is_huggingface:
                unjudged = padding_beyond_rounding(own, reference, cases, dtype)
            doubts = [*doubts, *outputs_beyond_rounding(own, reference, unjudged, dtype)]
        notes = [
            note_on_fp64(narrow_operators),
            *model.notes,
            *notes_on_sizes(self.candidate, model),
            *_about_cache(self.candidate),
            *([] if outputs.refusals else self.inputs.notes),
            *outputs.notes,
            *([note_on_half()] if self._is_unstated_half(outputs, own, names_known=names_known) else []),
            *notes_on_padding(unjudged),
            *quantised_weights.notes_on(self.quantised),
        ]
        return ReferenceOutputs(
            own,
            by_role,
            sensitivity,
            dtype=dtype_name(self.dtype),
            names_known=names_known,
            is_quantised=bool(self.quantised),
            notes=tuple(notes),
            not_judged=(*outputs.not_judged, *model.not_judged, *rows, *findings.not_judged),
            unreached=pairs.unreached,
            doubts=tuple(doubts),
            faults=(*quantised_weights.merge_faults(self.quantised), *findings.faults),
            unjudged=unjudged,
        )

    def _is_unstated_half(
        self, outputs: CandidateOutputs, deployed: Mapping[str, Arrays], *, names_known: bool
    ) -> bool:
        """Whether the candidate is in half precision and the model is not."""
        is_half = self.is_half_inside or _has_halves(outputs, deployed, names_known=names_known)
        return is_half and self.dtype is torch.float32

    def _in_fp64(self, step: OnProofStep) -> CachedOutputs:
        """The outputs of the references in fp64: read from the cache, or run now and written to it."""
        given, key = self.references, self._key
        if cached := self._read_cache(key):
            return cached
        narrow_operators: set[str] = set()
        by_role = {}
        with widened(self.attached.module):
            for role in self.attached.roles if given.adapters else ("reference",):
                step(STEPS[role])
                by_role[role] = self.attached.run(role, self.inputs.cases, narrow_operators)
                if is_large(self.attached.module):
                    release_memory()  # of rounded weights
        outputs = CachedOutputs(by_role, frozenset(narrow_operators))
        self._write_cache(key, outputs)
        if given.cache is not None and key is None:
            given.say("cache: not used: an adapter came from no file, or was merged into quantised weights")
        return outputs

    def _read_cache(self, key: cached_outputs.CacheKey | None) -> CachedOutputs | None:
        given = self.references
        return None if given.cache is None or key is None else cached_outputs.read(given.cache, key, given.say)

    def _write_cache(self, key: cached_outputs.CacheKey | None, outputs: CachedOutputs) -> None:
        given = self.references
        if given.cache is not None and key is not None:
            cached_outputs.write(given.cache, key, outputs, given.say)

    def _cache_key(self, deployed: Mapping[str, Arrays]) -> cached_outputs.CacheKey | None:
        """The hashes of all that the references depend on; None where they cannot be cached."""
        given, rounding = self.references, self.attached.rounding
        if given.cache is None:
            return None
        dtypes = {name: kind for name, kind in rounding.items() if isinstance(kind, str)}
        key = None
        if len(dtypes) == len(rounding):  # no weight is rounded to the numbers of a quantised one
            module, cases = self.deployed.module, self.inputs.cases
            key = cached_outputs.cache_key(
                self.judged, given.adapters, given.strengths, cases, deployed, dtypes, module
            )
        return key

    def further_peers(self, step: OnProofStep) -> Iterator[FurtherPeer]:
        """Run PyTorch in fp32 with its adapters merged, and then with moved weights; nothing in other precisions.

        The error of one run is one draw of what rounding does. A sum in another order has another error, and a weight
        moved by one rounding changes the outputs as much as that. Where a graph rounds what enters its layers to int8,
        there are none: the weights are then not what decides its error.
        """
        rounds_inputs = any(weight.activation_block for weight in self.quantised.values())
        if rounds_inputs or self.dtype is not torch.float32:
            return
        device = self.references.device
        if not self.quantised and self.changes is not None and self.attached.has_pairs and not self.attached.rounding:
            step("PyTorch, the adapters merged")
            merged = on_device(merged_module(self.attached.module, self.changes), device)
            yield self._peer(merged, MERGED_MODULE)
            del merged
        if is_large(self.attached.module):
            return
        for number in range(DRAWS_OF_ROUNDING):
            step("PyTorch, its weights moved by a rounding")
            yield self._peer(moved_module(self.deployed.module, self.references.seed + number), MOVED_WEIGHTS)

    def _peer(self, module: nn.Module, note: str) -> FurtherPeer:
        peer = ModuleRunner(module, self.references.device)
        return FurtherPeer({name: peer.run(arrays) for name, arrays in self.inputs.cases.items()}, note)

    def control_pairs(self, cases: Sequence[parity.Case], expected: ReferenceOutputs) -> PairControls:
        """Run the module in fp64 without single pairs, and judge what it returns."""
        judge = functools.partial(parity.judge_missing_part, cases, dtype=expected.dtype)
        key = None
        if self.references.cache is not None and all(case.deployed is expected.deployed[case.name] for case in cases):
            key = self._key
        cached = self._read_cache(key)
        detected = cached.detected if cached else frozenset()
        with widened(self.attached.module):
            controls = control_pairs(
                self.attached.module, self.inputs.cases, cases, judge, skip=expected.unreached, detected=detected
            )
        if cached and controls.detected - detected:
            self._write_cache(key, cached._replace(detected=controls.detected))
        return controls

    def diagnose(self, case: parity.Case, *, every: bool, step: OnProofStep) -> Diagnosed:
        """Compare the candidate with PyTorch module by module, in one case."""
        step("comparing modules")
        watched = [self.judged.module, *([self.candidate.module] if isinstance(self.candidate, ModuleRunner) else [])]
        unseen = [name for module in watched if isinstance(module, Program) for name in module.unobserved_weights]
        if unseen:
            return None, [
                f"modules were not compared: {unseen[0]} and {len(unseen) - 1} more weights of the .pt2 are multiplied "
                "by operators that belong to no layer"
            ]
        copies = 0 if is_large(self.attached.module) else 2 if self.attached.rounding else 1
        needed = copies * fp64_bytes(self.attached.module)
        if (available := available_memory()) is not None and needed > available:
            gib = f"{needed / GIB:.1f} GiB of memory, and {available / GIB:.1f} GiB are available"
            return None, [f"modules were not compared: this needs {gib}"]
        try:
            return diagnose(self._diagnosis_case(case), every=every), []
        except CANNOT_FOLLOW as error:
            return None, [f"modules could not be compared: {(str(error) or repr(error)).splitlines()[0]}"]

    def _diagnosis_case(self, case: parity.Case) -> DiagnosisCase:
        deployed, wide = self.deployed, self.attached  # the weights of a large model are widened where they are used
        if not is_large(wide.module):
            wide = replace(wide, module=converted_copy(wide.module, to_double))
        attached = Fp64Runner(wide.module)
        reference = Fp64Runner(wide.ready or wide.rounded_module()) if wide.rounding else attached
        return DiagnosisCase(
            self.candidate,
            reference,
            attached,
            deployed,
            self.judged.module,
            self.changes,
            self.inputs.cases[case.name],
            case,
            keep_replaced=self.attached.has_pairs,
        )


def note_on_half() -> str:
    """The note on a candidate in half precision of a model in float32."""
    precision = named("dtype", "float16")
    return f"the candidate is in half precision: {precision} compares it with the model in the same precision"


def _unjudged(cases: Mapping[str, Arrays]) -> dict[str, NDArray[np.bool_]]:
    """Case -> the positions before each row's first token, where there are any."""
    by_case = ((name, before_first_token(arrays)) for name, arrays in cases.items())
    return {name: positions for name, positions in by_case if positions is not None}


def _has_halves(outputs: CandidateOutputs, deployed: Mapping[str, Arrays], *, names_known: bool) -> bool:
    """Whether the candidate returns float16 for an output that PyTorch has."""
    for case, own in outputs.by_case.items():
        named = aligned(own, deployed[case], names_known=names_known)
        if any(value.dtype == np.float16 and name in deployed[case] for name, value in named.items()):
            return True
    return False


def _about_cache(candidate: Runner) -> list[str]:
    return candidate.notes if isinstance(candidate, CacheRunner | EncoderDecoderRunner) else []
