"""What the functions that publish a proven file have in common: its record, its proof, and a verdict's meaning."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_export.callbacks import OnMessage
from lora_export.errors import Different, EnvironmentLacking, EscapedLines, LoraExportError, Undecided, one_line
from lora_export.lora import Adapter
from lora_export.notebook import html_table
from lora_export.options.proof import NO_PROOF
from lora_export.options.spelling import command, named
from lora_export.provenance import LONGEST_KEY, record
from lora_export.runtime import environment
from lora_export.runtime.environment_probes import CUDA, VARIABLES
from lora_export.runtime.runner import Placement
from lora_export.verification.parity import Outcome, Reason, Verdict
from lora_export.verification.proof import Proof

if TYPE_CHECKING:
    from lora_export.models.model import Model

Proofs = TypeVar("Proofs")


@dataclass(frozen=True, eq=False)
class ExportProofs:
    """Everything that was proven of an exported file."""

    whole: Proof  # with the adapters that are in it; where they are swapped, without any
    adapters: Mapping[str, Proof] = field(default_factory=dict)  # each by itself, where they are swapped
    mixed: Proof | None = None  # batches in which each row has its own adapter
    unlike_base: Sequence[str] | None = None  # outputs whose bits are not the base graph's; None: not compared
    several: Proof | None = None  # batches in which each row has several adapters
    moved: Proof | None = None  # batches after the adapter of each slot was replaced
    strengths: Mapping[str, Proof] = field(default_factory=dict)  # at other strengths: of each adapter, or of all

    def parts(self, form: Callable[[Proof], Any]) -> dict[str, Any]:
        """What was proven besides the whole, by name; each proof in a form of it."""
        found: dict[str, Any] = {}
        if self.unlike_base is not None:
            found["bits_of_base"] = not self.unlike_base
        if self.adapters or self.unlike_base is not None:
            found["adapters"] = {name: form(proof) for name, proof in self.adapters.items()}
        if self.strengths:
            found["strengths"] = {name: form(proof) for name, proof in self.strengths.items()}
        batches = {"mixed": self.mixed, "several": self.several, "moved": self.moved}
        return found | {name: form(proof) for name, proof in batches.items() if proof}


@dataclass(frozen=True, eq=False)
class ExportResult:
    """What was published, and its proofs."""

    output: Path
    files: tuple[Path, ...]  # the output first, or of three graphs one of them; then what is stored beside it
    proofs: ExportProofs | None  # None: `verify=False`

    @property
    def proof(self) -> Proof | None:
        """The proof of the file with the adapters that are in it; where they are swapped, without any."""
        return self.proofs.whole if self.proofs else None

    def _repr_html_(self) -> str:
        return self.proof._repr_html_() if self.proof else html_table(f"{self.output} (not proven)", (), ())


def record_of_model(
    base: Model, adapters: Sequence[Adapter], strengths: Sequence[float], settings: dict[str, Any]
) -> dict[str, Any]:
    """Where a file that was exported from a PyTorch model comes from, by hashes."""
    fingerprint = {"sha256": base.fingerprint()}
    path = Path(base.source) if base.source else None
    return record(adapters, strengths or (1.0,) * len(adapters), fingerprint, (), settings, base_path=path)


def recorded_verdict(proof: Proof | None, runtime: str = "PyTorch") -> dict[str, Any]:
    """The verdict as it is stored in the file itself. None: no proof was requested. `runtime` ran what has no nodes."""
    if proof is None:
        return {"outcome": "not verified", "why": NO_PROOF}
    measured = [comparison.figures for comparison in proof.verdict.comparisons if comparison.figures]
    relative = [figures.relative_to_effect for figures in measured if figures.relative_to_effect]
    against = {"against": proof.about["against"]} if "against" in proof.about else {}
    shapes = [(name, list(shape)) for case in proof.about.get("inputs", {}).values() for name, shape in case.items()]
    largest = dict(sorted(shapes, key=lambda each: math.prod(each[1])))  # the last of a name counts
    return {
        "outcome": str(proof.verdict.outcome),
        **against,
        "provider": proof.placement.requested_provider if proof.placement else runtime,
        "error_relative_to_effect": max(relative, default=None),
        **({"largest_inputs": largest} if largest else {}),
        "versions": {name: proof.about[name] for name in ("torch", "onnxruntime") if name in proof.about},
        "variables": {name: proof.about[name] for name in VARIABLES if name in proof.about},
    }


def recorded_verdicts(proofs: ExportProofs | None, runtime: str = "PyTorch") -> dict[str, Any]:
    """The verdict on the whole as `recorded_verdict` has it, and those on its parts."""
    form = functools.partial(recorded_verdict, runtime=runtime)
    return form(proofs.whole) | proofs.parts(form) if proofs else form(None)


def require_provider(provider: str) -> None:
    """Raise EnvironmentLacking where the provider cannot run as a proof needs it. Called before any other work."""
    if provider == "cpu":
        return
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        raise EnvironmentLacking(
            "NVIDIA_TF32_OVERRIDE=1 turns TF32 on in every CUDA library, and a proof in float32 needs float32. "
            "Unset the variable"
        )
    if fault := environment.try_provider(CUDA).fault:
        raise EnvironmentLacking(
            f"{CUDA} does not run here: {fault}. `{command('doctor', provider='cuda')}` shows how to get it"
        )


def stage_of_proof(stage: Callable[[str], None], what: str = "") -> Callable[[str], None]:
    """Return a function that reports the steps of a proof: of the whole file, or of the part `what`."""
    return lambda step: stage(f"verifying {what}, {step}" if what else f"verifying, {step}")


def require_same(proof: Proof, what: str = "") -> Proof:
    """Return the proof if its verdict is `same`. Raises Different or Undecided, with the proof, if not."""
    if proof.verdict.same:
        return proof
    kind = Different if proof.verdict.outcome is Outcome.DIFFERENT else Undecided
    summary = proof.verdict.summary
    raise kind(
        EscapedLines(f"{one_line(what)}: {summary}") if what else summary,
        *([proof.diagnosis.text] if proof.diagnosis else []),
        f"{named('verify', False)} would publish the file without a proof.",
        proof=proof,
    )


def prove_trace(
    model: Model, prove: Callable[[], Proofs] | None, state: Callable[[Mapping[str, str]], None], on_message: OnMessage
) -> Proofs | None:
    """What `prove` returns, of a trace of a model (`with_traced_lengths`); None where no proof was requested.

    A file that follows the model up to a length alone, or whose longer texts take too long to be tried, gets this
    length as a property, by `state`, and is proven up to it. Raises what `prove` raises.
    """
    from lora_export.models import traced_lengths  # a graph alone needs no PyTorch

    longest = traced_lengths.longest_traced(model)
    if prove and (traced_lengths.passes_traced_lengths(model) or not longest):
        try:
            return prove()
        except Different as error:
            if not isinstance(error.proof, Proof) or not error.proof.differs_only_beyond(longest, model.axes):
                raise
    if longest:
        state({LONGEST_KEY: json.dumps(longest)})
        sizes = " and ".join(f"{size:,} in {symbol}" for symbol, size in longest.items())
        on_message(
            f"note: the file is for sizes of up to {sizes}: {type(model.module).__name__} computes larger ones in "
            "another way"
        )
    return prove() if prove else None


def proof_without_figures(error: LoraExportError, placement: Placement | None = None) -> Proof:
    """Return a proof that reports the error which ended it before anything was measured."""
    from lora_export.runtime.torch_runners import describe_environment

    outcome = Outcome.DIFFERENT if isinstance(error, Different) else Outcome.UNDECIDED
    gate = "placement" if isinstance(error, EnvironmentLacking) else "structure"
    verdict = Verdict(outcome, (Reason(outcome, gate, str(error)),), comparisons=(), sensitivity=(), dtype="float32")
    return Proof(verdict, placement, describe_environment(), error=error)
